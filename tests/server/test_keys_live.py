"""A real server process with keys, and the official client."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import httpx2
import openai
import pytest

from server.keyfile import create_key, revoke_key
from steering.models import LanguageModel
from tests.server.fakes import make_profile
from tests.server.live import wait_until


class Server:
    """`pilothouse serve` on a free port; its log as it comes.

    Args:
        module: what runs the command.
    """

    def __init__(self, *arguments: object, module: str = "server.cli") -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PILOTHOUSE_")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, "serve", "--port", "0", "--threads", "1"]
            + [str(argument) for argument in arguments],
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
            env=environment,
        )
        self.log = ""
        self._clients: dict[str, openai.OpenAI] = {}
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        try:
            wait_until(self.logged(r" at (\S+)/v1 "), seconds=120)
        except AssertionError:
            self.close()
            raise AssertionError(self.log) from None
        found = re.search(r" at (\S+)/v1 ", self.log)
        assert found
        self.address = found[1]

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log += line

    def logged(self, pattern: str) -> Callable[[], bool]:
        return lambda: re.search(pattern, self.log) is not None

    def hang_up(self, expected: str) -> None:
        """Send SIGHUP and wait until the log says so."""
        before = len(re.findall(expected, self.log))
        self.process.send_signal(signal.SIGHUP)
        wait_until(lambda: len(re.findall(expected, self.log)) > before)

    def client(self, secret: str) -> openai.OpenAI:
        if secret not in self._clients:
            self._clients[secret] = openai.OpenAI(
                base_url=f"{self.address}/v1", api_key=secret, max_retries=0
            )
        return self._clients[secret]

    def close(self) -> int:
        for client in self._clients.values():
            client.close()
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        finally:
            self.process.kill()
            self._reader.join()
            assert self.process.stderr is not None
            self.process.stderr.close()


@pytest.fixture
def folder(model_path: Path, saved: LanguageModel, tmp_path: Path) -> Iterator[Path]:
    """Two profiles, one of them red-team."""
    bold = make_profile("bold", saved)
    bold.save(tmp_path / "bold.safetensors")
    replace(bold, name="unbound", red_team=True).save(tmp_path / "unbound.safetensors")
    yield tmp_path


def test_the_official_client_meets_keys_that_come_and_go(model_path: Path, folder: Path) -> None:
    file, audit = folder / "keys.json", folder / "audit.jsonl"
    user = create_key(file, "user", requests_per_minute=100)
    red = create_key(file, "red", profiles=["*", "unbound"])
    server = Server(
        "--model", model_path, "--profile", folder, "--keys", file, "--host", "0.0.0.0",
        "--audit-log", audit, "--log-format", "json", "--protect-metrics",
    )  # fmt: skip
    server.address = server.address.replace("0.0.0.0", "127.0.0.1")

    def say(secret: str, model: str = "tiny") -> str:
        return (
            server.client(secret)
            .chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": "Hi"}],
                max_tokens=3,
                extra_headers={"X-Request-Id": f"req-{model}"},
            )
            .model
        )

    try:
        assert say(user) == "tiny" and say(red, "tiny:unbound") == "tiny:unbound"
        with pytest.raises(openai.AuthenticationError) as wrong:
            say("ph-wrong")
        assert wrong.value.code == "invalid_api_key"
        with pytest.raises(openai.NotFoundError) as hidden:
            say(user, "tiny:unbound")
        with pytest.raises(openai.NotFoundError) as unknown:
            say(user, "tiny:unknown")
        assert hidden.value.message.replace("unbound", "unknown") == unknown.value.message
        assert "unbound" not in {m.id for m in server.client(user).models.list()}
        assert "tiny:unbound" in {m.id for m in server.client(red).models.list()}
        assert httpx2.get(f"{server.address}/health").status_code == 200
        assert httpx2.get(f"{server.address}/metrics").status_code == 401
        limited = server.client(user).chat.completions.with_raw_response.create(
            model="tiny", messages=[{"role": "user", "content": "Hi"}], max_tokens=3
        )
        assert limited.headers["x-ratelimit-limit-requests"] == "100"

        revoke_key(file, "user")
        assert say(user)  # not before the signal
        server.hang_up("1 keys are valid")
        with pytest.raises(openai.AuthenticationError):
            say(user)
        fresh = create_key(file, "fresh")
        good = file.read_text()
        file.write_text(good[:50])
        server.hang_up("the keys stay as they are")
        assert say(red)
        with pytest.raises(openai.AuthenticationError):
            say(fresh)
        file.write_text(good)
        audit.rename(folder / "old.jsonl")
        server.hang_up("2 keys are valid")
        assert say(fresh)
    finally:
        assert server.close() == 0
    logs = [json.loads(line) for line in server.log.splitlines()]
    assert any(line.get("key") == "red" and line["request_id"] == "req-tiny" for line in logs)
    assert not any(secret in server.log for secret in (user, red, fresh))
    old = [json.loads(line) for line in (folder / "old.jsonl").read_text().splitlines()]
    (used,) = [line for line in old if line.get("profile") == "unbound"]
    assert used["key"] == "red" and used["red_team"] is True
    assert used["request_id"] == "req-tiny:unbound"
    (last,) = [json.loads(line) for line in audit.read_text().splitlines()]
    assert last["key"] == "fresh"


def test_a_server_whose_keys_are_broken_or_missing_does_not_start(tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    for arguments, says in (
        (["--keys", str(tmp_path / "none.json")], "pilothouse keys create"),
        (["--keys", str(broken)], "not JSON"),
        (["--keys", "[3]"], "PILOTHOUSE_KEYS"),
        (["--audit-log", str(tmp_path / "none" / "audit")], "cannot write --audit-log"),
        (["--host", "0.0.0.0"], "--keys"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "server.cli", "serve", "--port", "0", *arguments],
            capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2],
        )  # fmt: skip
        assert done.returncode == 2 and says in done.stderr, done.stderr
        assert len([line for line in done.stderr.splitlines() if "error:" in line]) == 1
