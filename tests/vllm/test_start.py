"""A server that is ended while vLLM starts, which may take minutes, ends at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.vllm.processes import ROOT, wait_until

pytest.importorskip("vllm")


@pytest.mark.parametrize(
    "sent", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.matrix)]
)
def test_a_server_ends_while_vllm_loads_and_nothing_stays(
    sent: signal.Signals, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    command = [sys.executable, "-m", "server.cli", "serve", "--port", "0", "--engine", "vllm"]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
        )
    children: list[psutil.Process] = []
    try:
        # It compiles from here on, on its CPU build for a minute.
        wait_until(lambda: "Warming up model" in log.read_text(), seconds=600)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(sent)
        begun = time.monotonic()
        status = process.wait(120)
        took = time.monotonic() - begun
    finally:
        process.kill()
    assert status == 0
    assert took < 20, f"it ended after {took:.0f} s"
    assert len(children) >= 2
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive, f"processes are left: {alive}"
