"""A real Prometheus, for as long as a test needs one."""

from __future__ import annotations

import json
import socket
import subprocess
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from tests.services.conftest import require_tool


@dataclass(frozen=True)
class Prometheus:
    """Where it listens."""

    address: str

    def get(self, path: str, **parameters: str | float) -> Any:
        """The `data` of an answer of its API. Raises AssertionError for an error."""
        url = f"{self.address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        answer = json.loads(httpx2.get(url, timeout=30).text)
        assert answer["status"] == "success", f"{parameters}: {answer.get('error')}"
        return answer["data"]

    def query(self, promql: str) -> list[dict[str, Any]]:
        return list(self.get("query", query=promql)["result"])

    def wait_for(self, promql: str, series: int = 1, seconds: float = 30) -> list[dict[str, Any]]:
        """The result of a query once it has that many series, or whatever there is by then."""
        deadline = time.monotonic() + seconds
        while True:
            found = self.query(promql)
            if len(found) >= series or time.monotonic() > deadline:
                return found
            time.sleep(0.5)


@contextmanager
def running_prometheus(config: Path, data: Path, *flags: str) -> Iterator[Prometheus]:
    program = require_tool("prometheus")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{probe.getsockname()[1]}"
    log = data.with_suffix(".log")
    with log.open("w") as file:
        process = subprocess.Popen(
            [
                program,
                f"--config.file={config}",
                f"--storage.tsdb.path={data}",
                f"--web.listen-address={where}",
                *flags,
            ],
            stdout=file,
            stderr=file,
        )
    try:
        _wait_until_ready(f"http://{where}/-/ready", process, log)
        yield Prometheus(f"http://{where}")
    finally:
        process.terminate()
        process.wait(timeout=20)


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx2.get(url).status_code == 200:
                return
        except httpx2.TransportError:
            pass
        time.sleep(0.2)
    raise AssertionError(f"Prometheus did not start:\n{log.read_text()[-2000:]}")
