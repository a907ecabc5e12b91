"""Where the seconds of a fit go, and how much memory it needed."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


class Clock:
    """Seconds by phase; the outermost phase gets them, so that nothing is counted twice.

    A candidate's replies, say, are `selecting`, though `generating` is timed inside.

    Args:
        now: reads the time, in seconds.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.now = now
        self.seconds: dict[str, float] = defaultdict(float)
        self._inside = False

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        if self._inside:
            yield
            return
        self._inside, start = True, self.now()
        try:
            yield
        finally:
            self._inside = False
            self.seconds[phase] += self.now() - start


def peak_memory() -> float | None:
    """The most main memory that this process has needed, in MiB; None where nobody says."""
    status = Path("/proc/self/status")
    if status.is_file():
        # getrusage hands the figure on from the process that started this one, which is larger.
        found = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return float(found[0].split()[1]) / 1024 if found else None
    if sys.platform == "win32":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes on macOS
