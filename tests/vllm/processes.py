"""`pilothouse serve` in a process of its own, on either engine."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx2
import openai
import psutil

ROOT = Path(__file__).parents[2]
_READY = re.compile(r" serves \S+ at (\S+)/v1 ")


class Server:
    """A server on a free port, and its log as it comes. Raises AssertionError with the log if it
    does not start."""

    def __init__(self, *arguments: object) -> None:
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("PILOTHOUSE_")},
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-u", "-m", "server.cli", "serve", "--port", "0"]
        self.process = subprocess.Popen(
            [*command, *map(str, arguments)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        self.log = ""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        deadline = time.monotonic() + 600
        while (ready := _READY.search(self.log)) is None:
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.close()
                raise AssertionError(self.log)
            time.sleep(0.05)
        self.address = ready[1]
        self.client = openai.OpenAI(
            base_url=f"{self.address}/v1", api_key="none", max_retries=0, timeout=300
        )

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log += line

    def get(self, path: str) -> httpx2.Response:
        return httpx2.get(self.address + path, timeout=60)

    def post(self, path: str, **arguments: object) -> httpx2.Response:
        return httpx2.post(self.address + path, timeout=300, **arguments)  # type: ignore[arg-type]

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's series with these labels."""
        found = [
            float(line.rpartition(" ")[2])
            for line in self.get("/metrics").text.splitlines()
            if re.match(rf"{name}[ {{]", line)
            and all(f'{key}="{value}"' in line for key, value in labels.items())
        ]
        assert found, f"{name} {labels} is not on the page"
        return sum(found)

    @property
    def children(self) -> list[psutil.Process]:
        """vLLM's processes."""
        found: list[psutil.Process] = psutil.Process(self.process.pid).children(recursive=True)
        return found

    def close(self) -> int:
        """Stop it; its exit status. Nothing that it started may stay."""
        children = self.children if self.process.poll() is None else []
        if hasattr(self, "client"):
            self.client.close()
        self.process.send_signal(signal.SIGTERM)
        try:
            status = self.process.wait(120)
        finally:
            self.process.kill()
            self._reader.join()
            assert self.process.stderr is not None
            self.process.stderr.close()
        _, alive = psutil.wait_procs(children, timeout=30)
        assert not alive, f"processes are left: {alive}"
        return status


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Raises AssertionError if it does not come true."""

    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)
