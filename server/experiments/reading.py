"""Reading of records off the event loop, and away from the threads that answers need.

A database that hangs, one whose host takes connections and says nothing, keeps whoever reads it. So
readers are few, have threads of their own (asyncio's are for templates and tokenisers), and nobody
waits for them longer than a while, the end of the process included.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from server.errors import UnavailableError

T = TypeVar("T")

MOST_READERS = 3
"""At once. The others wait; those that a database keeps count."""
PATIENCE_SECONDS = 45.0
"""Less than `pilothouse experiments report` waits for an answer."""


class Reading:
    """Runs what may wait for a database. Used on the event loop."""

    def __init__(self, most: int = MOST_READERS, seconds: float = PATIENCE_SECONDS) -> None:
        self.seconds = seconds
        self._free = asyncio.Semaphore(most)

    async def run(self, work: Callable[[], T], seconds: float | None = None) -> T:
        """What `work` returns, computed on a thread.

        Raises what it raises, and UnavailableError where that takes longer than `seconds`; the
        thread is then left to itself.
        """
        try:
            async with asyncio.timeout(self.seconds if seconds is None else seconds):
                await self._free.acquire()
                return await self._start(work)
        except TimeoutError:
            raise UnavailableError(
                "The records of experiments cannot be read now: the database takes too long.",
                code="records_unavailable",
            ) from None

    def _start(self, work: Callable[[], T]) -> asyncio.Future[T]:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()

        def finish(tell: Callable[[Any], None], value: Any) -> None:
            self._free.release()
            if not done.done():  # nobody waits any more
                tell(value)

        def on_thread() -> None:
            outcome: tuple[Callable[[Any], None], Any]
            try:
                outcome = done.set_result, work()
            except Exception as error:
                outcome = done.set_exception, error
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(finish, *outcome)

        # A daemon: the process does not wait for it at its end.
        threading.Thread(target=on_thread, name="experiment-reading", daemon=True).start()
        return done
