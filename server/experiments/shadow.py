"""The same prompt under the other arms, unseen.

Of a sampled share of an experiment's answers, every other arm answers the same prompt with the same
sampling and seed, so that outcomes can be compared in pairs. It starts when the client has its
answer and runs as a lower class of the engine (`EngineRequest.priority`), few at once and never in
a queue that is half full; it costs no quota, enters no metric of its profile, and ends with the
server. The audit log has a line for each.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

from server.engine.base import EngineError
from server.errors import ApiError
from server.experiments.assignment import sampled
from server.experiments.definitions import Arm
from server.hosting import Host
from server.metrics import Meter, Metrics
from server.prepare import Prepared, under
from server.protocol import CompletionRequest
from server.reply import Reply, audit_fields

logger = logging.getLogger(__name__)

PRIORITY = 1
CLIENT = "#shadow"
"""For fairness, all shadows are one client, whose name no key can have."""
MOST_WAITING = 64
SLOTS_SHARE = 4
"""Shadows use at most one of so many slots at once, since a row that runs is not taken away."""

OnShadow = Callable[[Reply, Arm, Reply], None]
"""Called with a shadow, its arm, and the reply it belongs to."""


class Shadows:
    """Answers under other arms, in the background. Used on the event loop."""

    def __init__(self, host: Host, metrics: Metrics, on_end: OnShadow) -> None:
        self._host = host
        self._metrics = metrics
        self._on_end = on_end
        self._tasks: set[asyncio.Task[None]] = set()
        self._turns: asyncio.Semaphore | None = None

    def offer(self, reply: Reply) -> None:
        """Perhaps let the other arms answer what this reply has answered."""
        exposure = reply.prepared.exposure
        assert exposure is not None
        experiment, id = exposure.experiment, reply.request.request_id
        if not sampled(experiment, id, experiment.shadow) or self._host.draining:
            return
        for name in exposure.others:
            if len(self._tasks) >= MOST_WAITING:
                self._metrics.shadows.labels(experiment.name, "dropped").inc()
                continue
            work = self._answer(reply, experiment.arm(name))
            task = asyncio.create_task(work, name=f"shadow {id}/{name}")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Cancel what is under way."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def drained(self) -> None:
        """Wait until no shadow is under way."""
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _answer(self, seen: Reply, arm: Arm) -> None:
        if self._turns is None:
            slots = self._host.engine.stats().slots
            self._turns = asyncio.Semaphore(max(1, slots // SLOTS_SHARE))
        experiment = _experiment(seen)
        async with self._turns:
            result = "failed"
            try:
                result = await self._compute(seen, arm)
            except Exception:
                logger.exception("a shadow of %s failed", seen.request.request_id)
            self._metrics.shadows.labels(experiment, result).inc()

    async def _compute(self, seen: Reply, arm: Arm) -> str:
        """How it ended, as the metric has it."""
        prepared = _as_asked(self._host, seen, arm)
        since = time.perf_counter()
        try:
            tokens = self._host.engine.generate(prepared.request)
        except EngineError:  # the queue is half full, or the server about to stop
            return "dropped"
        reply = Reply(self._host, prepared, 0, tokens, Meter(since))
        try:
            with suppress(ApiError):
                async for _ in reply.pieces():
                    pass
        finally:
            await reply.close()
        if reply.ended_by != "cancelled":
            self._on_end(reply, arm, seen)
            self._note(reply)
        return "failed" if reply.ended_by == "error" else "answered"

    def _note(self, reply: Reply) -> None:
        audit = self._host.access.audit
        note = {
            **audit_fields(reply.prepared),
            "shadow": True,
            "outcome": reply.outcome or reply.ended_by,
            "finish_reason": reply.ended_by,
            "prompt_tokens": len(reply.request.prompt_ids),
            "completion_tokens": reply.completion_tokens,
        }
        if audit.with_text:
            note |= {**reply.prepared.body.audited_prompt, "reply": reply.text}
        audit.write(**note)


def _experiment(seen: Reply) -> str:
    assert seen.prepared.exposure is not None
    return seen.prepared.exposure.experiment.name


def _as_asked(host: Host, seen: Reply, arm: Arm) -> Prepared:
    """The one choice's request, under another arm."""
    exposure, body = seen.prepared.exposure, seen.prepared.body
    assert exposure is not None
    alone: dict[str, Any] = {"n": None}
    if isinstance(body, CompletionRequest):
        alone["prompt"] = body.prompts[seen.index // body.choices]
    whole = under(host, seen.prepared, exposure.others[arm.name])
    request = replace(
        whole.requests[seen.index],
        request_id=f"{seen.request.request_id}/{arm.name}",
        client=CLIENT,
        priority=PRIORITY,
        deadline=time.monotonic() + host.request_timeout,
        trace=False,
    )
    return replace(
        whole,
        id=request.request_id,
        body=body.model_copy(update=alone),
        requests=(request,),
        exposure=replace(exposure, arm=arm),
    )
