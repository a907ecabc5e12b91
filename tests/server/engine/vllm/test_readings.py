"""Reports on their way from workers to requests."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import pytest
import zmq

from server.engine.base import StepFailedError
from server.engine.vllm.readings import Inbox
from server.engine.vllm.reports import Receiver, Sender


def part(key: str, reply: int, **read: float) -> dict[str, Any]:
    return {"key": key, "reply": reply, "read": read}


def test_stages_are_put_together_and_the_first_report_of_each_counts() -> None:
    async def run() -> tuple[dict[str, float], dict[str, float]]:
        inbox = Inbox(stages=2)
        with inbox.opened() as readings:
            waiting = asyncio.create_task(readings.of(0))
            inbox.take(part(readings.key, 1, norm=9.0, late=1.0))
            inbox.take(part(readings.key, 0, norm=1.0, a=1.0))
            await asyncio.sleep(0)
            assert not waiting.done()
            inbox.take(part(readings.key, 0, norm=2.0, b=2.0))
            inbox.take(part(readings.key, 0, norm=5.0, a=7.0))  # resumed
            inbox.take(part(readings.key, 1, norm=0.0))
            return await waiting, await readings.of(1)

    first, second = asyncio.run(run())
    assert first == {"norm": 2.0, "a": 1.0, "b": 2.0}
    assert second == {"norm": 9.0, "late": 1.0}


@pytest.mark.parametrize("told_first", [False, True])
def test_a_request_whose_edits_were_not_applied_is_not_answered(told_first: bool) -> None:
    """Whether its token or the worker's word comes first."""

    async def run() -> None:
        inbox = Inbox(stages=1)
        with inbox.opened() as readings:
            readings.raise_failure()
            failure = {"key": readings.key, "failed": "edit 7 is not registered"}
            if told_first:
                inbox.take(failure)
                inbox.take(part(readings.key, 0, norm=0.0))
            waiting = asyncio.create_task(readings.of(0))
            await asyncio.sleep(0)
            if not told_first:
                inbox.take(failure)
            with pytest.raises(StepFailedError, match="edit 7 is not registered"):
                await asyncio.wait_for(waiting, 5)
            with pytest.raises(StepFailedError, match="edit 7"):
                readings.raise_failure()

    asyncio.run(run())


def test_a_report_that_is_lost_fails_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.engine.vllm.readings._SECONDS", 0.01)

    async def run() -> None:
        lost = pytest.raises(StepFailedError, match="did not arrive")
        with Inbox(stages=1).opened() as readings, lost:
            await asyncio.wait_for(readings.of(0), 5)

    asyncio.run(run())


def test_reports_on_requests_that_have_gone_are_dropped() -> None:
    async def run() -> None:
        inbox = Inbox(stages=1)
        with inbox.opened() as readings:
            gone = readings.key
        inbox.take(part(gone, 0, norm=1.0))
        with inbox.opened() as readings:
            assert readings.key != gone

    asyncio.run(run())


def test_a_report_that_cannot_be_read_stops_no_other(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> list[Any]:
        found: list[Any] = []
        receiver = Receiver(lambda report: found.append(report["key"]))
        sender = Sender(receiver.address, receiver.word)
        sender([{"no key": "1"}])
        sender([{"key": "2"}])
        for _ in range(200):
            await asyncio.sleep(0.01)
            if found:
                break
        sender.close()
        receiver.close()
        return found

    assert asyncio.run(run()) == ["2"]
    assert "could not be read" in caplog.text


def test_reports_arrive_and_strangers_messages_do_not(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> list[Any]:
        found: list[Any] = []
        receiver = Receiver(found.append)
        stranger = zmq.Context.instance().socket(zmq.PUSH)
        stranger.connect(receiver.address)
        for message in ([b"wrong", json.dumps([{"key": "forged"}]).encode()], [b"alone"], [b""]):
            stranger.send_multipart(message)
        sender = Sender(receiver.address, receiver.word)
        sender([{"key": "1"}, {"key": "2"}])
        sender([{"key": "3", "norm": float("nan")}])
        for _ in range(200):
            await asyncio.sleep(0.01)
            if len(found) == 3 and len(caplog.records) == 3:
                break
        stranger.close(0)
        sender.close()
        receiver.close()
        return found

    with caplog.at_level(logging.WARNING):
        found = asyncio.run(run())
    assert [report["key"] for report in found] == ["1", "2", "3"]
    assert len(caplog.records) == 3
