"""Under overload each key gets its share, over HTTP."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai

from server.keyfile import create_key
from tests.load.observing import official, user
from tests.server.test_keys_live import Server

END = 2
"""The demo's end token; without it every reply is as long as it may be."""
LEAST_SHARE = 0.75
"""Of the loud key's tokens that the quiet one gets, where both always have requests waiting."""


def test_a_key_with_few_clients_gets_as_much_as_one_with_many(
    serve: Callable[..., Server], tmp_path: Path
) -> None:
    keys = tmp_path / "keys.json"
    loud, quiet = create_key(keys, "loud"), create_key(keys, "quiet")
    server = serve("--keys", keys, "--max-num-seqs", 4)
    tokens: Counter[str] = Counter()

    async def client(name: str, key: str, done: asyncio.Event) -> None:
        async with official(server.address, key) as api:
            while not done.is_set():
                reply: Any = await api.chat.completions.create(
                    model="demo:raw", messages=user("Hi"), max_tokens=40, temperature=0,
                    logit_bias={str(END): -100},
                )  # fmt: skip
                if not done.is_set():
                    tokens[name] += reply.usage.completion_tokens

    async def run() -> None:
        done = asyncio.Event()
        loudly = [asyncio.create_task(client("loud", loud, done)) for _ in range(24)]
        while tokens["loud"] < 400:  # it has filled slots and queue
            await asyncio.sleep(0.05)
        quietly = [asyncio.create_task(client("quiet", quiet, done)) for _ in range(6)]
        await asyncio.sleep(2)
        tokens.clear()
        while tokens.total() < 8000:
            await asyncio.sleep(0.05)
        done.set()
        await asyncio.gather(*loudly, *quietly)

    asyncio.run(run())
    share = tokens["quiet"] / tokens["loud"]
    print(f"tokens: {dict(tokens)}, quiet/loud = {share:.2f}")
    assert LEAST_SHARE < share < 1 / LEAST_SHARE, tokens


def test_a_key_whose_minute_is_used_up_is_told_when_to_come_back(
    serve: Callable[..., Server], tmp_path: Path
) -> None:
    keys = tmp_path / "keys.json"
    few, free = create_key(keys, "few", requests_per_minute=3), create_key(keys, "free")
    server = serve("--keys", keys)

    async def run() -> None:
        async with official(server.address, few) as limited, official(server.address, free) as api:
            asked: Any = dict(model="demo", messages=user("Hi"), max_tokens=2)
            for _ in range(3):
                await limited.chat.completions.create(**asked)
            try:
                await limited.chat.completions.create(**asked)
            except openai.RateLimitError as error:
                assert error.code == "rate_limit_exceeded"
                assert 1 <= int(error.response.headers["Retry-After"]) <= 60
            else:
                raise AssertionError("the fourth request of a minute was served")
            await api.chat.completions.create(**asked)  # of another key

    asyncio.run(run())
