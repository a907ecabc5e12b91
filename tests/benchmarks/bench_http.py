"""What serving adds to the engine: `python -m tests.benchmarks.bench_http [--quick] [--only abc]`.

a  streaming over HTTP to 16 clients against the same requests on the same engine without HTTP;
b  `pilothouse serve` against `transformers serve --continuous-batching`;
c  a prompt whose beginning is in the prefix cache against one computed whole.

Random weights, greedy, one thread for each engine; clients in a process of their own. Where work
is spread over processes, speeds are by wall clock.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import steering
from server.engine.base import EngineRequest, EngineToken, Sampling
from server.engine.local import LocalEngine
from server.engine.stream import Courier, Outbox, TokenStream
from server.hosting import Host
from server.profiles import ProfileStore
from steering.models import LanguageModel, load_model
from tests.benchmarks.bench_engine import QWEN, SMALL, make_model, random_prompt
from tests.benchmarks.client import Clients
from tests.benchmarks.harness import Table, measure
from tests.benchmarks.servers import Server, chat, make_tokenizer, pilothouse, served, transformers
from tests.server.live import live_server

CLIENTS = 16
DEMO = Path(steering.__path__[0]) / "demo" / "model"


class TimedCourier(Courier):
    """Notes when the engine's thread hands over each token."""

    def __init__(self) -> None:
        super().__init__()
        self.times: dict[Outbox, list[float]] = {}

    def put(self, outbox: Outbox, item: Any) -> None:
        self.times.setdefault(outbox, []).append(time.monotonic())
        super().put(outbox, item)


class TimedEngine(LocalEngine):
    def __init__(self, lm: LanguageModel, **settings: Any) -> None:
        super().__init__(lm, **settings)
        self._courier = self.courier = TimedCourier()
        self.outboxes: dict[str, Outbox] = {}

    def generate_all(
        self, requests: Sequence[EngineRequest]
    ) -> list[AsyncGenerator[EngineToken, None]]:
        streams = super().generate_all(requests)
        for request, stream in zip(requests, streams, strict=True):
            assert isinstance(stream, TokenStream)
            self.outboxes[request.request_id] = stream._outbox
        return streams

    def times_of(self, request_id: str) -> list[float]:
        return self.courier.times[self.outboxes[request_id]]


def readable(lm: LanguageModel) -> LanguageModel:
    return replace(lm, tokenizer=make_tokenizer(lm.model.config.vocab_size))


def bench_http(
    table: Table,
    what: str,
    lm: LanguageModel,
    conversations: Sequence[list[dict[str, str]]],
    max_tokens: int,
    rounds: int,
    target: float | None = None,
) -> None:
    """The engine's own speed and that of its clients, who wait for the text."""
    engine = TimedEngine(lm, max_num_seqs=CLIENTS, max_model_len=512)
    host = Host(engine, lm, ProfileStore(lm, "bench"))
    sampling = Sampling(temperature=0, max_tokens=max_tokens)
    requests = [
        EngineRequest(str(i), tuple(lm.encode_chat(messages)), sampling)
        for i, messages in enumerate(conversations)
    ]
    bodies = [
        {
            "model": "bench",
            "messages": messages,
            "temperature": 0,
            "max_tokens": max_tokens,
            "stream_options": {"include_usage": True},
        }
        for messages in conversations
    ]
    counts: dict[str, list[int]] = {}
    delays: list[float] = []

    def direct() -> None:
        async def work(queue: Any) -> list[int]:
            return [len([t async for t in engine.generate(request)]) for request in queue]

        async def every() -> list[list[int]]:
            queue = iter(requests)
            return await asyncio.gather(*(work(queue) for _ in range(CLIENTS)))

        counts["engine"] = sorted(n for found in asyncio.run(every()) for n in found)

    with live_server(host) as address, Clients() as clients:

        def http() -> None:
            answers = clients(address, bodies, CLIENTS)
            counts["http"] = sorted(answer.tokens for answer in answers)
            for answer in answers:
                given = engine.times_of(answer.id)
                # A token that ends the reply has no text. Where others have none either (parts of a
                # character), it cannot be told which piece is whose.
                if len(given) - len(answer.pieces) <= 1:
                    delays.extend(b - a for a, b in zip(given, answer.pieces, strict=False))

        paired = measure({"http": http, "engine": direct}, rounds).by_wall()
    assert counts["http"] == counts["engine"], "both must do the same work"
    table.add(what, paired, "http", "engine", target)
    tokens = sum(counts["engine"])
    speeds = ", ".join(f"{tokens / paired.median(arm):.0f} {arm}" for arm in ("http", "engine"))
    shown = f"engine token to client: {_spread(delays)}" if delays else ""
    table.note(f"  tokens per second: {speeds}; {shown}")


def bench_against_transformers(table: Table, slices: int, tokens: int) -> None:
    """Slices of requests to the one and the other server, of which one runs at a time."""
    prompt, per_slice = 200, 2 * CLIENTS
    lm = readable(make_model(SMALL, torch.float32))
    speeds: dict[str, list[float]] = {"pilothouse": [], "transformers": []}
    firsts: dict[str, list[float]] = {name: [] for name in speeds}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "bench"
        lm.model.save_pretrained(folder)
        lm.tokenizer.save_pretrained(folder)
        with (
            served(pilothouse(folder), "bench") as ours,
            served(transformers(folder), str(folder)) as theirs,
            Clients() as clients,
        ):
            servers: dict[str, Server] = {"pilothouse": ours, "transformers": theirs}
            for at in range(-1, slices):
                for arm in list(servers)[:: 1 if at % 2 else -1]:
                    server = servers[arm]
                    bodies = [
                        {
                            "model": server.model,
                            "messages": chat(lm.tokenizer, prompt, at * per_slice + i),
                            "temperature": 0,
                            "max_tokens": tokens,
                            "stream_options": {"include_usage": True},
                        }
                        for i in range(per_slice)
                    ]
                    with server.running():
                        answers = clients(server.address, bodies, CLIENTS)
                    assert [a.tokens for a in answers] == [tokens] * per_slice, arm
                    if at >= 0:
                        end = max(a.pieces[-1] for a in answers)
                        start = min(a.start for a in answers)
                        speeds[arm].append(tokens * per_slice / (end - start))
                        firsts[arm] += [a.first for a in answers]
    ratios = sorted(a / b for a, b in zip(*speeds.values(), strict=True))
    ratio, quarter = statistics.median(ratios), len(ratios) // 4
    table.note(
        f"{f'{CLIENTS} clients, {prompt} + {tokens} tokens, vs transformers serve (fp32)':64} "
        f"{ratio:6.3f}x  [{ratios[quarter]:.3f}, {ratios[-1 - quarter]:.3f}]  n={slices} slices of "
        f"{per_slice} requests  target 1.20 {'met' if ratio >= 1.2 else 'MISSED'}"
    )
    for arm, found in firsts.items():
        table.note(
            f"  {arm:14} {statistics.median(speeds[arm]):6.0f} tokens per second, first token "
            f"{_spread(found)} of {len(found)}"
        )
    lower = all(
        _quantile(firsts["pilothouse"], q) < _quantile(firsts["transformers"], q)
        for q in (0.5, 0.95)
    )
    table.note(
        f"  first token sooner in the median and at 95 %: target {'met' if lower else 'MISSED'}"
    )


def bench_prefix(table: Table, lm: LanguageModel, rounds: int) -> None:
    """The second request with one system prompt, on an engine that keeps prefixes and one that
    does not."""
    settings: dict[str, Any] = {"max_num_seqs": 2, "max_model_len": 1024}
    engines = {
        "kept": LocalEngine(lm, **settings, prefix_cache_mib=512),
        "whole": LocalEngine(lm, **settings),
    }

    def first_token(engine: LocalEngine, system: int, question: int) -> int:
        prompt = (*random_prompt(500, system), *random_prompt(20, 1000 + question))

        async def ask() -> int | None:
            request = EngineRequest("", prompt, Sampling(temperature=0, max_tokens=1))
            [token] = [token async for token in engine.generate(request)]
            return token.cached_tokens

        return asyncio.run(ask()) or 0

    for engine in engines.values():
        engine.start()
    asked = dict.fromkeys(engines, 0)
    for system in range(rounds + 1):
        assert first_token(engines["kept"], system, system) == 0

    def second(arm: str) -> None:
        system, asked[arm] = asked[arm], asked[arm] + 1
        cached = first_token(engines[arm], system, 500 + system)
        assert cached == (496 if arm == "kept" else 0)

    arms = {"kept": lambda: second("kept"), "whole": lambda: second("whole")}
    paired = measure(arms, rounds)
    for engine in engines.values():
        engine.close()
    table.add("first token of 500 + 20, prefix kept vs not (0.5B)", paired, "kept", "whole", 5.0)


def _quantile(values: Sequence[float], q: float) -> float:
    return sorted(values)[min(int(q * len(values)), len(values) - 1)]


def _spread(seconds: Sequence[float]) -> str:
    """Median and 95th percentile."""
    return (
        f"{1000 * _quantile(seconds, 0.5):.1f} ms (95 %: {1000 * _quantile(seconds, 0.95):.1f} ms)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, about 2 minutes")
    parser.add_argument("--only", default="", help="letters of the parts to run: a b c")
    options = parser.parse_args()
    quick, only = options.quick, options.only or "abc"
    torch.set_num_threads(1)
    started = time.perf_counter()
    table = Table()
    qwen = readable(make_model(QWEN, torch.bfloat16)) if set(only) & set("ac") else None
    if "a" in only and qwen:
        chats = [chat(qwen.tokenizer, 32, i) for i in range(CLIENTS)]
        tokens, rounds = (16, 3) if quick else (48, 9)
        what = f"{CLIENTS} clients, 32 + {tokens} tokens, HTTP vs engine (0.5B)"
        bench_http(table, what, qwen, chats, tokens, rounds, 0.9)
        demo = load_model(str(DEMO), dtype=torch.float32)
        things = ("cake", "fence", "song", "bus", "garden", "letter", "kite", "soup")
        chats = [
            [{"role": "user", "content": f"Tell me how to {verb} the {thing}."}]
            for verb in ("bake", "paint", "wreck", "clean")
            for thing in things
        ]
        what = f"{CLIENTS} clients, {len(chats)} short replies, HTTP vs engine (demo)"
        bench_http(table, what, demo, chats, 64, 5 if quick else 15)
    if "c" in only and qwen:
        bench_prefix(table, qwen, 2 if quick else 7)
    del qwen
    if "b" in only:
        bench_against_transformers(table, *((1, 16) if quick else (10, 64)))
    table.note(f"{time.perf_counter() - started:.0f} s, {'quick' if quick else 'full'} run")


if __name__ == "__main__":
    main()
