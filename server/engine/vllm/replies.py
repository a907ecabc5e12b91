"""One request on vLLM: its tokens, with what was read where they were chosen."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

from server.engine.base import EngineRequest, EngineToken
from server.engine.vllm.client import Ask, Client
from server.engine.vllm.reads import Reads
from server.engine.vllm.sampling import tokens_of
from steering.monitor import Monitor


class Replies:
    """Used on the engine's loop."""

    def __init__(self, client: Client, monitor: Monitor | None) -> None:
        self._client = client
        self._monitored = monitor is not None
        self._reads = Reads(monitor)

    async def tokens(
        self, request: EngineRequest, ask: Ask, queue_seconds: float
    ) -> AsyncIterator[EngineToken]:
        """The reply. Where the benign probe needs a pass of its own over the prompt, that runs
        beside it; the first token waits for all scores."""
        raw = None
        if self._reads.needs_raw_pass(request):
            raw = asyncio.create_task(self._client.read_prompt(request))
        # A gate over the prompt must have been read before anything is answered.
        report = self._monitored or ask.latches
        try:
            running = self._client.run(request, ask, report=report, trace=request.trace)
            async with running as (outputs, readings):
                number = 0
                async for output in outputs:
                    for token in tokens_of(output.outputs[0], request.sampling.top_logprobs):
                        if number == 0 or request.trace:
                            told = (report and number == 0) or request.trace
                            read = await readings.of(number) if told else {}
                            trace = self._reads.trace(request, read) if request.trace else None
                            token = replace(token, trace=trace)
                        if number == 0:
                            unedited = {} if raw is None else await raw
                            token = replace(
                                token,
                                scores=self._reads.scores(request, ask, read, unedited),
                                queue_seconds=queue_seconds,
                                cached_tokens=output.num_cached_tokens or 0,
                            )
                        yield token
                        number += 1
        finally:
            if raw is not None:
                raw.cancel()
