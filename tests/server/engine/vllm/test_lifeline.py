"""Processes that end with another."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from server.engine.vllm.lifeline import end_with, when_one_ends

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[bytes]]]:
    started = [subprocess.Popen(SLEEP) for _ in range(4)]
    yield started
    for process in started:
        process.kill()
        process.wait()


def test_those_named_end_with_the_server_and_no_others(
    processes: list[subprocess.Popen[bytes]],
) -> None:
    server, ended, engine, bystander = processes
    end_with(server.pid, [ended.pid, engine.pid])
    ended.kill()
    ended.wait()  # that its number is free again troubles nobody
    assert engine.poll() is None
    server.kill()  # and is not cleared away: as with a parent that does not wait
    assert engine.wait(30) == -signal.SIGKILL
    assert bystander.poll() is None


def test_where_the_system_cannot_tell_it_is_said_and_nothing_breaks(
    processes: list[subprocess.Popen[bytes]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.delattr(os, "pidfd_open")
    with caplog.at_level(logging.WARNING):
        end_with(processes[0].pid, [processes[1].pid])
    assert "outlive a server that is killed" in caplog.text
    assert processes[1].poll() is None


def test_the_first_that_ends_is_told_once_and_nobody_after_the_watch(
    processes: list[subprocess.Popen[bytes]],
) -> None:
    async def run() -> None:
        told: asyncio.Queue[str] = asyncio.Queue()
        when_one_ends([p.pid for p in processes[:2]], lambda: told.put_nowait("watched"))
        stop = when_one_ends([processes[2].pid], lambda: told.put_nowait("stopped"))
        stop()
        for process in processes[2::-1]:
            process.kill()
            process.wait()
        assert await asyncio.wait_for(told.get(), 30) == "watched"
        await asyncio.sleep(0.05)
        assert told.empty()

    asyncio.run(run())
