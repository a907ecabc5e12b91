"""What the API costs by itself: `python -m tests.benchmarks.bench_front [--quick]`.

An engine that needs no time for a token, behind the real server, with clients in another process:
how many streamed tokens per second one server process can put through, and what each costs it. An
engine on a GPU makes thousands per second; this says how many such processes they need.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import replace

import torch

from server.engine.base import EngineRequest, EngineStats, EngineToken, PromptScores
from server.hosting import Host
from server.profiles import ProfileStore
from steering.models import LanguageModel
from steering.profile import Profile
from tests.benchmarks.bench_engine import SMALL, make_model
from tests.benchmarks.client import Clients
from tests.benchmarks.servers import chat, make_tokenizer
from tests.server.live import live_server

CLIENTS = 64


class Typist:
    """An engine that has its tokens ready; all requests get their next one in turn."""

    max_model_len = 4096

    def start(self) -> None:
        pass

    def register(self, profile: Profile) -> None:
        pass

    def retain(self, profiles: Iterable[Profile]) -> None:
        pass

    def check(self, request: EngineRequest) -> None:
        pass

    def generate(self, request: EngineRequest) -> AsyncGenerator[EngineToken, None]:
        return self._type(request.sampling.max_tokens)

    def generate_all(
        self, requests: Sequence[EngineRequest]
    ) -> list[AsyncGenerator[EngineToken, None]]:
        return [self.generate(request) for request in requests]

    async def _type(self, count: int) -> AsyncGenerator[EngineToken, None]:
        for i in range(count):
            await asyncio.sleep(0)
            yield EngineToken(
                1000 + i,
                -0.5,
                finish_reason="length" if i + 1 == count else None,
                scores=PromptScores(refusal_score=-1.0) if i == 0 else None,
                queue_seconds=0.0 if i == 0 else None,
            )

    def stats(self) -> EngineStats:
        return EngineStats(running=0, waiting=0, slots=CLIENTS, slots_used=0)

    def healthy(self) -> bool:
        return True

    def close(self) -> None:
        pass


def host_of(lm: LanguageModel) -> Host:
    return Host(Typist(), lm, ProfileStore(lm, "bench"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    rounds = 3 if parser.parse_args().quick else 9
    torch.set_num_threads(1)
    lm = make_model(SMALL, torch.float32)
    lm = replace(lm, tokenizer=make_tokenizer(SMALL.vocab_size))
    requests, tokens = 2 * CLIENTS, 128
    bodies = [
        {
            "model": "bench",
            "messages": chat(lm.tokenizer, 200, i),
            "max_tokens": tokens,
            "stream_options": {"include_usage": True},
        }
        for i in range(requests)
    ]
    rates, costs = [], []
    with live_server(host_of(lm)) as address, Clients() as clients:
        for i in range(-1, rounds):
            start, start_wall = time.process_time(), time.perf_counter()
            answers = clients(address, bodies, CLIENTS)
            assert [answer.tokens for answer in answers] == [tokens] * requests
            if i >= 0:
                costs.append((time.process_time() - start) / (requests * tokens))
                rates.append(requests * tokens / (time.perf_counter() - start_wall))
    cost = statistics.median(costs)
    print(
        f"{CLIENTS} streams, {requests} requests of 200 + {tokens} tokens: {1e6 * cost:.0f} us of "
        f"the server's processor per token, so {1 / cost:.0f} tokens per second and core; "
        f"{statistics.median(rates):.0f} per second by wall clock beside the clients (n={rounds})"
    )


if __name__ == "__main__":
    main()
