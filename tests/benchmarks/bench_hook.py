"""What edits add to a decode step: `python -m tests.benchmarks.bench_hook [--quick]`.

The tensor program that the vLLM engine puts into a model's blocks (`SiteProgram`), in a decode loop
of Llama-3.1-8B's shape with random weights: on a GPU captured as a CUDA graph, as vLLM does it, for
batches of 1 to 256, 1 to 256 distinct profiles, edits at one layer and at all. On a CPU, a small
shape in its place, which shows that it runs and no more.

Every ratio is the median of paired ratios of one interleaved run (above 1: faster than without
edits). Beside it stands what memory bandwidth alone would allow: the bytes of a step without and
with edits, over each other.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from server.engine.vllm.program import SiteProgram, TokenInputs
from tests.benchmarks.harness import measure


@dataclass(frozen=True)
class Shape:
    """Of a Llama, and how long the sequences are that it decodes."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    context: int

    @property
    def head(self) -> int:
        return self.hidden // self.heads

    @property
    def block_parameters(self) -> int:
        attention = 2 * self.hidden * (self.heads + self.kv_heads) * self.head
        return attention + 3 * self.hidden * self.intermediate

    def step_bytes(self, batch: int, width: int) -> int:
        """Weights, keys and values that a decode step reads; `width` bytes per value."""
        weights = self.layers * self.block_parameters + self.vocabulary * self.hidden
        cached = 2 * self.layers * batch * self.context * self.kv_heads * self.head
        return (weights + cached) * width

    def step_operations(self, batch: int) -> int:
        """Floating-point operations of a decode step, a multiplication and an addition as two."""
        weights = self.layers * self.block_parameters + self.vocabulary * self.hidden
        attention = 2 * self.layers * self.context * self.heads * self.head
        return 2 * batch * (weights + attention)


LLAMA_8B = Shape(4096, 14336, 32, 32, 8, 128256, context=512)
SMALL = Shape(256, 704, 4, 4, 2, 2048, context=32)


class Decoder(nn.Module):
    """Blocks that pass on (hidden, residual), as vLLM's do, and a vocabulary matrix."""

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape = shape
        g = torch.Generator(device).manual_seed(0)

        def weight(rows: int, columns: int) -> Tensor:
            return torch.randn(rows, columns, generator=g, device=device, dtype=dtype) * rows**-0.5

        width = shape.heads * shape.head
        kv = shape.kv_heads * shape.head
        self.blocks = [
            (
                weight(shape.hidden, width + 2 * kv),
                weight(width, shape.hidden),
                weight(shape.hidden, 2 * shape.intermediate),
                weight(shape.intermediate, shape.hidden),
            )
            for _ in range(shape.layers)
        ]
        self.head = weight(shape.hidden, shape.vocabulary)
        self.embedding = weight(shape.vocabulary, shape.hidden)
        self.gain = torch.ones(shape.hidden, device=device, dtype=dtype)

    def forward(self, ids: Tensor, cache: Tensor, programs: dict[int, SiteProgram]) -> Tensor:
        """The next ids `[B]` of sequences whose keys and values are `cache`
        `[L, 2, B, H, context, head]`; a step writes its own into the last place. The programs, by
        layer, edit what blocks put out."""
        shape, batch = self.shape, len(ids)
        hidden, residual = self.embedding[ids], torch.zeros_like(self.embedding[ids])
        for layer, (qkv, out, up, down) in enumerate(self.blocks):
            residual = residual + hidden
            mixed = self._norm(residual) @ qkv
            sizes = [shape.heads * shape.head, *[shape.kv_heads * shape.head] * 2]
            q, k, v = (t.view(batch, -1, 1, shape.head) for t in mixed.split(sizes, dim=1))
            keys, values = cache[layer, :, :batch]
            keys[:, :, -1:], values[:, :, -1:] = k, v
            attended = F.scaled_dot_product_attention(q, keys, values, enable_gqa=True)
            residual = residual + attended.flatten(1) @ out
            gate, wide = (self._norm(residual) @ up).chunk(2, dim=1)
            hidden = (F.silu(gate) * wide) @ down
            if layer in programs:
                hidden = programs[layer](hidden, residual)
        return (self._norm(residual + hidden) @ self.head).argmax(-1)

    def _norm(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (self.shape.hidden,), self.gain, 1e-5)


class Edits:
    """Programs at some layers, with as many columns each as all profiles together may have."""

    def __init__(
        self, shape: Shape, layers: Collection[int], columns: int, tokens: int, device: str
    ) -> None:
        self.columns = columns
        self.inputs = TokenInputs(tokens, device)
        self.table = torch.zeros(tokens + 1, columns, device=device)
        g = torch.Generator().manual_seed(1)
        self.programs = {}
        for layer in layers:
            program = SiteProgram(self.inputs, shape.hidden, self.table)
            read = torch.randn(shape.hidden, columns, generator=g) / shape.hidden
            program.put_columns(range(columns), read, read)
            self.programs[layer] = program

    def for_profiles(self, batch: int, profiles: int) -> tuple[Callable[[], None], ...]:
        """Two functions that give every row one of so many profiles, each of which has its share
        of the columns: one for once, and one for each step, as the engine does it."""
        each = max(1, self.columns // profiles)
        table = torch.zeros_like(self.table)
        for i in range(profiles):
            table[1 + i, torch.arange(i * each, (i + 1) * each) % self.columns] = 1.0
        slots = 1 + torch.arange(batch) % profiles
        if self.table.device.type == "cuda":
            slots = slots.pin_memory()

        def register() -> None:
            self.table.copy_(table)

        def fill() -> None:
            self.inputs.slot[:batch].copy_(slots, non_blocking=True)

        return register, fill

    def added_bytes(self) -> int:
        """That a step reads more: both matrices of each site."""
        return sum(p.read.numel() + p.write.numel() for p in self.programs.values()) * 4

    def added_operations(self, batch: int, hidden: int) -> int:
        return len(self.programs) * batch * 4 * self.columns * hidden


def step_of(
    decoder: Decoder, ids: Tensor, cache: Tensor, programs: dict[int, SiteProgram]
) -> Callable[[], object]:
    """A decode step; on a GPU a graph of one, which replays without Python."""
    if ids.device.type != "cuda":

        def step() -> None:
            ids.copy_(decoder(ids, cache, programs))

        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            decoder(ids, cache, programs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ids.copy_(decoder(ids, cache, programs))
    return graph.replay


def copy_bandwidth(device: str) -> float:
    """Bytes per second, read and written, that copying a large tensor reaches."""
    source = torch.empty(2**30 if device == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        for _ in range(5):
            target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()

    return 10 * source.numel() / min(measure({"copy": copy}, 5).wall["copy"])


def repeat(
    steps: int,
    device: str,
    step: Callable[[], object],
    before: Callable[[], None] = lambda: None,
    each: Callable[[], None] = lambda: None,
) -> Callable[[], None]:
    """A function that decodes so many tokens per row, and waits for the last."""

    def run() -> None:
        before()
        for _ in range(steps):
            each()
            step()
        if device == "cuda":
            torch.cuda.synchronize()

    return run


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer batches, profiles and rounds")
    parser.add_argument(
        "--compile", action="store_true", help="compile model and edits first, as vLLM does"
    )
    parser.add_argument("--columns", type=int, default=256, help="as --max-site-rank")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = LLAMA_8B if device == "cuda" else SMALL
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    batches = (1, 16, 256) if device == "cuda" else (1, 16)
    if device == "cuda" and not options.quick:
        batches = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    profiles = (1, 16) if options.quick else (1, 4, 16, 64, 256)
    rounds, steps = (5, 5) if options.quick else (21, 20)
    most = max(*batches, *profiles)
    torch.set_num_threads(1)

    decoder = Decoder(shape, device, dtype)
    if options.compile:
        # A graph for each batch and set of sites; beyond the limit they would run uncompiled.
        torch._dynamo.config.recompile_limit = 8 * len(batches)
        decoder.compile()
    kv = (shape.layers, 2, max(batches), shape.kv_heads, shape.context, shape.head)
    cache = torch.randn(kv, device=device, dtype=dtype)
    sites = {"1 layer": [shape.layers // 2], "all layers": range(shape.layers)}
    edits = {
        name: Edits(shape, layers, options.columns, most, device) for name, layers in sites.items()
    }
    bandwidth = copy_bandwidth(device)
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU, one thread"
    print(f"{name}, {bandwidth / 1e9:.0f} GB/s by copying; {shape}; {options.columns} columns")
    for what, e in edits.items():
        print(
            f"{what}: {e.added_bytes() / 2**20:.1f} MiB and "
            f"{e.added_operations(1, shape.hidden) / 1e6:.1f} MFLOP per token more, of "
            f"{shape.step_bytes(1, dtype.itemsize) / 2**20:.0f} MiB and "
            f"{shape.step_operations(1) / 1e6:.0f} MFLOP at batch 1"
        )
    print(f"{'batch':>5} {'edits':>11} {'profiles':>8} {'ms/token':>9} {'tokens/s':>9} "
          f"{'speed':>7} {'by bandwidth':>12} {'stock over its floor':>21}")  # fmt: skip
    for batch in batches:
        ids = torch.zeros(batch, dtype=torch.long, device=device)
        stock = step_of(decoder, ids, cache, {})
        edited = {what: step_of(decoder, ids, cache, e.programs) for what, e in edits.items()}

        arms = {"stock": repeat(steps, device, stock)}
        for what, e in edits.items():
            for count in (n for n in profiles if n <= batch):
                register, fill = e.for_profiles(batch, count)
                arms[f"{what}|{count}"] = repeat(steps, device, edited[what], register, fill)
        paired = measure(arms, rounds, warmup=2).by_wall()
        plain = shape.step_bytes(batch, dtype.itemsize)
        over_floor = paired.median("stock") / steps / (plain / bandwidth)
        for arm in arms:
            if arm == "stock":
                continue
            what, _, count = arm.partition("|")
            seconds = paired.median(arm) / steps
            speed = statistics.median(paired.speeds(arm, "stock"))
            allowed = plain / (plain + edits[what].added_bytes())
            print(
                f"{batch:5} {what:>11} {count:>8} {1000 * seconds:9.3f} {batch / seconds:9.0f} "
                f"{speed:7.3f} {allowed:12.3f} {over_floor:21.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
