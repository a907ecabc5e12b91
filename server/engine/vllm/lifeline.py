"""vLLM's processes end with the server, even with one that was killed and could not tell them.

vLLM's workers end with their engine, but an engine whose server is killed, say for want of memory,
runs on: it keeps its memory, and its GPU, from the server that a supervisor starts instead. And
the server hears at once of a worker that ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
import signal
import threading
from collections.abc import Callable, Sequence

logger = logging.getLogger(__name__)


def end_with(server: int, processes: Sequence[int]) -> None:
    """Kill `processes` once `server` has ended.

    All are process ids on this machine. From now on no other process that gets one of these
    numbers is taken for it.
    """
    try:
        watched, others = os.pidfd_open(server), [os.pidfd_open(pid) for pid in processes]
    except (AttributeError, OSError) as error:  # not Linux, or before 5.3
        logger.warning("vLLM's processes will outlive a server that is killed: %r", error)
        return

    def watch() -> None:
        ended = select.poll()
        ended.register(watched, select.POLLIN)
        ended.poll()
        for other in others:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(other, signal.SIGKILL)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()


def when_one_ends(processes: Sequence[int], tell: Callable[[], None]) -> Callable[[], None]:
    """Call `tell`, once and on this event loop, when the first of `processes` has ended.

    Returns what stops the watch.
    """
    loop = asyncio.get_running_loop()
    try:
        watched = [os.pidfd_open(pid) for pid in processes]
    except (AttributeError, OSError) as error:
        logger.warning("nobody watches vLLM's workers but vLLM: %r", error)
        watched = []

    def stop() -> None:
        while watched:
            fd = watched.pop()
            loop.remove_reader(fd)
            os.close(fd)

    def ended() -> None:
        stop()
        tell()

    for fd in watched:
        loop.add_reader(fd, ended)
    return stop
