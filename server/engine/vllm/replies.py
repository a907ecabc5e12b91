"""One request on vLLM: its tokens, with what was read where they were chosen."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

from server.engine.base import EngineRequest, EngineToken
from server.engine.vllm.client import Client
from server.engine.vllm.sampling import tokens_of
from server.engine.vllm.scores import ScoreReader
from server.engine.vllm.wire import RequestEdits
from steering.monitor import Monitor


class Replies:
    """Used on the engine's loop."""

    def __init__(self, client: Client, monitor: Monitor | None) -> None:
        self._client = client
        self._monitored = monitor is not None
        self._scores = ScoreReader(monitor)

    async def tokens(
        self, request: EngineRequest, edits: RequestEdits, queue_seconds: float
    ) -> AsyncIterator[EngineToken]:
        """The reply. Where the benign probe needs a pass of its own over the prompt, that runs
        beside it; the first token waits for all scores."""
        raw = None
        if self._scores.needs_raw_pass(request):
            raw = asyncio.create_task(self._client.read_prompt(request))
        # Nothing is answered before the workers have told that the edits are in it.
        report = self._monitored or bool(edits.placed)
        try:
            running = self._client.run(request, edits, report=report, trace=request.trace)
            async with running as (outputs, readings):
                number = 0
                async for output in outputs:
                    for token in tokens_of(output.outputs[0], request.sampling.top_logprobs):
                        if number == 0 or request.trace:
                            told = (report and number == 0) or request.trace
                            read = await readings.of(number) if told else {}
                            trace = self._scores.trace(request, read) if request.trace else None
                            token = replace(token, trace=trace)
                        if number == 0:
                            unedited = {} if raw is None else await raw
                            token = replace(
                                token,
                                scores=self._scores.scores(request, edits, read, unedited),
                                queue_seconds=queue_seconds,
                                cached_tokens=output.num_cached_tokens or 0,
                            )
                        yield token
                        number += 1
        finally:
            if raw is not None:
                raw.cancel()
