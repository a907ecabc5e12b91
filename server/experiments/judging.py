"""A slow judge, off every client's path.

A classifier (`--judge hf:ID`) reads replies on a thread of its own after they were sent. The
receipt and the record that is written before the final chunk have the light judge's outcome; the
classifier's goes into the metrics, and into the records as an update
(`interfaces.JUDGED_LATER`). Where it cannot keep up, replies stay unread by it and are counted.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass

from steering.judge import Judge, Outcome, ask
from steering.judge_set import Card

logger = logging.getLogger(__name__)

BATCH = 8
MOST_WAITING = 256


@dataclass(frozen=True)
class Job:
    """A reply to judge.

    Args:
        done: called on the judge's thread with the outcome (None: there is none) and the seconds
            it took.
    """

    reply: str
    prompt: str | None
    done: Callable[[Outcome | None, float], None]


class LaterJudge:
    """Judges replies as they come, few at once."""

    def __init__(self, judge: Judge, *, most_waiting: int = MOST_WAITING) -> None:
        self.judge = judge
        self._jobs: queue.Queue[Job | None] = queue.Queue(most_waiting)
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="judge", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> bool:
        """Judge this later; False where too many wait already."""
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            return False
        return True

    def close(self, seconds: float = 5.0) -> None:
        """Stop when the replies under way are judged; what still waits is not."""
        self._stopping = True
        with suppress(queue.Full):  # then the thread will see the flag
            self._jobs.put_nowait(None)
        self._thread.join(seconds)

    def _run(self) -> None:
        while not self._stopping:
            jobs = [self._jobs.get()]
            while len(jobs) < BATCH and not self._jobs.empty():
                jobs.append(self._jobs.get_nowait())
            self._judge([job for job in jobs if job is not None])

    def _judge(self, jobs: list[Job]) -> None:
        if not jobs:
            return
        start = time.perf_counter()
        outcomes: list[Outcome | None]
        try:
            outcomes = [*ask(self.judge, [j.reply for j in jobs], [j.prompt for j in jobs])]
        except Exception:
            logger.exception("%d replies could not be judged", len(jobs))
            outcomes = [None] * len(jobs)
        each = (time.perf_counter() - start) / len(jobs)
        for job, outcome in zip(jobs, outcomes, strict=True):
            try:
                job.done(None if outcome == "error" else outcome, each)
            except Exception:
                logger.exception("a judgement was lost")


class JudgeCard:
    """How often a judge errs, found out when somebody first asks, on a thread of its own: a
    classifier takes a while, and one that hangs keeps no reader of records."""

    def __init__(self, judge: Judge) -> None:
        self._judge = judge
        self._lock = threading.Lock()
        self._card: Future[Card] | None = None

    def wait(self, seconds: float) -> Card:
        """Any thread may call this.

        Raises TimeoutError where it takes longer, and what the judge raises; the next call then
        asks it again.
        """
        with self._lock:
            if self._card is None:
                self._card = Future()
                threading.Thread(
                    target=self._measure, args=(self._card,), name="judge-card", daemon=True
                ).start()
            card = self._card
        return card.result(seconds)

    def _measure(self, card: Future[Card]) -> None:
        try:
            card.set_result(self._judge.card())
        except Exception as error:
            with self._lock:
                self._card = None
            card.set_exception(error)
