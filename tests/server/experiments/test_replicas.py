"""Servers that share a database: what one does the others do, and a database that hangs keeps
nobody but its readers."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest

from server.experiments import recording
from server.experiments.database import DatabaseError
from server.experiments.reading import Reading
from server.experiments.registry import Stop
from server.experiments.store import Records
from server.hosting import Host
from tests.server.experiments.records import make_records
from tests.server.experiments.trials import ARMS, Tripwire, experiment, hosting, unit_in
from tests.server.fakes import body, post
from tests.server.live import live_server, wait_until

THREE = experiment(arms=[*ARMS, {"name": "third", "profile": "shy"}])
TREATED = unit_in(THREE, "treated")
RAILED = experiment(guard_rails=[{"metric": "refusal", "limit": 0.1}])


def replica(folder: Path, name: str, what: Any = THREE) -> Host:
    """A host with a journal of its own and the database that all share."""
    host = hosting(what)
    host.records = make_records(folder / name, f"sqlite:///{folder / 'shared.sqlite'}")
    return host


def arm_of(address: str, user: str = TREATED) -> Any:
    payload = body(model="tiny@trial", user=user)
    response = httpx2.post(f"{address}/v1/chat/completions", json=payload, timeout=30)
    assert response.status_code == 200, response.text
    return response.json()["steering"]["arm"]


def share(address: str, arm: str) -> float:
    name = f'steering_experiment_arm_share_ratio{{arm="{arm}",experiment="trial"}} '
    lines = httpx2.get(f"{address}/metrics").text.splitlines()
    [line] = [line for line in lines if line.startswith(name)]
    return float(line.removeprefix(name))


def test_what_one_replica_does_the_others_do_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "FOLLOW_SECONDS", 0.05)
    one, other = replica(tmp_path, "one"), replica(tmp_path, "other")
    with live_server(one) as first, live_server(other) as second:
        assert arm_of(first) == arm_of(second) == "treated"
        assert share(second, "treated") == pytest.approx(1 / 3)
        stopped = httpx2.post(f"{first}/v1/experiments/trial/stop", json={"arm": "treated"})
        assert stopped.status_code == 200
        wait_until(lambda: arm_of(second) is None)
        assert [share(each, "treated") for each in (first, second)] == [0, 0]
        assert share(second, "third") == pytest.approx(1 / 2)
        card = httpx2.get(f"{second}/v1/experiments/trial").json()
        assert card["status"] == "running" and card["arms"][1]["stopped"]["kind"] == "stopped"
        assert httpx2.delete(f"{second}/v1/experiments/trial").status_code == 200
        wait_until(lambda: one.experiments.status(one.experiments.find("trial")) == "ended")


def test_a_replica_that_follows_bears_a_database_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(recording, "FOLLOW_SECONDS", 0.01)
    one, other = replica(tmp_path, "one"), replica(tmp_path, "other")
    events, down, asked = other.records.events, True, 0

    def unless_down(*of: Any) -> Any:
        nonlocal asked
        asked += 1
        if down:
            raise DatabaseError("nobody listens")
        return events(*of)

    monkeypatch.setattr(other.records, "events", unless_down)
    with live_server(one) as first, live_server(other) as second:
        wait_until(lambda: asked > 5)
        httpx2.post(f"{first}/v1/experiments/trial/stop", json={"arm": "treated"})
        assert arm_of(second) == "treated"
        assert caplog.text.count("its records cannot be read: nobody listens") == 1
        down = False
        wait_until(lambda: arm_of(second) is None)


def test_a_guard_that_could_not_be_shown_the_records_sees_them_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "FOLLOW_SECONDS", 0.01)
    first = replica(tmp_path, "one", RAILED)
    first.make_guard = Tripwire("treated", after=100).maker
    user = unit_in(RAILED, "treated")
    for _ in range(3):
        post(body(model="tiny@trial", user=user), host=first)
    second = replica(tmp_path, "one", RAILED)
    guards: list[Tripwire] = []

    def make_guard(_: Any) -> Tripwire:
        guards.append(Tripwire("treated", after=5))
        return guards[-1]

    second.make_guard = make_guard
    read, down = second.records.answers, True

    def unless_down(*of: Any) -> Any:
        if down:
            raise DatabaseError("nobody listens")
        return read(*of)

    monkeypatch.setattr(second.records, "answers", unless_down)
    with live_server(second) as address:
        assert arm_of(address, user) == "treated"
        assert len(guards[-1].fed) == 1
        down = False
        wait_until(lambda: len(guards) == 2 and len(guards[-1].fed) == 4)
        assert arm_of(address, user) == "treated"
        assert arm_of(address, user) is None  # the fifth of all stopped it


@pytest.fixture
def hanging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    """A host whose database takes every question and answers none, until the test is over."""
    monkeypatch.setattr(recording, "START_SECONDS", 0.2)
    monkeypatch.setattr(recording, "Reading", partial(Reading, seconds=1.0))
    host, over = replica(tmp_path, "one"), threading.Event()
    records = host.records
    assert isinstance(records, Records) and records.database is not None

    def hang(*_: Any) -> Any:
        over.wait(60)
        raise DatabaseError("the connection was closed")

    for method in ("write", "answers", "events", "migrate"):
        monkeypatch.setattr(records.database, method, hang)
    monkeypatch.setattr("server.experiments.store.CLOSE_SECONDS", 0.5)
    yield host
    over.set()


def test_a_database_that_hangs_holds_up_no_answer_and_no_end(hanging: Host) -> None:
    records, began = hanging.records, time.monotonic()
    with live_server(hanging) as address, ThreadPoolExecutor(40) as pool:
        # More than asyncio has threads for templates and tokenisers.
        report = f"{address}/v1/experiments/trial/report"
        reports = [pool.submit(httpx2.get, report, timeout=60) for _ in range(40)]
        time.sleep(0.3)
        assert arm_of(address) == "treated"
        assert httpx2.get(f"{address}/health").json()["status"] == "ok"
        for task in reports:
            error = task.result().json()["error"]
            assert (task.result().status_code, error["code"]) == (503, "records_unavailable")
        assert arm_of(address) == "treated"
        assert records.pending == 3  # two answers, and the event of its beginning
    assert time.monotonic() - began < 30


def test_readers_are_few_and_come_back() -> None:
    async def run() -> None:
        reading, over = Reading(most=2, seconds=0.05), threading.Event()
        for _ in range(4):
            with pytest.raises(Exception, match="takes too long"):
                await reading.run(over.wait)
        assert sum(t.name == "experiment-reading" for t in threading.enumerate()) == 2
        over.set()
        reading.seconds = 20.0
        assert await asyncio.gather(*(reading.run(lambda: 1) for _ in range(5))) == [1] * 5
        with pytest.raises(ZeroDivisionError):
            await reading.run(lambda: 1 / 0)

    asyncio.run(run())


def test_shares_are_of_the_arms_that_are_left() -> None:
    registry = hosting(THREE).experiments
    assert registry.find("trial").shares == pytest.approx(
        {"control": 1 / 3, "treated": 1 / 3, "third": 1 / 3}
    )
    registry.stop("trial", 1, "treated", Stop(0.0, "stopped"))
    assert registry.find("trial").shares == {"control": 0.5, "treated": 0.0, "third": 0.5}
