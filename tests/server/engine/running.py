"""Run requests on an engine and collect what it answers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from server.engine.base import Engine, EngineRequest, EngineToken, Sampling
from server.engine.local import LocalEngine
from steering.edit import AppliedEdit
from steering.models import LanguageModel


@contextmanager
def running(lm: LanguageModel, **settings: Any) -> Iterator[LocalEngine]:
    engine = LocalEngine(lm, **{"max_num_seqs": 4, "max_model_len": 128, **settings})
    engine.start()
    try:
        yield engine
    finally:
        engine.close()


def ask(
    prompt: Sequence[int],
    edits: Sequence[AppliedEdit] = (),
    *,
    max_tokens: int = 8,
    temperature: float = 0.0,
    answer_probe: str | None = "",
    **sampling: Any,
) -> EngineRequest:
    return EngineRequest(
        request_id="test",
        prompt_ids=tuple(prompt),
        sampling=Sampling(temperature=temperature, max_tokens=max_tokens, **sampling),
        edits=tuple(edits),
        answer_probe=answer_probe,
    )


def prompt_of(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(0, 256, (length,), generator=generator).tolist()


async def collect(engine: Engine, request: EngineRequest) -> list[EngineToken]:
    return [token async for token in engine.generate(request)]


def stream_all(
    engine: Engine, requests: Sequence[EngineRequest], *, gap: float | None = None
) -> list[list[EngineToken]]:
    """Answers to all requests, submitted together or `gap` seconds apart."""

    async def run() -> list[list[EngineToken]]:
        tasks = []
        for request in requests:
            tasks.append(asyncio.create_task(collect(engine, request)))
            if gap is not None:
                await asyncio.sleep(gap)
        return await asyncio.gather(*tasks)

    return asyncio.run(run())


def ids(tokens: Sequence[EngineToken]) -> list[int]:
    return [token.token_id for token in tokens]


def without_end(lm: LanguageModel, tokens: Sequence[EngineToken]) -> list[int]:
    return [t for t in ids(tokens) if t not in lm.eos_token_ids]
