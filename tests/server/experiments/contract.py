"""What holds of the records' database whichever it is. Collected for SQLite in
test_database.py and for PostgreSQL in tests/services: `url` is an empty database."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path

import alembic.autogenerate
import pytest
import sqlalchemy as sa
from alembic.migration import MigrationContext

from server.experiments.database import (
    PAGE,
    VERSION_TABLE,
    Database,
    DatabaseError,
    SeenExperiment,
    metadata,
)
from tests.server.experiments.records import (
    answer,
    event,
    kill_after,
    make_records,
    writing_process,
)


def test_records_come_back_as_they_went_in(url: str) -> None:
    database = Database(url)
    database.migrate()
    full = answer(1, strength=0.5, prompt="é\n🙂", reply="", answer_probability=1.0)
    bare = answer(
        2, outcome=None, ttft_seconds=None, refusal_score=None, benign_probability=None,
        sticky=False, finish_reason="error",
    )  # fmt: skip
    assert database.write([bare, full, event()]) == []
    assert list(database.answers("tone", 1)) == [full, bare]
    assert list(database.events("tone", 1)) == [event()]
    assert not list(database.answers("tone", 2)) and not list(database.events("other", 1))
    database.close()


def test_writing_a_record_again_changes_nothing(url: str) -> None:
    database = Database(url)
    database.migrate()
    database.write([answer(1), answer(1), event(1)])
    database.write([answer(1, arm="other"), answer(2), event(1)])
    assert list(database.answers("tone", 1)) == [answer(1), answer(2)]
    assert list(database.events("tone", 1)) == [event(1)]
    database.close()


def test_the_latest_version_is_of_answers_and_events(url: str) -> None:
    database = Database(url)
    database.migrate()
    assert database.latest_version("tone") == 0
    database.write([answer(1), answer(2, version=2), event(1, version=3)])
    database.write([answer(3, experiment="other", version=9)])
    assert database.latest_version("tone") == 3
    assert database.latest_version("other") == 9
    database.close()


def test_pages_are_seamless_where_times_are_equal(url: str) -> None:
    database = Database(url)
    database.migrate()
    expected = [answer(i, time=1e9 + i // 7) for i in range(2 * PAGE + 3)]
    database.write(expected[::-1])
    assert list(database.answers("tone", 1)) == expected
    database.close()


def test_it_says_which_experiments_there_are(url: str) -> None:
    database = Database(url)
    database.migrate()
    database.write(
        [
            *(answer(i) for i in range(1, 5)),
            answer(5, arm="b", kind="shadow", pair="chatcmpl-000001"),
            answer(6, version=2),
        ]
    )
    start = answer(0).time
    assert database.experiments() == [
        SeenExperiment("tone", 1, start + 1, start + 5, 5),
        SeenExperiment("tone", 2, start + 6, start + 6, 1),
    ]
    database.close()


def test_old_answers_go_and_events_stay(url: str) -> None:
    database = Database(url)
    database.migrate()
    database.write([answer(i) for i in range(PAGE + 5)] + [event(0)])
    assert database.delete_answers(answer(PAGE + 3).time) == PAGE + 3
    assert list(database.answers("tone", 1)) == [answer(PAGE + 3), answer(PAGE + 4)]
    assert list(database.events("tone", 1)) == [event(0)]
    database.close()


def test_a_record_that_is_refused_keeps_no_other_from_being_written(url: str) -> None:
    database = Database(url)
    database.migrate()
    broken = replace(answer(2), arm=None)  # type: ignore[arg-type]
    ((refused, reason),) = database.write([answer(1), broken, answer(3)])
    assert refused is broken and "null" in reason.lower()
    assert list(database.answers("tone", 1)) == [answer(1), answer(3)]
    database.close()


def test_migrations_make_the_tables_that_the_code_uses(url: str) -> None:
    database = Database(url)
    database.migrate()
    with database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
        assert alembic.autogenerate.compare_metadata(context, metadata) == []
    database.close()


def test_a_database_in_use_is_migrated_without_loss(url: str) -> None:
    database = Database(url)
    with database.engine.begin() as connection:  # of somebody else
        connection.execute(sa.text("CREATE TABLE alembic_version (version_num TEXT)"))
        connection.execute(sa.text("INSERT INTO alembic_version VALUES ('theirs')"))
    database.migrate()
    database.write([answer(1)])
    database.migrate()
    assert list(database.answers("tone", 1)) == [answer(1)]
    with database.engine.connect() as connection:
        found = connection.execute(sa.text("SELECT version_num FROM alembic_version")).all()
    assert [tuple(row) for row in found] == [("theirs",)]
    database.close()


def test_a_database_of_a_newer_version_is_left_alone(url: str) -> None:
    database = Database(url)
    database.migrate()
    with database.engine.begin() as connection:
        connection.execute(sa.text(f"UPDATE {VERSION_TABLE} SET version_num = '9999'"))
    with pytest.raises(DatabaseError, match="another version of pilothouse"):
        database.migrate()
    database.close()


def test_replicas_that_start_at_once_migrate_once(url: str) -> None:
    databases = [Database(url) for _ in range(4)]
    errors: list[BaseException] = []

    def migrate(database: Database) -> None:
        try:
            database.migrate()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=migrate, args=(database,)) for database in databases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    databases[0].write([answer(1)])
    assert list(databases[1].answers("tone", 1)) == [answer(1)]
    for database in databases:
        database.close()


def test_what_a_killed_process_acknowledged_is_there_exactly_once(url: str, tmp_path: Path) -> None:
    acknowledged = kill_after(writing_process(tmp_path / "journal", url), 700)
    records = make_records(tmp_path / "journal", url)
    records.start()
    assert records.flush(60)
    found = [record.id for record in records.answers("tone", 1)]
    records.close()
    assert len(found) == len(set(found))
    assert {answer(i).id for i in acknowledged} <= set(found)
    # The kill may have come between a record and its acknowledgement.
    assert len(found) <= len(acknowledged) + 1
    assert not list((tmp_path / "journal").glob("*.jsonl"))


def test_two_processes_write_to_one_database(url: str, tmp_path: Path) -> None:
    processes = [
        writing_process(tmp_path / str(i), url, 1000 * i, 1000 * i + 600) for i in range(2)
    ]
    for process in processes:
        process.communicate(timeout=120)
        assert process.returncode == 0
    database = Database(url)
    expected = [answer(1000 * i + j) for i in range(2) for j in range(600)]
    assert list(database.answers("tone", 1)) == expected
    database.close()
    assert not list(tmp_path.glob("*/*.jsonl"))


def test_retention_deletes_what_is_too_old(url: str, tmp_path: Path) -> None:
    now = time.time()
    records = make_records(tmp_path / "journal", url, retention_days=2)
    records.append(answer(1, time=now - 3 * 86400))
    records.append(answer(2, time=now - 1 * 86400))
    records.start()
    records.close(60)  # the first sweep comes when all is moved
    database = Database(url)
    assert [record.id for record in database.answers("tone", 1)] == [answer(2).id]
    database.close()
