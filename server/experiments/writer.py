"""The thread that moves records from the journal to the database.

It reads the journal from its oldest segment on, at start too: inserting is idempotent, so what a
crash left half done is simply done again. A segment is deleted when all of it is committed. While
the database does not answer, the records stay where they are and the thread asks again, ever more
seldom; nobody else waits for it.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from typing import Literal

from server.experiments.database import Database, DatabaseError
from server.experiments.journal import DAY, Batch, Journal, JournalReader

logger = logging.getLogger(__name__)

State = Literal["ok", "behind", "failing"]

BATCH = 500
POLL_SECONDS = 0.25
BACKOFF_SECONDS = (0.5, 30.0)
"""Between two attempts: the shortest and the longest time."""

BEHIND_SECONDS = 30.0
"""Records that have waited longer are reported."""

RETENTION_SECONDS = 3600.0
"""Between two deletions of what is too old."""


class DatabaseWriter:
    """Moves records, until it is closed.

    Args:
        retention_days: answers older than this are deleted; None keeps them.
    """

    def __init__(
        self,
        journal: Journal,
        database: Database,
        *,
        retention_days: float | None = None,
        backoff_seconds: tuple[float, float] = BACKOFF_SECONDS,
    ) -> None:
        self.failing = False
        self._journal = journal
        self._database = database
        self._retention_days = retention_days
        self._backoff = backoff_seconds
        self._reader = JournalReader(journal)
        self._batch: Batch | None = None
        self._moved = 0
        self._migrated = False
        self._swept = -RETENTION_SECONDS
        self._level = time.monotonic()
        self._wake = threading.Event()
        self._until: float | None = None
        self._round = threading.Condition()
        self._thread: threading.Thread | None = None

    @property
    def pending(self) -> int:
        """Lines of the journal that are not in the database."""
        return max(0, self._journal.lines - self._moved)

    @property
    def state(self) -> State:
        if self.failing:
            return "failing"
        late = time.monotonic() - self._level > BEHIND_SECONDS
        return "behind" if late and self.pending else "ok"

    def start(self) -> None:
        self._level = time.monotonic()
        self._until = None
        self._thread = threading.Thread(target=self._run, name="experiment-records", daemon=True)
        self._thread.start()

    def flush(self, seconds: float) -> bool:
        """Wait until all that was appended is in the database, and the database has its tables;
        False if that takes too long."""
        if not self.failing:
            self._wake.set()
        with self._round:
            return self._round.wait_for(lambda: self._migrated and self.pending == 0, seconds)

    def close(self, seconds: float) -> None:
        """Move what is left, once more if the database does not answer, and stop."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._until = time.monotonic() + seconds
        self._wake.set()
        thread.join(seconds)
        if self.pending:
            logger.warning(
                "%d records of experiments stay in %s until the next start",
                self.pending, self._journal.folder,
            )  # fmt: skip

    def _run(self) -> None:
        shortest, longest = self._backoff
        delay = shortest
        while self._until is None or time.monotonic() < self._until:
            last = self._until is not None
            try:
                idle = not self._move()
                if idle and last:  # the live segment can go too
                    self._journal.end_segment()
                    idle = not self._move()
            except Exception as error:
                self._fail(error)
                # What comes back may be another server, or an empty one.
                self._database.close()
                self._migrated = False
                if last:
                    return
                self._wait(delay * random.uniform(0.5, 1.0))
                delay = min(2 * delay, longest)
                continue
            if self.failing:
                logger.info("records of experiments reach %s again", self._database.name)
            self.failing, delay = False, shortest
            with self._round:
                self._round.notify_all()
            if idle:
                if last:
                    return
                self._wait(POLL_SECONDS)

    def _move(self) -> bool:
        """Move one batch. False if there was nothing to do."""
        if not self._migrated:
            self._database.migrate()
            self._migrated = True
        if self._batch is None:
            self._batch = self._reader.read(BATCH)
        batch = self._batch
        if batch.records:
            lines = {record.id: line for record, line in batch.records}
            for record, reason in self._database.write([record for record, _ in batch.records]):
                self._journal.reject(lines[record.id], reason)
        for line, reason in batch.unreadable:
            self._journal.reject(line, reason)
        for segment in batch.ended:
            segment.unlink(missing_ok=True)
        self._batch = None
        self._moved += batch.lines
        if batch.lines < BATCH:
            if batch.lines or not self.pending:
                self._level = time.monotonic()
            self._sweep()
        return batch.lines > 0

    def _sweep(self) -> None:
        """Delete what is too old, now and then."""
        if self._retention_days is None or time.monotonic() - self._swept < RETENTION_SECONDS:
            return
        deleted = self._database.delete_answers(time.time() - self._retention_days * DAY)
        self._swept = time.monotonic()
        if deleted:
            logger.info("deleted %d answers of experiments, older than %g days",
                        deleted, self._retention_days)  # fmt: skip

    def _fail(self, error: Exception) -> None:
        if not self.failing:  # once, not at each attempt
            logger.error(
                "records of experiments wait in %s: %s", self._journal.folder, error,
                exc_info=None if isinstance(error, DatabaseError) else error,
            )  # fmt: skip
        self.failing = True

    def _wait(self, seconds: float) -> None:
        if self._until is None:
            self._wake.wait(seconds)
            self._wake.clear()
