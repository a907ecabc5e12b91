"""Mixed traffic for two minutes holds memory flat, and every reply is what it should be."""

from __future__ import annotations

import asyncio
import os
import random
import statistics
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx2
import openai

from server.hosting import DEMO
from tests.load.observing import PROFILES, QUESTIONS, idle, metric, official, resident_mib, user
from tests.server.live import wait_until
from tests.server.test_keys_live import Server

WARM_UP = 40
SECONDS = float(os.environ.get("PILOTHOUSE_SOAK_SECONDS", "120"))
WORKERS = 10
SLACK_MIB = 8
"""What the median of the last quarter may lie above that of the second: the allocator breathes."""

SCHEMA = {
    "type": "object",
    "properties": {"answer": {"type": "boolean"}, "n": {"type": "integer", "maximum": 9}},
    "required": ["answer", "n"],
    "additionalProperties": False,
}


class Traffic:
    """One worker's kinds of request; each checks its answer."""

    def __init__(self, address: str, seed: int) -> None:
        self.rng = random.Random(seed)
        self.seed = seed
        self.client = official(address)
        self.http = httpx2.AsyncClient(base_url=address, timeout=300)
        self.profile = (DEMO / "profiles" / "alphasteer.safetensors").read_bytes()

    @property
    def question(self) -> list[dict[str, str]]:
        # Never quite the same, so that whatever is kept per prompt would show.
        return user(f"{self.rng.choice(QUESTIONS)} {self.rng.getrandbits(64):x}")

    async def chat(self, **more: Any) -> Any:
        asked: Any = {
            "model": f"demo:{self.rng.choice(PROFILES)}",
            "messages": self.question,
            "max_tokens": 24,
            **more,
        }
        return await self.client.chat.completions.create(**asked)

    async def plain(self) -> None:
        found = await self.chat(temperature=0)
        assert found.steering["outcome"]

    async def streamed(self) -> None:
        async with await self.chat(stream=True, stream_options={"include_usage": True}) as chunks:
            *_, last = [chunk async for chunk in chunks]
        assert last.usage.completion_tokens

    async def left_early(self) -> None:
        async with await self.chat(stream=True, max_tokens=200) as chunks:
            await anext(aiter(chunks))

    async def choices(self) -> None:
        found = await self.chat(n=3, stop=["step", "fence"], presence_penalty=1, seed=5)
        assert len(found.choices) == 3
        assert not any("step" in choice.message.content for choice in found.choices)

    async def logprobs(self) -> None:
        found = await self.chat(logprobs=True, top_logprobs=5, logit_bias={"300": 5})
        [choice] = found.choices  # now and then a reply ends before it begins
        assert bool(choice.logprobs.content) == bool(choice.message.content)

    async def shaped(self) -> None:
        schema = {"name": "a", "schema": {**SCHEMA, "title": str(self.rng.random())}}
        found = await self.chat(response_format={"type": "json_schema", "json_schema": schema})
        assert found.choices[0].message.content.startswith("{")

    async def tools(self) -> None:
        tool = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}
        try:
            await self.chat(tools=[tool])
        except openai.BadRequestError as error:  # the demo's template knows none
            assert error.param == "tools"
        else:
            raise AssertionError("the demo answered with tools that it cannot have seen")

    async def composed(self) -> None:
        names = self.rng.sample(PROFILES, 2)
        profiles = [{"name": name, "strength": self.rng.random()} for name in names]
        found = await self.chat(model="demo", extra_body={"steering": {"profiles": profiles}})
        assert [p["name"] for p in found.steering["profiles"]] == names

    async def text(self) -> None:
        found = await self.client.completions.create(model="demo", prompt=["Of", "Sure"], n=2)
        assert len(found.choices) == 4

    async def scored(self) -> None:
        asked = {"model": f"demo:{self.rng.choice(PROFILES)}", "messages": self.question}
        found = await self.http.post("/v1/steering/score", json=asked)
        assert found.status_code == 200 and found.json()["refusal_score"] is not None

    async def tokenized(self) -> None:
        asked = {"model": "demo", "messages": self.question, "return_token_strs": True}
        found = (await self.http.post("/tokenize", json=asked)).json()
        assert found["count"] == len(found["token_strs"])

    async def registered(self) -> None:
        url, name = "/v1/steering/profiles", f"new-{self.seed}"
        binary = {"Content-Type": "application/octet-stream"}
        made = await self.http.post(f"{url}?name={name}", content=self.profile, headers=binary)
        if made.status_code == 429:
            return
        assert made.status_code == 201, made.text
        found = await self.chat(model=f"demo:{name}")
        assert found.steering["profile"] == name
        while (gone := await self.http.delete(f"{url}/{name}")).status_code == 429:
            await asyncio.sleep(0.05)
        assert gone.status_code == 200, gone.text

    async def refused(self) -> None:
        wrong = {"temperature": 9, "messages": [], "model": "other", "stop": ["a"] * 9}
        key = self.rng.choice(list(wrong))
        asked = {"model": "demo", "messages": self.question, key: wrong[key]}
        found = await self.http.post("/v1/chat/completions", json=asked)
        assert found.status_code in (400, 404) and found.json()["error"]["message"]

    async def run(self, until: Callable[[], bool]) -> dict[str, int]:
        """All kinds in random order, until told to stop; how often each was done."""
        kinds: list[Callable[[], Awaitable[None]]] = [
            self.plain, self.streamed, self.left_early, self.choices, self.logprobs, self.shaped,
            self.tools, self.composed, self.text, self.scored, self.tokenized, self.registered,
            self.refused,
        ]  # fmt: skip
        done = dict.fromkeys([kind.__name__ for kind in kinds], 0)
        async with self.client, self.http:
            while not until():
                kind = self.rng.choice(kinds)
                await kind()
                done[kind.__name__] += 1
        return done


def test_two_minutes_of_mixed_traffic_hold_memory_flat(
    serve: Callable[..., Server], tmp_path: Path
) -> None:
    server = serve("--audit-log", tmp_path / "audit.jsonl")
    pid = server.process.pid
    samples: list[tuple[float, float]] = []

    async def run() -> list[dict[str, int]]:
        end = time.monotonic() + WARM_UP + SECONDS
        over = lambda: time.monotonic() > end  # noqa: E731
        workers = [
            asyncio.create_task(Traffic(server.address, i).run(over)) for i in range(WORKERS)
        ]
        while not over() and not any(worker.done() for worker in workers):
            samples.append((time.monotonic() - end + SECONDS, resident_mib(pid)))
            await asyncio.sleep(0.5)
        return await asyncio.gather(*workers)

    done = asyncio.run(run())
    assert all(sum(worker[kind] for worker in done) > 3 for kind in done[0]), done

    def median(begin: float, end: float) -> float:
        return statistics.median(
            mib for at, mib in samples if begin * SECONDS <= at <= end * SECONDS
        )

    quarters = [round(median(i / 4, (i + 1) / 4), 1) for i in range(4)]
    print(f"resident MiB in each quarter of {SECONDS:g} s: {quarters}")
    assert quarters[3] < quarters[1] + SLACK_MIB, quarters
    wait_until(lambda: idle(server.address), 60)
    assert not metric(server.address, "steering_requests_total", finish_reason="error")
    assert not metric(server.address, "steering_http_requests_total", status="5xx")
    assert not metric(server.address, "steering_audit_records_lost_total")
    assert "Traceback" not in server.log
    assert server.close() == 0
