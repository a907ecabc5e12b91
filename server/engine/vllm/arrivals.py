"""Requests that were submitted to vLLM's engine, and what their clients are told through."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field

from server.engine.rows import Waiting
from server.engine.stream import Outbox
from server.engine.vllm.wire import RequestEdits


@dataclass(eq=False)
class Arrival(Waiting):
    """A submitted request, its edits and, once it runs, its task."""

    outbox: AlertOutbox
    edits: RequestEdits = field(default_factory=RequestEdits)
    task: asyncio.Task[None] | None = None


class AlertOutbox(Outbox):
    """An outbox whose client's leaving is heard at once.

    Args:
        engine_loop: where `on_leaving` is called.
    """

    _cancelled = False
    on_leaving: Callable[[], None] | None = None

    def __init__(
        self, loop: asyncio.AbstractEventLoop, engine_loop: asyncio.AbstractEventLoop
    ) -> None:
        super().__init__(loop)
        self._engine_loop = engine_loop

    @property
    def cancelled(self) -> bool:
        return self._cancelled

    @cancelled.setter
    def cancelled(self, value: bool) -> None:
        self._cancelled = value
        if value and self.on_leaving is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._engine_loop.call_soon_threadsafe(self.on_leaving)
