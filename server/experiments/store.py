"""The records of experiments as the rest of the server sees them.

    append -> journal (a local folder) -> writer's thread -> database -> reports

Only the journal stands between an answer and its client. Without SQLAlchemy (the extra
`experiments`) there is no database, and reports read the journal.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from server.errors import UnavailableError
from server.experiments.journal import Journal, Record
from server.experiments.records import AnswerRecord, EventRecord
from server.settings import Settings, load_settings

if TYPE_CHECKING:
    from server.experiments.database import Database
    from server.experiments.writer import DatabaseWriter

logger = logging.getLogger(__name__)

State = Literal["ok", "behind", "failing", "off"]
DATABASE_FILE = "records.sqlite"
CLOSE_SECONDS = 5.0
_R = TypeVar("_R", AnswerRecord, EventRecord)


class Records:
    """What is kept of answers and events.

    Args:
        database, writer: without them the journal is all there is.
        with_text: keep prompts and replies; else `append` drops them.
    """

    def __init__(
        self,
        journal: Journal,
        database: Database | None = None,
        writer: DatabaseWriter | None = None,
        *,
        with_text: bool = False,
    ) -> None:
        self.journal = journal
        self.database = database
        self.with_text = with_text
        self._writer = writer
        self._started = False

    def start(self) -> None:
        """Start moving records to the database, those of an earlier run first."""
        if not self._started and self._writer is not None:
            self._writer.start()
        self._started = True

    def append(self, record: Record) -> None:
        """Keep a record: in the kernel's hands when this returns. Quick, and raises nothing."""
        if isinstance(record, AnswerRecord) and not self.with_text:
            record = replace(record, prompt=None, reply=None)
        self.journal.append(record)

    def flush(self, seconds: float = CLOSE_SECONDS) -> bool:
        """Wait until all that was appended can be read; False if that takes too long."""
        return self._writer is None or not self._started or self._writer.flush(seconds)

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Move what is left to the database and stop. What could not be moved, and what is
        appended later, is moved at the next start."""
        if self._writer is not None:
            self._writer.close(seconds)
        self._started = False
        self.journal.close()
        if self.database is not None:
            self.database.close()

    def answers(self, experiment: str, version: int) -> Iterator[AnswerRecord]:
        """The answers of one version in order of time, each once; those just appended too, unless
        the database is behind. Blocks: call it off the event loop.

        Raises UnavailableError, while iterating too, where the database cannot be read.
        """
        if self.database is None:
            return self._read(AnswerRecord, experiment, version)
        self.flush(1.0)
        return _reading(self.database.answers(experiment, version))

    def events(self, experiment: str, version: int) -> Iterator[EventRecord]:
        """The events of one version, as `answers`."""
        if self.database is None:
            return self._read(EventRecord, experiment, version)
        self.flush(1.0)
        return _reading(self.database.events(experiment, version))

    def latest_version(self, experiment: str) -> int:
        """The highest version of which there are records; 0 without any. Blocks.

        Raises UnavailableError.
        """
        if self.database is None:
            versions = (r.version for r in self.journal.read() if r.experiment == experiment)
            return max(versions, default=0)
        self.flush(1.0)
        with _readable():
            return self.database.latest_version(experiment)

    @property
    def state(self) -> State:
        """`off` without a database; `failing` while it does not answer or records are lost;
        `behind` while records wait for it longer than they should."""
        if self.journal.failing:
            return "failing"
        return "off" if self._writer is None else self._writer.state

    @property
    def pending(self) -> int:
        """Records that wait for the database."""
        return 0 if self._writer is None else self._writer.pending

    @property
    def lost(self) -> int:
        """Records since the start that could not be kept."""
        return self.journal.lost

    def on_lost(self, callback: Callable[[], None]) -> None:
        """Have this called, in any thread, for each record that is lost from now on."""
        self.journal.on_lost = callback

    def _read(self, kind: type[_R], experiment: str, version: int) -> Iterator[_R]:
        found = {
            record.id: record
            for record in self.journal.read()
            if isinstance(record, kind)
            and (record.experiment, record.version) == (experiment, version)
        }
        return iter(sorted(found.values(), key=lambda record: (record.time, record.id)))


def open_records(settings: Settings) -> Records | None:
    """The records as the settings ask, not yet started; None if they ask for none.

    Raises ValueError for settings that cannot work. A database that is down is none of those.
    """
    folder, days = settings.experiments_journal, settings.experiments_retention_days
    if folder is None:
        return None
    database = _open_database(settings)
    try:
        journal = Journal(
            folder,
            fsync=settings.experiments_fsync,
            keep_days=days if database is None else None,
        )
    except OSError as error:
        raise ValueError(f"cannot write --experiments-journal {folder}: {error.strerror}") from None
    writer = None
    if database is not None:
        from server.experiments.writer import DatabaseWriter

        writer = DatabaseWriter(journal, database, retention_days=days)
    return Records(journal, database, writer, with_text=settings.experiments_text)


def database_of(url: str | None = None, config: Path | None = None) -> Database:
    """The database of a server that would start with these flags, for commands beside it.

    Raises ValueError if there is none.
    """
    given: dict[str, Any] = {"experiments_db": url, "config": config}
    if url is not None:
        given["experiments_journal"] = os.curdir  # which is not touched
    settings = load_settings({name: value for name, value in given.items() if value is not None})
    if settings.experiments_journal is None:
        raise ValueError("name a database with --experiments-db")
    if missing := _missing():
        raise ValueError(missing)
    return _make_database(settings)


def _open_database(settings: Settings) -> Database | None:
    if (missing := _missing()) is None:
        return _make_database(settings)
    if settings.experiments_db is not None:
        raise ValueError(f"--experiments-db cannot be used: {missing}")
    logger.warning(
        "records of experiments stay in %s, without a database: %s",
        settings.experiments_journal, missing,
    )  # fmt: skip
    return None


def _missing() -> str | None:
    """What to install for a database, if anything."""
    for name in ("sqlalchemy", "alembic"):
        if find_spec(name) is None:
            return f"{name} is not installed: pip install 'pilothouse[experiments]'"
    return None


def _make_database(settings: Settings) -> Database:
    from server.experiments.database import Database, sqlite_url

    folder = settings.experiments_journal
    assert folder is not None
    if settings.experiments_db is not None:
        return Database(settings.experiments_db)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write --experiments-journal {folder}: {error.strerror}") from None
    return Database(sqlite_url(folder / DATABASE_FILE))


def _reading(records: Iterator[_R]) -> Iterator[_R]:
    with _readable():
        yield from records


@contextmanager
def _readable() -> Iterator[None]:
    from server.experiments.database import DatabaseError

    try:
        yield
    except DatabaseError as error:
        logger.error("records of experiments cannot be read: %s", error)
        raise UnavailableError(
            "The records of experiments cannot be read now.", code="records_unavailable"
        ) from None
