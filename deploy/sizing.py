"""What serving costs, by arithmetic: `python deploy/sizing.py [--rate 1000] [--gpu H100] ...`.

Prints what one request costs, what a fleet for so many requests per second needs, and what the
edits add. Nothing here is measured: shares of a GPU's peaks are assumptions, printed with the rest,
and the flags change them. Needs nothing but Python.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass

GIB, MIB, KIB = 2**30, 2**20, 2**10


@dataclass(frozen=True)
class Model:
    """A Llama in bfloat16.

    Args:
        tied: whether embedding and vocabulary matrix are one.
    """

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head: int
    vocabulary: int
    tied: bool = False

    @property
    def block_weights(self) -> int:
        attention = 2 * self.hidden * (self.heads + self.kv_heads) * self.head
        return attention + 3 * self.hidden * self.intermediate

    @property
    def head_weights(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def weights(self) -> int:
        return self.layers * self.block_weights + (1 if self.tied else 2) * self.head_weights

    @property
    def weight_bytes(self) -> int:
        return 2 * self.weights

    @property
    def kv_bytes(self) -> int:
        """Keys and values of one token."""
        return 2 * 2 * self.layers * self.kv_heads * self.head

    def attention_operations(self, context: float) -> float:
        """Of one token that attends to so many: scores and their sum."""
        return 4 * self.layers * self.heads * self.head * context

    def prefill_operations(self, prompt: int) -> float:
        blocks = 2 * self.layers * self.block_weights * prompt
        return blocks + prompt * self.attention_operations(prompt / 2) + 2 * self.head_weights

    def decode_operations(self, context: float) -> float:
        weights = self.layers * self.block_weights + self.head_weights
        return 2 * weights + self.attention_operations(context)


MODELS = {
    "8b": Model("Llama-3.1-8B", 4096, 14336, 32, 32, 8, 128, 128256),
    "70b": Model("Llama-3.1-70B", 8192, 28672, 80, 64, 8, 128, 128256),
}


@dataclass(frozen=True)
class Gpu:
    """Peaks as the data sheets have them, per second: dense bfloat16 operations, float32 ones
    outside tensor cores (in which edits are computed), bytes."""

    name: str
    operations: float
    float32: float
    bandwidth: float
    memory: int


GPUS = {
    "H100": Gpu("H100 SXM", 989e12, 67e12, 3.35e12, 80 * 10**9),
    "H200": Gpu("H200", 989e12, 67e12, 4.8e12, 141 * 10**9),
    "A100": Gpu("A100 SXM 80 GB", 312e12, 19.5e12, 2.04e12, 80 * 10**9),
    "L40S": Gpu("L40S", 362e12, 91.6e12, 0.864e12, 48 * 10**9),
}


@dataclass(frozen=True)
class Assumptions:
    """What the fleet is computed from.

    Args:
        gpus: per replica, that share its weights; their exchange is not counted.
        of_operations, of_bandwidth: share of the GPU's peaks that is reached.
        of_memory: share of the GPU's memory that the engine takes.
        reserve: bytes of each GPU for activations and graphs.
        load: share of its capacity at which a replica is run, so that queues stay short.
        seqs: replies computed at once, at most.
        columns, sites: edited columns (`--max-site-rank`) at so many sites.
    """

    prompt: int
    reply: int
    rate: float
    gpus: int
    of_operations: float
    of_bandwidth: float
    of_memory: float
    reserve: float
    load: float
    seqs: int
    columns: int
    sites: int


@dataclass(frozen=True)
class Replica:
    """One engine at capacity.

    Args:
        batch: requests that run at once.
        step: seconds of a decode step.
        prefill: seconds to read a prompt.
        reply: tokens of one.
    """

    batch: int
    step: float
    prefill: float
    reply: int

    @property
    def requests(self) -> float:
        """Per second: the batch's replies take their steps, and its prompts their time between."""
        return self.batch / (self.reply * self.step + self.batch * self.prefill)

    @property
    def latency(self) -> float:
        """Seconds between two tokens of a reply, other requests' prompts included."""
        return self.step + self.prefill * self.batch / self.reply


def replica(model: Model, gpu: Gpu, a: Assumptions, *, edited: bool) -> Replica:
    operations = gpu.operations * a.of_operations * a.gpus
    bandwidth = gpu.bandwidth * a.of_bandwidth * a.gpus
    # Every GPU that shares a layer has all of its edits and computes them itself, in float32,
    # before the next product can begin.
    more_bytes = edit_bytes(model, a) if edited else 0
    more_operations = edit_operations(model, a) if edited else 0
    float32 = gpu.float32 * a.of_operations

    def edit_seconds(tokens: int) -> float:
        return max(more_bytes / bandwidth * a.gpus, more_operations * tokens / float32)

    usable = (gpu.memory * a.of_memory - a.reserve - more_bytes) * a.gpus
    free = usable - model.weight_bytes
    context = a.prompt + a.reply / 2
    batch = min(a.seqs, int(free // (model.kv_bytes * (a.prompt + a.reply))))
    if batch < 1:
        raise SystemExit(f"{model.name} does not fit {a.gpus} x {gpu.name}; see --gpus")
    read = model.weight_bytes + batch * context * model.kv_bytes
    computed = batch * model.decode_operations(context)
    step = max(read / bandwidth, computed / operations) + edit_seconds(batch)
    prefill = model.prefill_operations(a.prompt) / operations + edit_seconds(a.prompt)
    return Replica(batch, step, prefill, a.reply)


def edit_bytes(model: Model, a: Assumptions) -> int:
    """Both float32 matrices of every site."""
    return a.sites * 2 * a.columns * model.hidden * 4


def edit_operations(model: Model, a: Assumptions) -> int:
    """Per token: two products with a `[columns, hidden]` matrix at every site."""
    return a.sites * 4 * a.columns * model.hidden


def report(model: Model, gpu: Gpu, a: Assumptions) -> Iterator[str]:
    """Markdown, a line at a time."""
    tokens, end = a.prompt + a.reply, a.prompt + a.reply / 2
    prefill, decode = model.prefill_operations(a.prompt), model.decode_operations(end)
    plain, edited = (replica(model, gpu, a, edited=e) for e in (False, True))
    fleet = math.ceil(a.rate / (plain.requests * a.load))
    more = math.ceil(a.rate / (edited.requests * a.load))
    tflop, gb = 1e12, 1e9
    yield f"| {model.name} in bfloat16, {a.prompt} prompt and {a.reply} reply tokens | |"
    yield "|---|---|"
    yield f"| weights | {model.weights / 1e9:.2f} billion, {model.weight_bytes / gb:.1f} GB |"
    yield (
        f"| keys and values | {model.kv_bytes / KIB:.0f} KiB per token, "
        f"{tokens * model.kv_bytes / MIB:.0f} MiB per request at its end |"
    )
    yield f"| reading the prompt | {prefill / tflop:.1f} TFLOP, once |"
    yield (
        f"| writing the reply | {decode / 1e9:.1f} GFLOP per token, "
        f"{a.reply * decode / tflop:.1f} TFLOP in all; {model.weight_bytes / gb:.1f} GB read per "
        "step, shared by the batch |"
    )
    yield f"| **a replica of {a.gpus} x {gpu.name}** | |"
    yield (
        f"| assumed | {100 * a.of_operations:.0f} % of {gpu.operations / tflop:.0f} TFLOP/s, "
        f"{100 * a.of_bandwidth:.0f} % of {gpu.bandwidth / 1e12:.2f} TB/s, "
        f"{100 * a.of_memory:.0f} % of {gpu.memory / gb:.0f} GB, {a.reserve / gb:.0f} GB of it "
        "kept free |"
    )
    yield f"| batch | {plain.batch} (at most {a.seqs}, --max-num-seqs) |"
    yield (
        f"| at capacity | {plain.requests:.1f} requests/s, {plain.requests * a.reply:.0f} "
        f"tokens/s, {1000 * plain.latency:.0f} ms between tokens ({1000 * plain.step:.0f} ms a "
        f"decode step, {1000 * plain.prefill:.0f} ms a prompt) |"
    )
    yield (
        f"| **{a.rate:g} requests/s, at {100 * a.load:.0f} % load** | {fleet} replicas, "
        f"{fleet * a.gpus} GPUs |"
    )
    yield (f"| **edits: {a.columns} columns at {a.sites} of {2 * model.layers} sublayers** | |")
    yield (
        f"| of a step | {edit_bytes(model, a) / MIB:.1f} MiB more to read "
        f"({100 * edit_bytes(model, a) / model.weight_bytes:.2f} % of the weights), "
        f"{edit_operations(model, a) / 1e6:.1f} MFLOP per token more "
        f"({100 * edit_operations(model, a) / decode:.2f} %), in float32 at "
        f"{gpu.float32 / tflop:.0f} TFLOP/s |"
    )
    yield (
        f"| at capacity | {edited.requests:.1f} requests/s "
        f"({100 * (1 - edited.requests / plain.requests):.2f} % fewer), {more} replicas |"
    )
    yield (
        f"| a column | {2 * 4 * model.hidden / KIB:.0f} KiB per site, for one rank or one shift; "
        "all of them from the start, so that a profile takes none of its own |"
    )
    yield (
        f"| room | {a.columns} columns: as many rank-1 profiles at a site, or "
        f"{a.columns // 9} of rank 8 with a shift |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="8b")
    parser.add_argument("--gpu", choices=GPUS, default="H100")
    parser.add_argument("--gpus", type=int, default=1, help="per replica (tensor parallel)")
    parser.add_argument("--rate", type=float, default=1000.0, help="requests per second")
    parser.add_argument("--prompt", type=int, default=512, help="tokens")
    parser.add_argument("--reply", type=int, default=256, help="tokens")
    parser.add_argument("--seqs", type=int, default=256, help="--max-num-seqs")
    parser.add_argument("--load", type=float, default=0.7, help="share of the capacity")
    parser.add_argument("--of-operations", type=float, default=0.5)
    parser.add_argument("--of-bandwidth", type=float, default=0.6)
    parser.add_argument("--columns", type=int, default=256, help="--max-site-rank")
    parser.add_argument("--sites", type=int, default=24)
    o = parser.parse_args()
    assumed = Assumptions(
        prompt=o.prompt,
        reply=o.reply,
        rate=o.rate,
        gpus=o.gpus,
        of_operations=o.of_operations,
        of_bandwidth=o.of_bandwidth,
        of_memory=0.9,
        reserve=4e9,
        load=o.load,
        seqs=o.seqs,
        columns=o.columns,
        sites=o.sites,
    )
    for line in report(MODELS[o.model], GPUS[o.gpu], assumed):
        print(line)


if __name__ == "__main__":
    main()
