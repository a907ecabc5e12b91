"""Fitting: collecting against bare forward passes, solving against collecting, sweeps, memory.

What is measured on fewer prompts than its line speaks of says so there.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from server.engine.offline import OfflineGenerator
from steering.activations import batches_by_length, gather_activations, read_activations
from steering.clock import Clock, peak_memory
from steering.demo import DEMO
from steering.demo.fit import prompt_set
from steering.demo.table import REPLY_TOKENS
from steering.edit import Site
from steering.fit import fit_profile
from steering.generate import generate
from steering.methods import FitData, discover
from steering.methods.alphasteer import AlphaSteer
from steering.models import LanguageModel, load_model
from steering.prompts import PromptSet
from steering.resume import KeptStates
from steering.selection import sample
from tests.benchmarks.bench_engine import QWEN, SMALL, make_model
from tests.benchmarks.harness import Paired, Table, measure
from tests.benchmarks.scripted import States, numbered, numbered_model, scripted_data

CLOSED_FORM = (
    "activation_addition",
    "affine_concept_editing",
    "leace",
    "optimal_transport",
    "alphasteer",
)
PROMPTS = 2000
SHALLOW = LlamaConfig(**{**SMALL.to_dict(), "num_hidden_layers": 3})


def _lengths(lm: LanguageModel, prompts: int) -> list[int]:
    return [len(lm.encode_prompt(p.text)) for p in numbered(prompts).prompts]


def closed_form() -> list[str]:
    return [name for name in CLOSED_FORM if name in discover()]


def bench_collecting(lm: LanguageModel, prompts: int, batch_tokens: int, rounds: int) -> Paired:
    """A batch per round, in both arms: states after every block, kept, or nothing but the model."""
    ids = [lm.encode_prompt(p.text) for p in numbered(prompts).prompts]
    batches = list(batches_by_length(_lengths(lm, prompts), batch_tokens))
    sites = [Site(layer, "resid_post") for layer in range(len(lm.sites.blocks))]
    turn = {"collect": 0, "bare": 0}

    def next_batch(arm: str) -> list[list[int]]:
        turn[arm] += 1
        return [ids[i] for i in batches[turn[arm] % len(batches)]]

    def collect() -> None:
        gather_activations(lm, next_batch("collect"), sites, batch_tokens=batch_tokens)

    @torch.inference_mode()
    def bare() -> None:
        batch = next_batch("bare")
        width = max(map(len, batch))
        rows = torch.tensor([[*row, *[0] * (width - len(row))] for row in batch])
        lm.model(rows, use_cache=False, logits_to_keep=1)

    return measure({"collect": collect, "bare": bare}, rounds)


def bench_solving(table: Table, lm: LanguageModel, seconds_per_prompt: float, of: int) -> None:
    """Closed-form methods on made-up states of 2,000 prompts; replies and states cost nothing.

    Each method reads as many prompts as it wants to; that is what its solving is compared with.
    """
    for name in closed_form():
        method, clock, states = discover()[name], Clock(time.process_time), States()
        data = scripted_data(lm, method, PROMPTS, reader=states, clock=clock)
        solving = fit_profile(method(), data).provenance["seconds"]["solving"]
        collecting = states.prompts * seconds_per_prompt
        share = solving / collecting
        table.note(
            f"{name:24} solving {solving:6.2f} s, collecting {states.prompts} prompts "
            f"{collecting:6.1f} s (linearly from {of}): {share:6.2%}  "
            f"target 20% {'met' if share <= 0.2 else 'MISSED'}"
        )


def bench_sweep(table: Table, lm: LanguageModel, prompts: int) -> None:
    """Fits of AlphaSteer over rho, the penalty and strength, which share one pass of states."""
    forwards: list[int] = []
    handle = lm.model.register_forward_pre_hook(lambda *_: forwards.append(1))
    with tempfile.TemporaryDirectory() as folder:
        data = scripted_data(lm, AlphaSteer, prompts, reader=KeptStates(Path(folder)))
        start = time.perf_counter()
        fit_profile(AlphaSteer(), data)
        first, passes = time.perf_counter() - start, len(forwards)
        found = set()
        start = time.perf_counter()
        for rho in (0.2, 0.3, 0.4, 0.5):
            for scale in (0.1, 1.0):
                for strength in (0.2, 0.4):
                    method = AlphaSteer(rho=rho, alpha_scale=scale, strength=strength)
                    found.add(fit_profile(method, data).fingerprint)
    handle.remove()
    further = len(forwards) - passes
    table.note(
        f"AlphaSteer, {prompts} prompts: first fit {first:.1f} s and {passes} forward passes; "
        f"{len(found)} more of rho, a and s {time.perf_counter() - start:.1f} s and {further} "
        f"forward passes  target 0 {'met' if further == 0 else 'MISSED'}"
    )


def print_peaks(name: str, prompts: int) -> None:
    """Prints the MiB that this process needed at most, before and after it fitted."""
    torch.set_num_threads(1)
    lm = numbered_model(make_model(SHALLOW, torch.float32))
    method = discover()[name]
    before = peak_memory()
    # Small batches, so that the fewest prompts fill several already.
    reader = partial(read_activations, batch_tokens=512)
    fit_profile(method(), scripted_data(lm, method, prompts, reader=reader))
    print(before, peak_memory())


def bench_memory(table: Table, counts: tuple[int, ...]) -> None:
    for name in closed_form():
        before, peaks = 0.0, []
        for count in counts:
            command = [sys.executable, "-m", "tests.benchmarks.bench_fit", "--memory", name]
            done = subprocess.run([*command, str(count)], check=True, capture_output=True)
            before, peak = map(float, done.stdout.split()[-2:])
            peaks.append(peak)
        same = peaks[-1] / peaks[0] - 1 <= 0.05
        shown = ", ".join(f"{p:.0f} MiB for {c}" for p, c in zip(peaks, counts, strict=True))
        table.note(
            f"{name:24} peak memory: {before:.0f} MiB with the model, {shown} prompts  "
            f"target no growth (5 %) {'met' if same else 'MISSED'}"
        )


def bench_phases(table: Table, per_kind: int, methods: dict[str, Callable[[], Any]]) -> None:
    """Whole fits on the demo model, replies by the batched engine."""
    lm = load_model(str(DEMO / "model"), dtype=torch.float32)
    fit, selection = (
        PromptSet(tuple(sample(prompt_set(split).prompts, per_kind, 0)))
        for split in ("fit", "selection")
    )
    with OfflineGenerator() as generator:
        ids = [lm.encode_prompt(prompt.text) for prompt in fit.prompts[:32]]
        arms = {
            "engine": lambda: generator(lm, ids, max_tokens=REPLY_TOKENS),
            "alone": lambda: [generate(lm, [i], max_tokens=REPLY_TOKENS) for i in ids],
        }
        what = "demo model, 32 replies: batched engine vs one prompt at a time"
        table.add(what, measure(arms, 3), "engine", "alone")
        for name, method in methods.items():
            data = FitData(lm, fit, selection, generator=generator, reply_tokens=REPLY_TOKENS)
            seconds = fit_profile(method(), data).provenance["seconds"]
            shown = ", ".join(f"{phase} {value:6.2f} s" for phase, value in seconds.items())
            table.note(f"{name:24} {shown}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, about 2 minutes")
    parser.add_argument("--memory", nargs=2, metavar=("METHOD", "PROMPTS"), help="internal")
    options = parser.parse_args()
    if options.memory:
        print_peaks(options.memory[0], int(options.memory[1]))
        return
    quick = options.quick
    torch.set_num_threads(1)
    started = time.perf_counter()
    table = Table()
    small = numbered_model(make_model(SMALL, torch.float32))
    paired = bench_collecting(small, 1000, 2048, 8 if quick else 16)
    what = "states after 8 blocks, 1,000 prompts of 12-20, vs bare (fp32)"
    table.add(what, paired, "collect", "bare", 0.9)
    bench_sweep(table, small, 128 if quick else 256)
    qwen = numbered_model(make_model(QWEN, torch.bfloat16))
    count = 128 if quick else 1000
    batches = len(list(batches_by_length(_lengths(qwen, count), 2048)))
    paired = bench_collecting(qwen, count, 2048, batches)
    what = f"states after 24 blocks, {count:,} prompts of 12-20, vs bare (0.5B)"
    table.add(what, paired, "collect", "bare", 0.9)
    bench_solving(table, qwen, sum(paired.seconds["collect"]) / count, count)
    del qwen
    bench_memory(table, (250, 1000))
    methods: dict[str, Any] = {name: m for name, m in discover().items() if name != "raw"}
    if quick:
        methods = {name: methods[name] for name in closed_form()}
    table.note(f"demo model, {(12 if quick else 16)} prompts of each of 4 classes:")
    bench_phases(table, 12 if quick else 16, methods)
    table.note(f"{time.perf_counter() - started:.0f} s, {'quick' if quick else 'full'} run")


if __name__ == "__main__":
    main()
