"""The records of experiments in a real PostgreSQL."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.experiments.database import Database
from tests.server.experiments.contract import *  # noqa: F403
from tests.server.experiments.records import (
    answer,
    kill_after,
    make_records,
    writing_process,
)
from tests.server.live import wait_until
from tests.services.conftest import Postgres


@pytest.fixture
def url(postgres: Postgres) -> str:
    return postgres.new_database()


def test_it_is_really_postgresql(url: str) -> None:
    database = Database(url)
    with database.engine.connect() as connection:
        version = connection.exec_driver_sql("SELECT version()").scalar_one()
    assert version.startswith("PostgreSQL")
    database.close()


def test_a_postgresql_that_dies_and_comes_back_gets_everything_once(
    postgres: Postgres, url: str, tmp_path: Path
) -> None:
    records = make_records(tmp_path / "journal", url)
    records.start()
    records.append(answer(0))
    assert records.flush(60)
    postgres.stop()
    try:
        for i in range(1, 1001):
            records.append(answer(i))
        wait_until(lambda: records.state == "failing")
        assert records.pending == 1000 and records.lost == 0
    finally:
        postgres.start()
    wait_until(lambda: records.pending == 0, 60)
    assert list(records.answers("tone", 1)) == [answer(i) for i in range(1001)]
    wait_until(lambda: records.state == "ok")
    records.close()


def test_one_of_two_replicas_is_killed_and_nothing_is_missing(url: str, tmp_path: Path) -> None:
    other = writing_process(tmp_path / "other", url, 10**6, 10**6 + 1500)
    acknowledged = kill_after(writing_process(tmp_path / "killed", url), 900)
    other.communicate(timeout=120)
    assert other.returncode == 0
    again = make_records(tmp_path / "killed", url)
    again.start()
    assert again.flush(60)
    found = [int(record.id.removeprefix("chatcmpl-")) for record in again.answers("tone", 1)]
    again.close()
    assert len(found) == len(set(found))
    assert {i for i in found if i >= 10**6} == set(range(10**6, 10**6 + 1500))
    mine = {i for i in found if i < 10**6}
    assert set(acknowledged) <= mine and len(mine) <= len(acknowledged) + 1
