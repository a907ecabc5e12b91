"""What goes wrong is one request's trouble: everybody else gets a whole and right answer."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import torch

from server.engine.local import LocalEngine
from server.engine.rows import Row
from server.engine.runner import Runner
from server.hosting import DEMO
from steering.profile import Profile
from tests.conftest import make_model
from tests.load.observing import (
    QUESTIONS,
    Witnesses,
    idle,
    metric,
    official,
    right_answers,
    user,
)
from tests.server.fakes import make_host, make_profile
from tests.server.live import live_server, wait_until
from tests.server.test_keys_live import Server

URL = "/v1/steering/profiles"
BINARY = {"Content-Type": "application/octet-stream"}
SLOW_READER = """
import json, sys, time, httpx2
with httpx2.stream("POST", sys.argv[1], json=json.loads(sys.argv[2]), timeout=300) as response:
    for line in response.iter_lines():
        print(line, flush=True)
        time.sleep(60)
"""


def test_profiles_with_broken_numbers_harm_nobody_else(
    serve: Callable[..., Server], tmp_path: Path
) -> None:
    """Weights that are not finite are refused; those that overflow at a strength that nobody
    tested fail the request that asks for it."""
    server = serve()
    profile = Profile.load(DEMO / "profiles" / "llm-va.safetensors")
    sound = profile.save(tmp_path / "sound.safetensors").read_bytes()
    huge = tuple(
        replace(edit, write=edit.write * 0, shift=torch.full((edit.dimension,), 1e36))
        for edit in profile.edits
    )
    bomb = replace(profile, name="bomb", edits=huge, strength=1e-38)
    bomb_file = bomb.save(tmp_path / "bomb.safetensors").read_bytes()

    async def run() -> Witnesses:
        witnesses = Witnesses(server.address, await right_answers(server.address))
        async with (
            witnesses.watching(6),
            official(server.address) as client,
            httpx2.AsyncClient(base_url=server.address, timeout=300) as http,
        ):
            nan = sound[:-4] + b"\xff\xff\xff\xff"
            refused = await http.post(f"{URL}?name=nan", content=nan, headers=BINARY)
            assert refused.status_code == 400, refused.text
            made = await http.post(URL, content=bomb_file, headers=BINARY)
            assert made.status_code == 201, made.text
            asked: Any = dict(model="demo:bomb", messages=user("Hi"), temperature=0)
            for stream in (False, True, False):
                with pytest.raises((openai.InternalServerError, openai.APIError)) as failed:
                    await _read(client, {**asked, "stream": stream}, steering={"strength": 1e4})
                assert failed.value.code == "internal_error"
                await witnesses.more_answers(6)
            await client.chat.completions.create(**asked)  # at its own strength it is harmless
            await witnesses.more_answers(12)
        return witnesses

    found = asyncio.run(run())
    assert not found.wrong and not found.errors, (found.wrong[:3], found.errors)
    assert httpx2.get(f"{server.address}/health").status_code == 200
    assert metric(server.address, "steering_requests_total", profile="bomb") == 4


async def _read(client: openai.AsyncOpenAI, asked: dict[str, Any], **extra: Any) -> None:
    found = await client.chat.completions.create(**asked, extra_body=extra)
    if asked["stream"]:
        async for _ in found:
            pass


def test_an_edit_that_raises_harms_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = LocalEngine(make_model("llama"), max_num_seqs=6, max_model_len=250)
    bad = make_profile("bad", strength=3.0)
    host = make_host(engine, profiles=[make_profile("bold"), bad])
    calls = Runner.run

    def run_call(self: Runner, rows: Sequence[Row], *args: Any, **more: Any) -> Any:
        strengths = {a.strength for row in rows for a in row.request.edits}
        if bad.strength in strengths:
            raise RuntimeError("an edit that raises")
        return calls(self, rows, *args, **more)

    monkeypatch.setattr(Runner, "run", run_call)
    with live_server(host) as address:

        async def run() -> Witnesses:
            expected = await right_answers(address, ["raw", "bold"], "tiny")
            witnesses = Witnesses(address, expected, "tiny")
            async with witnesses.watching(5), official(address) as client:
                for _ in range(10):
                    with pytest.raises(openai.InternalServerError):
                        await client.chat.completions.create(
                            model="tiny:bad", messages=user("Hi"), max_tokens=20
                        )
                    await witnesses.more_answers(3)
            return witnesses

        found = asyncio.run(run())
        assert not found.wrong and not found.errors, (found.wrong[:3], found.errors)
        assert idle(address) and httpx2.get(f"{address}/health").status_code == 200


def test_clients_that_are_killed_harm_nobody_else(serve: Callable[..., Server]) -> None:
    server = serve("--max-num-seqs", 6)
    # Without its end token the demo rambles until its length is reached.
    long = {"model": "demo", "messages": user("Hi"), "max_tokens": 1500, "temperature": 2,
            "stream": True, "logit_bias": {"2": -100}}  # fmt: skip
    command = [sys.executable, "-c", SLOW_READER, f"{server.address}/v1/chat/completions"]

    async def run() -> Witnesses:
        witnesses = Witnesses(server.address, await right_answers(server.address))
        async with witnesses.watching(5):
            for _ in range(5):
                with subprocess.Popen(
                    [*command, json.dumps(long)], stdout=subprocess.PIPE
                ) as client:
                    assert client.stdout is not None
                    line = await asyncio.to_thread(client.stdout.readline)
                    assert line.startswith(b"data: ")
                    client.kill()
                await witnesses.more_answers(3)
        return witnesses

    found = asyncio.run(run())
    assert not found.wrong and not found.errors, (found.wrong[:3], found.errors)
    wait_until(lambda: idle(server.address), 60)


def test_sigterm_under_load_loses_no_answer(serve: Callable[..., Server]) -> None:
    server = serve("--max-num-seqs", 4, "--shutdown-timeout", 120)

    async def run() -> Witnesses:
        witnesses = Witnesses(server.address, await right_answers(server.address))
        async with witnesses.watching(12):  # most of them wait
            server.process.send_signal(signal.SIGTERM)
            before = witnesses.right
            while not witnesses.errors:
                await asyncio.sleep(0.02)
        # What was under way, in slots and in the queue, was finished.
        assert witnesses.right >= before + 6
        return witnesses

    found = asyncio.run(run())
    assert not found.wrong, found.wrong[:3]
    # New requests are turned down, and then nobody listens any more; no reply breaks off.
    assert set(found.errors) <= {"engine_stopped", "APIConnectionError"}, found.errors
    assert server.process.wait(120) == 0


def test_a_full_queue_turns_away_and_loses_nobody(serve: Callable[..., Server]) -> None:
    server = serve("--max-num-seqs", 2, "--max-waiting", 5)

    async def run() -> Counter[str]:
        expected = await right_answers(server.address, ["raw"])
        async with httpx2.AsyncClient(base_url=server.address, timeout=300) as http:

            async def ask(question: str) -> str:
                asked = {"model": "demo:raw", "messages": user(question), "temperature": 0}
                found = await http.post("/v1/chat/completions", json={**asked, "max_tokens": 48})
                if found.status_code == 429:
                    assert int(found.headers["Retry-After"]) >= 1
                    return str(found.json()["error"]["code"])
                content = found.json()["choices"][0]["message"]["content"]
                return "right" if content == expected["raw", question] else content

            return Counter(await asyncio.gather(*[ask(QUESTIONS[i % 4]) for i in range(60)]))

    found = asyncio.run(run())
    assert set(found) == {"right", "queue_full"} and found["right"] >= 7, found
    rejected = metric(server.address, "steering_rejections_total", reason="queue_full")
    assert rejected == found["queue_full"]
    assert idle(server.address)
