"""A thousand clients, most of which go away, leave nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
from collections import Counter
from collections.abc import Callable

import uvicorn

from server.app import create_app
from server.commands.serve import listen, url
from server.engine.local import LocalEngine
from server.settings import Settings
from tests.conftest import make_model
from tests.load.observing import PROFILES, QUESTIONS, file_descriptors, idle, metric, user
from tests.server.fakes import make_host
from tests.server.live import wait_until
from tests.server.test_keys_live import Server

CONNECTS = 1000
AT_ONCE = 40
WAYS = ("in the headers", "in the body", "after the body", "soon", "later", "in the reply", "never")


def request_of(rng: random.Random, models: list[str]) -> tuple[bytes, bytes]:
    """Headers and body of a random request, whose reply is long unless it ends by itself."""
    asked = {
        "model": rng.choice(models),
        "messages": user(rng.choice(QUESTIONS) + " Please?" * rng.choice((0, 2, 12))),
        "stream": rng.random() < 0.5,
        "max_tokens": rng.choice((1, 8, 60)),
        "n": rng.choice((1, 1, 1, 3)),
        "stop": rng.choice((None, "step", ["a", "zebra"])),
    }
    body = json.dumps(asked).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode(), body


async def connect(address: str, rng: random.Random, models: list[str]) -> str:
    """One client: what became of it, a status or when it went away."""
    host, _, port = address.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    way = rng.choice(WAYS)
    head, body = request_of(rng, models)
    try:
        if way == "in the headers":
            writer.write(head[: rng.randrange(len(head))])
        elif way == "in the body":
            writer.write(head + body[: rng.randrange(len(body))])
        else:
            writer.write(head + body)
        await writer.drain()
        if way == "soon":
            await asyncio.sleep(rng.random() * 0.02)
        elif way == "later":
            await asyncio.sleep(rng.random() * 0.6)
        elif way == "in the reply":
            await reader.read(rng.randrange(1, 2000))
        elif way == "never":
            return (await reader.read())[:12].decode()
        return way
    finally:
        if rng.random() < 0.5:
            writer.transport.abort()  # a reset instead of a farewell
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def storm(address: str, connects: int, models: list[str], seed: int) -> Counter[str]:
    """So many clients, some of them at once."""
    rng = random.Random(seed)
    free = asyncio.Semaphore(AT_ONCE)

    async def one(seed: int) -> str:
        async with free:
            return await connect(address, random.Random(seed), models)

    return Counter(await asyncio.gather(*[one(rng.randrange(2**32)) for _ in range(connects)]))


def check(found: Counter[str]) -> None:
    """Every way was gone, and whoever stayed was answered."""
    assert set(WAYS) - {"never"} < set(found)
    assert set(found) - set(WAYS) == {"HTTP/1.1 200"}, found
    assert found["HTTP/1.1 200"] > CONNECTS // 20


def test_a_process_keeps_no_slot_and_no_descriptor(serve: Callable[..., Server]) -> None:
    server = serve("--max-num-seqs", 6)
    pid, models = server.process.pid, [f"demo:{name}" for name in PROFILES]
    asyncio.run(storm(server.address, 60, models, seed=1))  # threads and tables that stay
    wait_until(lambda: idle(server.address), 60)
    before = file_descriptors(pid)

    check(asyncio.run(storm(server.address, CONNECTS, models, seed=2)))
    wait_until(lambda: idle(server.address), 60)
    wait_until(lambda: file_descriptors(pid) <= before, 30)
    assert metric(server.address, "steering_requests_total", finish_reason="cancelled") > 100
    assert not metric(server.address, "steering_requests_total", finish_reason="error")
    assert "Traceback" not in server.log
    assert server.close() == 0


def test_an_event_loop_keeps_no_task() -> None:
    """Server and clients on one loop, whose tasks can be counted."""
    engine = LocalEngine(make_model("llama"), max_num_seqs=6, max_model_len=250)
    models = ["tiny", "tiny:bold", "tiny:shy"]

    async def run() -> Counter[str]:
        with listen(Settings(port=0)) as listener:
            listener.listen()
            server = uvicorn.Server(uvicorn.Config(create_app(make_host(engine)), log_config=None))
            serving = asyncio.create_task(server.serve([listener]))
            while not server.started:
                await asyncio.sleep(0.01)

            async def at_rest(tasks: int, descriptors: int) -> bool:
                for _ in range(1000):
                    stats = engine.stats()
                    if (
                        len(asyncio.all_tasks()) <= tasks
                        and file_descriptors(os.getpid()) <= descriptors
                        and not (stats.running or stats.waiting or stats.slots_used)
                    ):
                        return True
                    await asyncio.sleep(0.02)
                return False

            await storm(url(listener), 60, models, seed=3)
            # This one, the server's, its start-up's, and what follows other replicas' events.
            assert await at_rest(4, 10_000)
            tasks, descriptors = len(asyncio.all_tasks()), file_descriptors(os.getpid())
            found = await storm(url(listener), CONNECTS, models, seed=4)
            assert await at_rest(tasks, descriptors), (asyncio.all_tasks(), engine.stats())
            server.should_exit = True
            await serving
            return found

    check(asyncio.run(run()))
