"""`pilothouse` with a pause before each step, so that a test can act while replies come:
`python -m tests.browser.slow serve`."""

from __future__ import annotations

import sys
import time

from server.cli import main
from server.engine.scheduler import Scheduler

PAUSE = 0.15
step = Scheduler.step


def slow_step(scheduler: Scheduler) -> None:
    time.sleep(PAUSE)
    step(scheduler)


if __name__ == "__main__":
    Scheduler.step = slow_step  # type: ignore[method-assign]
    sys.exit(main(sys.argv[1:]))
