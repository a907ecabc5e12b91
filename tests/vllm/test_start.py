"""A server that is ended leaves nothing of vLLM, be it while vLLM starts, which may take minutes,
or by a signal that it cannot hear."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.vllm.processes import ROOT, Server, wait_until

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


@pytest.mark.parametrize("replicas", [1, pytest.param(2, marks=pytest.mark.matrix)])
def test_a_server_that_is_killed_takes_vllm_with_it(replicas: int) -> None:
    server = Server(
        "--engine", "vllm", "--enforce-eager", "--max-num-seqs", 2,
        "--data-parallel-size", replicas,
    )  # fmt: skip
    children = server.children
    assert len([p for p in children if "EngineCore" in " ".join(p.cmdline())]) == replicas
    server.process.kill()
    try:
        wait_until(lambda: all(map(has_ended, children)), seconds=20)
    finally:
        for process in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        server.close()


def has_ended(process: psutil.Process) -> bool:
    """Whether it runs no more; in a container, nobody may clear an orphan away."""
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
