"""The records' database, as SQLite, and what URLs it takes."""

from __future__ import annotations

import sqlite3
import stat
import sys
from pathlib import Path

import pytest

from server.experiments.database import Database, DatabaseError
from tests.server.experiments.contract import *  # noqa: F403
from tests.server.experiments.records import answer


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'records.sqlite'}"


def test_sqlite_keeps_a_log_and_commits_to_disk(url: str, tmp_path: Path) -> None:
    database = Database(url)
    database.migrate()
    with database.engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2  # FULL
    database.close()
    assert stat.S_IMODE((tmp_path / "records.sqlite").stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "url, says",
    [
        ("records.sqlite", "no URL"),
        ("mysql://me:secret@host/db", "only sqlite and postgresql"),
        ("postgresql+asyncpg://me:secret@host/db", "only sqlite and postgresql"),
        ("sqlite://", "needs a file"),
        ("sqlite:///:memory:", "needs a file"),
        ("sqlite:////no/such/folder/x.sqlite", "there is no folder /no/such/folder"),
        ("postgresql://me:secret@host:port/db", "no URL"),
    ],
)
def test_a_url_that_cannot_work_is_one_line_without_its_password(url: str, says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        Database(url)
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)


def test_postgresql_without_its_driver_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ValueError, match=r"pip install 'pilothouse\[postgres\]'"):
        Database("postgresql://host/db")


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg"])
def test_a_database_that_is_down_is_an_error_without_values_or_password(scheme: str) -> None:
    database = Database(f"{scheme}://me:secret@127.0.0.1:1/db")
    with pytest.raises(DatabaseError) as caught:
        database.write([answer(1)])
    assert "chatcmpl" not in str(caught.value) and "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)
    database.close()


def test_a_locked_sqlite_is_an_error_and_loses_nothing(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = Database(url)
    database.migrate()
    with database.engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA busy_timeout = 0")  # stays with the pooled connection
    other = sqlite3.connect(tmp_path / "records.sqlite")
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(DatabaseError, match="locked"):
        database.write([answer(1)])
    other.rollback()
    other.close()
    database.write([answer(1)])
    assert list(database.answers("tone", 1)) == [answer(1)]
    database.close()


def test_the_journal_works_without_the_extra() -> None:
    """Nothing that the server imports needs SQLAlchemy."""
    import subprocess

    code = (
        "import sys; sys.modules['sqlalchemy'] = sys.modules['alembic'] = None;"
        "import server.hosting, server.app, server.experiments.store"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
