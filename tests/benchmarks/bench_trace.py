"""What traces cost: `python -m tests.benchmarks.bench_trace [--quick]`.

Decode steps of 16 rows over four profiles: of an engine that cannot trace, of this one without a
traced row, with one, and with all of them. Every figure is a speed ratio (1: no cost), the median
of the paired ratios of one interleaved run, on one thread.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch

from server.engine.base import EngineRequest, Sampling
from server.engine.cache import SlotCache, layer_shapes
from server.engine.hooks import Hooks
from server.engine.rows import Row, Waiting
from server.engine.scheduler import Scheduler
from server.engine.stream import Courier, Outbox
from server.engine.tracing import any_traced, read_traces, traced_sites
from steering.demo import DEMO
from steering.edit import Site
from steering.models import LanguageModel, load_model
from steering.monitor import Monitor, Probe
from steering.plan import Steering
from steering.profile import Profile
from tests.benchmarks.bench_engine import (
    QWEN,
    Edits,
    alphasteer,
    llm_va,
    make_model,
    pca_ot,
    random_prompt,
)
from tests.benchmarks.harness import Table, measure

ROWS, PROMPT = 16, 32


class Untracing(Scheduler):
    """An engine that knows nothing of traces."""

    def _decode(self, rows: list[Row]) -> None:
        logits, _ = self.runner.run(rows, [1] * len(rows), decoding=True)
        self._lost = 0
        nothing = [None] * len(rows)
        self._choose(rows, logits, nothing, nothing)


class Batch:
    """Rows that decode one token per call of `step`.

    Args:
        profiles: edits and key of the answer probe; the rows take turns.
        traced: of the rows.
    """

    def __init__(
        self,
        lm: LanguageModel,
        monitor: Monitor,
        profiles: Sequence[tuple[Edits, str]],
        traced: int,
        steps: int,
        engine: type[Scheduler] = Scheduler,
    ) -> None:
        cache = SlotCache(layer_shapes(lm.model), ROWS, PROMPT + steps + 1)
        hooks = Hooks(Steering(lm.sites))
        hooks.pin(monitor.sites)
        self.hooks = hooks
        self.scheduler = engine(
            lm, hooks, cache, ROWS, Courier(), chunk=256, budget=1024, monitor=monitor
        )
        for i in range(ROWS):
            edits, probe = profiles[i % len(profiles)]
            prompt = [token % lm.model.config.vocab_size for token in random_prompt(PROMPT, i)]
            sampling = Sampling(temperature=0, max_tokens=steps + 1)
            request = EngineRequest(
                "", tuple(prompt), sampling, tuple(edits), probe, trace=i < traced
            )
            nobody = Outbox(cast(Any, None))
            nobody.cancelled = True  # nothing is sent
            self.scheduler.add(Waiting(request, nobody))
        with torch.inference_mode():
            while len(self.scheduler.slots.decoding) < ROWS:
                self.scheduler.step()

    @torch.inference_mode()
    def step(self) -> None:
        self.scheduler.step()
        assert len(self.scheduler.slots.decoding) == ROWS

    def looking(self, times: int = 1000) -> float:
        """Seconds that a step without traced rows spends on traces."""
        rows = self.scheduler.slots.decoding
        start = time.process_time()
        for _ in range(times):
            traced_sites(rows)
            any_traced(rows)
            read_traces(rows, cast(Any, None), range(len(rows)))
        return (time.process_time() - start) / times


def bench(
    table: Table,
    what: str,
    lm: LanguageModel,
    monitor: Monitor,
    profiles: Sequence[tuple[Edits, str]],
    rounds: int,
    target: float | None,
) -> None:
    kinds: dict[str, tuple[int, type[Scheduler]]] = {
        "cannot": (0, Untracing),
        "none": (0, Scheduler),
        "one": (1, Scheduler),
        "all": (ROWS, Scheduler),
    }
    # Rows that read their prompts step by step decode some tokens before the others do.
    steps = rounds + 64
    batches = {k: Batch(lm, monitor, profiles, n, steps, e) for k, (n, e) in kinds.items()}
    arms: dict[str, Callable[[], None]] = {name: batch.step for name, batch in batches.items()}
    paired = measure(arms, rounds, warmup=2)
    for batch in batches.values():
        batch.hooks.steering.detach()
    table.add(f"{what}: no row traced vs an engine without traces", paired, "none", "cannot")
    share = batches["none"].looking() / paired.median("none")
    table.note(
        f"{what}: looking for traced rows where there are none: {100 * share:.3f} % of a step  "
        f"target 0.5 % {'met' if share <= 0.005 else 'MISSED'}"
    )
    table.add(f"{what}: 1 row of {ROWS} traced vs none", paired, "one", "none", target)
    table.add(f"{what}: {ROWS} rows of {ROWS} traced vs none", paired, "all", "none", target)


def qwen_monitor(lm: LanguageModel, keys: Sequence[str]) -> Monitor:
    d = lm.sites.hidden_size

    def probe(layer: int, auroc: float) -> Probe:
        return Probe(Site(layer, "resid_post"), torch.randn(d) / d, 0.0, auroc, 0.0)

    benign = (probe(6, 0.9), probe(12, 0.95))
    return Monitor(lm.fingerprint, benign, {key: probe(20, 0.9) for key in keys}, (1, 2))


def demo() -> tuple[LanguageModel, Monitor, list[tuple[Edits, str]]]:
    lm = load_model(str(DEMO / "model"), dtype=torch.float32)
    lm.model.generation_config.eos_token_id = []  # no reply ends
    monitor = Monitor.load(DEMO / "profiles" / "monitor.safetensors")
    files = [f for f in sorted((DEMO / "profiles").glob("*.safetensors")) if f.stem != "monitor"]
    profiles = [Profile.load(file) for file in files]
    edited = [(p.applied(p.strength), p.fingerprint) for p in profiles]
    return lm, monitor, [((), ""), *edited]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="fewer rounds, and the demo model only"
    )
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    started = time.perf_counter()
    table = Table()
    lm, monitor, profiles = demo()
    bench(table, "demo", lm, monitor, profiles, 41 if quick else 301, None)
    if not quick:
        torch.manual_seed(0)
        lm = make_model(QWEN, torch.bfloat16)
        d = lm.sites.hidden_size
        keys = ("", "a", "b", "c")
        edits: list[Edits] = [(), llm_va(d), alphasteer(d), pca_ot(d)]
        monitor = qwen_monitor(lm, keys)
        bench(table, "0.5B", lm, monitor, list(zip(edits, keys, strict=True)), 31, 0.95)
    table.note(f"{time.perf_counter() - started:.0f} s, {'quick' if quick else 'full'} run")


if __name__ == "__main__":
    main()
