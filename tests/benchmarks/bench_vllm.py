"""The vLLM engine against stock vLLM and the local engine: `make bench-vllm [ARGS=--quick]`.

Random weights of a Qwen2.5-0.5B's shape in bfloat16, on vLLM's CPU build, a worker on one core.
Ratios are of wall clock, so leave the machine alone meanwhile: vLLM's scheduler spins on the second
core while its worker computes, and makes processor time say little. Rounds are interleaved, of
engines that are up at the same time. Both sides compute logprobs of the tokens chosen, which every
reply of this server's carries, unless a line says otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from vllm import AsyncEngineArgs, SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from server.engine.base import Engine, EngineRequest, Sampling
from server.engine.local import LocalEngine
from server.engine.vllm.engine import VllmEngine
from server.engine.vllm.options import VllmOptions
from steering.edit import Site
from steering.models import LanguageModel
from steering.profile import Profile
from steering.weightless import load_without_weights
from tests.benchmarks.bench_engine import (
    QWEN,
    Edits,
    alphasteer,
    edit,
    llm_va,
    make_model,
    pca_ot,
    random_prompt,
)
from tests.benchmarks.harness import Table, measure
from tests.benchmarks.servers import make_tokenizer

SEQS, LENGTH = 64, 256
FEW, MANY = 8, 256
"""Columns: what the mixture needs, and the server's default."""
PARTS = "a eager, b compiled, c with 256 columns, d distinct profiles, e the local engine"


def save_model(folder: Path) -> None:
    lm = make_model(QWEN, torch.bfloat16)
    lm.model.save_pretrained(folder)
    make_tokenizer(QWEN.vocab_size).save_pretrained(folder)


def profile(lm: LanguageModel, name: str, edits: Edits) -> Profile:
    found = tuple(applied.edit for applied in edits)
    return Profile(name, "llm_va", edits=found, base=lm.fingerprint)


def addition(d: int) -> Edits:
    """A shift on three blocks' outputs."""
    return [edit(Site(layer, "resid_post"), d, 0, layer) for layer in (9, 12, 15)]


def mixture(lm: LanguageModel) -> list[Profile]:
    d = lm.sites.hidden_size
    found = {"llm-va": llm_va, "alphasteer": alphasteer, "pca-ot": pca_ot, "addition": addition}
    return [profile(lm, name, make(d)) for name, make in found.items()]


def distinct(lm: LanguageModel, count: int) -> list[Profile]:
    """Rank-1 profiles at the same eight sites."""
    d = lm.sites.hidden_size
    return [
        profile(
            lm,
            f"p{i}",
            [
                edit(Site(layer, "resid_post"), d, 1, 100 * i + layer, shift=False)
                for layer in range(0, 24, 3)
            ],
        )
        for i in range(count)
    ]


@contextmanager
def steered(
    lm: LanguageModel, profiles: Sequence[Profile], columns: int, *, eager: bool
) -> Iterator[VllmEngine]:
    options = VllmOptions(
        lm.name,
        dtype="bfloat16",
        max_site_rank=columns,
        max_num_seqs=SEQS,
        max_model_len=LENGTH,
        prefix_caching=False,
        enforce_eager=eager,
    )
    engine = VllmEngine(lm, options, profiles=profiles)
    engine.start()
    try:
        yield engine
    finally:
        engine.close()


class Stock:
    """vLLM by itself, of the same sizes, on a thread of its own."""

    def __init__(self, model: str, *, eager: bool) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        args = AsyncEngineArgs(
            model,
            dtype="bfloat16",
            max_num_seqs=SEQS,
            max_model_len=LENGTH,
            max_num_batched_tokens=2048,
            enable_prefix_caching=False,
            enforce_eager=eager,
            generation_config="vllm",
            disable_log_stats=True,
        )

        async def start() -> AsyncLLM:
            return AsyncLLM.from_engine_args(args)

        self._llm = asyncio.run_coroutine_threadsafe(start(), self._loop).result()
        self._asked = 0

    def serve(self, prompts: Sequence[list[int]], tokens: int, logprobs: int | None = 0) -> None:
        async def one(prompt: list[int]) -> int:
            sampling = SamplingParams(
                temperature=0,
                max_tokens=tokens,
                ignore_eos=True,
                detokenize=False,
                logprobs=logprobs,
                output_kind=RequestOutputKind.DELTA,
            )
            self._asked += 1
            outputs = self._llm.generate(
                {"prompt_token_ids": prompt}, sampling, request_id=str(self._asked)
            )
            return sum([len(output.outputs[0].token_ids) async for output in outputs])

        async def every() -> list[int]:
            return await asyncio.gather(*map(one, prompts))

        counts = asyncio.run_coroutine_threadsafe(every(), self._loop).result()
        assert counts == [tokens] * len(prompts)

    def close(self) -> None:
        self._llm.shutdown()
        self._loop.call_soon_threadsafe(self._loop.stop)


def serve(
    engine: Engine, prompts: Sequence[list[int]], tokens: int, profiles: Sequence[Profile] = ()
) -> None:
    """Prompt i under profile i, beginning again where they end."""
    applied = [p.applied() for p in profiles] or [()]
    requests = [
        EngineRequest(
            str(i),
            tuple(prompt),
            Sampling(temperature=0, max_tokens=tokens),
            applied[i % len(applied)],
        )
        for i, prompt in enumerate(prompts)
    ]

    async def one(request: EngineRequest) -> int:
        return len([token async for token in engine.generate(request)])

    async def every() -> list[int]:
        return await asyncio.gather(*map(one, requests))

    assert asyncio.run(every()) == [tokens] * len(prompts)


def bench_mixture(table: Table, lm: LanguageModel, columns: int, eager: bool, rounds: int) -> None:
    profiles, prompts, tokens = mixture(lm), [random_prompt(32, i) for i in range(16)], 32
    how = "eager" if eager else "compiled"
    stock = Stock(lm.name, eager=eager)
    with steered(lm, profiles, columns, eager=eager) as engine:
        arms: dict[str, Callable[[], object]] = {
            "stock": lambda: stock.serve(prompts, tokens),
            "bare": lambda: stock.serve(prompts, tokens, None),
            "raw": lambda: serve(engine, prompts, tokens),
            "mixed": lambda: serve(engine, prompts, tokens, profiles),
        }
        paired = measure(arms, rounds).by_wall()
    stock.close()
    what = f"{how}, 16 x (32 + 32), {columns} columns: "
    # Columns cost, used or not; the goals are for about as many as the profiles fill.
    goals = (0.97, 0.99) if columns == FEW else (None, None)
    table.add(what + "4 profiles vs stock", paired, "mixed", "stock", goals[0])
    table.add(what + "unedited vs stock", paired, "raw", "stock", goals[1])
    table.add(what + "unedited vs stock without logprobs", paired, "raw", "bare")


def bench_distinct(table: Table, lm: LanguageModel, count: int, rounds: int) -> None:
    profiles, prompts, tokens = distinct(lm, count), [random_prompt(8, i) for i in range(64)], 16
    with steered(lm, profiles, count, eager=False) as engine:
        some = [1, 4, 16, count]
        arms: dict[str, Callable[[], object]] = {
            str(n): lambda n=n: serve(engine, prompts, tokens, profiles[:n])  # type: ignore[misc]
            for n in some
        }
        paired = measure(arms, rounds).by_wall()
    for n in some[1:]:
        what = f"64 x (8 + 16), {count} columns at 8 sites: {n} profiles vs 1"
        table.add(what, paired, str(n), "1", 1 / 1.05)


def bench_local(table: Table, lm: LanguageModel, whole: LanguageModel, rounds: int) -> None:
    profiles, prompts, tokens = mixture(lm), [random_prompt(32, i) for i in range(16)], 32
    local = LocalEngine(whole, max_num_seqs=16, max_model_len=LENGTH)
    local.start()
    with steered(lm, profiles, FEW, eager=False) as engine:
        arms: dict[str, Callable[[], object]] = {
            "vllm": lambda: serve(engine, prompts, tokens, profiles),
            "local": lambda: serve(local, prompts, tokens, profiles),
        }
        paired = measure(arms, rounds).by_wall()
    local.close()
    what = "compiled, 16 x (32 + 32), 4 profiles: vLLM engine vs local engine"
    table.add(what, paired, "vllm", "local")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--only", default="abcde", help="parts to run, as in --only=ab: " + PARTS)
    options = parser.parse_args()
    rounds, only = 5 if options.quick else 15, options.only
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    torch.set_num_threads(1)
    started = time.perf_counter()
    table = Table()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "bench"
        save_model(folder)
        lm = load_without_weights(str(folder), dtype=torch.bfloat16)
        for part, eager, columns in (("a", True, FEW), ("b", False, FEW), ("c", False, MANY)):
            if part in only:
                bench_mixture(table, lm, columns, eager, rounds)
        if "d" in only:
            bench_distinct(table, lm, 64, max(5, rounds // 2))
        if "e" in only:
            bench_local(table, lm, make_model(QWEN, torch.bfloat16), rounds)
    table.note(f"{time.perf_counter() - started:.0f} s, {'quick' if options.quick else 'full'} run")


if __name__ == "__main__":
    main()
