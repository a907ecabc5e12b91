"""The database of answers and events: SQLite, or PostgreSQL where several replicas share it.

Needs SQLAlchemy and Alembic (the extra `experiments`; `postgres` for the driver of PostgreSQL).
Records are inserted by id, and one that is there already stays as it is.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import (
    ArgumentError,
    DataError,
    DBAPIError,
    IntegrityError,
    SQLAlchemyError,
    StatementError,
)

from server.experiments.journal import Record
from server.experiments.records import AnswerRecord, EventRecord

logger = logging.getLogger(__name__)

PAGE = 1000
"""Rows that are read, or deleted, in one statement."""

VERSION_TABLE = "experiment_schema_version"
_MIGRATION_LOCK = 0x70696C6F74  # "pilot", as a key of PostgreSQL's advisory locks
_MIGRATING = threading.Lock()  # Alembic's environment is one per process

metadata = sa.MetaData()

answers = sa.Table(
    "experiment_answers",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("time", sa.Double, nullable=False, index=True),
    sa.Column("experiment", sa.Text, nullable=False),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("arm", sa.Text, nullable=False),
    sa.Column("unit", sa.Text, nullable=False),
    sa.Column("sticky", sa.Boolean, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("pair", sa.Text, nullable=False),
    sa.Column("request_id", sa.Text, nullable=False),
    sa.Column("profile", sa.Text, nullable=False),
    sa.Column("fingerprint", sa.Text, nullable=False),
    sa.Column("strength", sa.Double),
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("weights", sa.Text, nullable=False),
    sa.Column("prompt_class", sa.Text, nullable=False),
    sa.Column("benign_probability", sa.Double),
    sa.Column("refusal_score", sa.Double),
    sa.Column("answer_probability", sa.Double),
    sa.Column("outcome", sa.Text),
    sa.Column("judge", sa.Text, nullable=False),
    sa.Column("finish_reason", sa.Text, nullable=False),
    sa.Column("prompt_tokens", sa.Integer, nullable=False),
    sa.Column("completion_tokens", sa.Integer, nullable=False),
    sa.Column("ttft_seconds", sa.Double),
    sa.Column("duration_seconds", sa.Double, nullable=False),
    sa.Column("prompt", sa.Text),
    sa.Column("reply", sa.Text),
    sa.Index("ix_experiment_answers_order", "experiment", "version", "time", "id"),
)

events = sa.Table(
    "experiment_events",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("time", sa.Double, nullable=False),
    sa.Column("experiment", sa.Text, nullable=False),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("arm", sa.Text),
    sa.Column("detail", sa.JSON, nullable=False),
    sa.Index("ix_experiment_events_order", "experiment", "version", "time", "id"),
)


class DatabaseError(OSError):
    """The database cannot be used now; it may be later."""


@dataclass(frozen=True)
class SeenExperiment:
    """A version of an experiment of which there are answers.

    Args:
        first, last: seconds since 1970.
        answers: shadows among them.
    """

    experiment: str
    version: int
    first: float
    last: float
    answers: int


class Database:
    """Where the records of all replicas come together. Nothing is connected before it is used.

    Args:
        url: `sqlite:///relative.sqlite`, `sqlite:////absolute.sqlite`, or
            `postgresql://user:password@host/name`.

    Raises ValueError for any other URL and for a driver that is not installed. Methods raise
    DatabaseError where the database does not do as asked.
    """

    def __init__(self, url: str) -> None:
        self._url = _parse(url)
        self._opened: tuple[int, int] | None = None
        """Device and inode of SQLite's file, as the last migration left it."""
        if self._url.get_backend_name() == "sqlite":
            self.engine = sa.create_engine(self._url, hide_parameters=True)
            sa.event.listen(self.engine, "connect", _configure_sqlite)
            self._insert: Any = sqlite.insert
        else:
            self.engine = sa.create_engine(
                self._url,
                hide_parameters=True,  # errors are logged
                pool_pre_ping=True,
                pool_timeout=5,
                # A host that vanished must not hold the writer for hours. Poolers in between know
                # nothing of prepared statements.
                connect_args={
                    "connect_timeout": 5,
                    "tcp_user_timeout": 20_000,
                    "keepalives_idle": 10,
                    "keepalives_interval": 5,
                    "keepalives_count": 3,
                    "prepare_threshold": None,
                },
            )
            self._insert = postgresql.insert

    @property
    def name(self) -> str:
        """The URL without its password."""
        return self._url.render_as_string(hide_password=True)

    def migrate(self) -> None:
        """Bring the tables up to date; one process at a time does."""
        # Alembic tells what it is about to load, at every start.
        logging.getLogger("alembic").setLevel(logging.WARNING)
        import alembic.command
        from alembic.config import Config
        from alembic.util import CommandError

        if self._url.get_backend_name() == "sqlite":
            # SQLite would let others read it.
            os.close(os.open(str(self._url.database), os.O_RDWR | os.O_CREAT, 0o600))
            self._opened = _inode(str(self._url.database))
        with _MIGRATING, self._using(), self.engine.connect() as connection:
            if self.engine.dialect.name == "sqlite":
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            else:
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
            config = Config()
            config.set_main_option("script_location", "server.experiments:migrations")
            config.attributes["connection"] = connection
            try:
                alembic.command.upgrade(config, "head")
            except CommandError as error:
                raise DatabaseError(
                    f"{self.name} was made by another version of pilothouse: {error}"
                ) from None
            connection.commit()

    def write(self, records: Sequence[Record]) -> list[tuple[Record, str]]:
        """Insert what is not there yet; committed to disk when this returns.

        Returns the records that the database refuses and always will, and why. The others are in
        it.
        """
        with self._using():
            try:
                self._write(records)
            except (StatementError, ValueError, OverflowError) as error:
                if not _is_about_values(error):
                    raise
                if len(records) == 1:
                    return [(records[0], _reason(error))]
            else:
                return []
        return [refused for record in records for refused in self.write([record])]

    def _write(self, records: Sequence[Record]) -> None:
        with self.engine.begin() as connection:
            for table, kind in ((answers, AnswerRecord), (events, EventRecord)):
                rows = [record.to_json() for record in records if isinstance(record, kind)]
                if rows:
                    insert = self._insert(table).on_conflict_do_nothing(index_elements=["id"])
                    connection.execute(insert, rows)
        # SQLite writes on into a file that was removed, and all of it is gone at the end.
        if self._opened is not None and _inode(str(self._url.database)) != self._opened:
            raise DatabaseError(f"{self.name}: its file was removed, or replaced by another")

    def answers(self, experiment: str, version: int) -> Iterator[AnswerRecord]:
        """The answers of one version in order of time, read page by page: an iterator that is left
        alone holds no connection."""
        return map(AnswerRecord.from_json, self._pages(answers, experiment, version))

    def events(self, experiment: str, version: int) -> Iterator[EventRecord]:
        """The events of one version, in order of time."""
        return map(EventRecord.from_json, self._pages(events, experiment, version))

    def latest_version(self, experiment: str) -> int:
        """The highest version of which there are records; 0 without any."""
        with self._using(), self.engine.connect() as connection:
            found = [
                connection.scalar(
                    sa.select(sa.func.max(table.c.version)).where(table.c.experiment == experiment)
                )
                for table in (answers, events)
            ]
        return max(version or 0 for version in found)

    def experiments(self) -> list[SeenExperiment]:
        """Every version of which there are answers, by name."""
        query = (
            sa.select(
                answers.c.experiment,
                answers.c.version,
                sa.func.min(answers.c.time),
                sa.func.max(answers.c.time),
                sa.func.count(),
            )
            .group_by(answers.c.experiment, answers.c.version)
            .order_by(answers.c.experiment, answers.c.version)
        )
        with self._using(), self.engine.connect() as connection:
            return [SeenExperiment(*row) for row in connection.execute(query)]

    def delete_answers(self, before: float) -> int:
        """Delete the answers older than a time (seconds since 1970), a page per transaction.

        Returns how many there were. Events stay: they hold nothing of anybody, and say which arms
        were stopped.
        """
        old = sa.select(answers.c.id).where(answers.c.time < before).limit(PAGE)
        deleted = 0
        with self._using():
            while True:
                with self.engine.begin() as connection:
                    result = connection.execute(sa.delete(answers).where(answers.c.id.in_(old)))
                if result.rowcount <= 0:
                    return deleted
                deleted += result.rowcount

    def close(self) -> None:
        self.engine.dispose()

    def _pages(self, table: sa.Table, experiment: str, version: int) -> Iterator[dict[str, Any]]:
        columns = table.c
        query = (
            sa.select(table)
            .where(columns.experiment == experiment, columns.version == version)
            .order_by(columns.time, columns.id)
            .limit(PAGE)
        )
        page = query
        while True:
            with self._using(), self.engine.connect() as connection:
                rows = connection.execute(page).all()
            for row in rows:
                yield dict(row._mapping)
            if len(rows) < PAGE:
                return
            page = query.where(
                sa.tuple_(columns.time, columns.id) > sa.tuple_(rows[-1].time, rows[-1].id)
            )

    @contextmanager
    def _using(self) -> Iterator[None]:
        try:
            yield
        except SQLAlchemyError as error:
            raise DatabaseError(f"{self.name}: {_reason(error)}") from None


def _inode(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def sqlite_url(path: Path) -> str:
    return str(sa.URL.create("sqlite", database=str(path)))


def _parse(text: str) -> sa.URL:
    """Raises ValueError. No message repeats the text, which may hold a password."""
    try:
        url = sa.make_url(text)
    except (ArgumentError, ValueError):
        raise ValueError(
            "--experiments-db is no URL: write sqlite:///file or postgresql://user@host/name"
        ) from None
    if url.drivername in ("postgres", "postgresql", "postgresql+psycopg"):
        try:
            import psycopg  # noqa: F401
        except ImportError as error:
            raise ValueError(
                "--experiments-db names a PostgreSQL, whose driver is missing: "
                f"pip install 'pilothouse[postgres]' ({error})"
            ) from None
        return url.set(drivername="postgresql+psycopg")
    if url.drivername not in ("sqlite", "sqlite+pysqlite"):
        raise ValueError(
            f"--experiments-db {url.drivername}: only sqlite and postgresql are supported"
        )
    if not url.database or ":memory:" in url.database:
        raise ValueError("--experiments-db needs a file, as in sqlite:///records.sqlite")
    folder = Path(url.database).absolute().parent
    if not folder.is_dir():
        raise ValueError(f"--experiments-db: there is no folder {folder}")
    return url.set(drivername="sqlite+pysqlite")


def _configure_sqlite(connection: Any, _: Any) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA busy_timeout = 10000")
    # Readers do not wait for the writer; and a commit is on the disk before the journal forgets it.
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA synchronous = FULL")
    cursor.close()


def _is_about_values(error: Exception) -> bool:
    """True where the statement can never succeed with these values."""
    return isinstance(error, DataError | IntegrityError) or not isinstance(error, DBAPIError)


def _reason(error: Exception) -> str:
    """One line, without the statement and its values."""
    original = error.orig if isinstance(error, DBAPIError) else error
    return " ".join(str(original).split()) or type(error).__name__
