"""SIGTERM, in a process of its own: no reply is lost, and the server ends in time."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest

from tests.server.fakes import body
from tests.server.live import wait_until

ROOT = Path(__file__).parents[2]
SERVER = """
import sys
import uvicorn
from server.app import create_app
from server.commands.serve import listen, url
from server.draining import DrainingServer
from server.settings import Settings
from tests.server.fakes import FakeEngine, make_host

host = make_host(FakeEngine("x" * 20, delay=0.1))
with listen(Settings(port=0)) as listener:
    listener.listen()
    print(url(listener), flush=True)
    DrainingServer(uvicorn.Config(create_app(host)), host, float(sys.argv[1])).run([listener])
"""


@contextmanager
def draining_server(patience: float) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    command = [sys.executable, "-c", SERVER, str(patience)]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert re.match(r"http://", line), process.stderr and process.stderr.read()
            yield line.strip(), process
        finally:
            process.kill()


def ready(address: str) -> bool:
    return httpx2.get(f"{address}/ready").status_code == 200


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_a_reply_under_way_is_finished_while_new_requests_are_turned_down(
    kind: signal.Signals,
) -> None:
    with draining_server(30) as (address, process):
        wait_until(lambda: ready(address))
        url = f"{address}/v1/chat/completions"
        with httpx2.stream("POST", url, json=body(stream=True), timeout=30) as response:
            lines = response.iter_lines()
            seen = [next(lines)]
            process.send_signal(kind)
            wait_until(lambda: not ready(address))
            refused = httpx2.post(url, json=body())
            assert refused.status_code == 503
            assert refused.headers["Retry-After"]
            assert httpx2.get(f"{address}/health").status_code == 200
            seen += lines
        assert "".join(seen).count('"x"') == 20
        assert seen[-2] == "data: [DONE]"
        assert process.wait(timeout=20) == 0


def test_a_reply_that_takes_too_long_is_ended_with_an_error() -> None:
    with draining_server(0.3) as (address, process):
        wait_until(lambda: ready(address))
        url = f"{address}/v1/chat/completions"
        with httpx2.stream("POST", url, json=body(stream=True), timeout=30) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = "".join(lines)
        assert "engine_stopped" in rest
        assert rest.count('"x"') < 20
        assert process.wait(timeout=20) == 0


def test_without_requests_it_ends_at_once() -> None:
    with draining_server(60) as (address, process):
        wait_until(lambda: ready(address))
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
