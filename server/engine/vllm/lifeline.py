"""vLLM's processes end with the server, even with one that was killed and could not tell them.

vLLM's workers end with their engine, but an engine whose server is killed, say for want of memory,
runs on: it keeps its memory, and its GPU, from the server that a supervisor starts instead.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import threading
from collections.abc import Sequence

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
