"""Which settings belong to which engine, and whether it can be had at all.

Used by `server.settings`, so it imports nothing heavy.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Collection
from typing import Any

LOCAL_SEQS = 16
VLLM_SEQS = 128

LOCAL_ONLY = {
    "fold": "vLLM loads the weights itself; write them with `pilothouse export --format hf` and "
    "serve that folder",
    "device": "vLLM takes what its build is for",
    "threads": "vLLM binds them itself (VLLM_CPU_OMP_THREADS_BIND)",
    "prefill_chunk": "vLLM's is the engine argument max_num_batched_tokens (--vllm-args)",
}
"""Settings that only the local engine knows, with what to do under vLLM."""

VLLM_ONLY = (
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "data_parallel_size",
    "max_site_rank",
    "steer_site",
    "gpu_memory_utilization",
    "enforce_eager",
    "vllm_args",
)


def check_engine(engine: str, changed: Collection[str], *, prefix_caching: bool) -> None:
    """Raise ValueError for what makes no sense with this engine.

    Args:
        changed: settings that are not what they are by default.
        prefix_caching: whether `--prefix-cache-mib` is more than 0.
    """
    if engine == "local":
        for name in VLLM_ONLY:
            if name in changed:
                raise ValueError(f"{_flag(name)} is for --engine vllm")
        return
    for name, advice in LOCAL_ONLY.items():
        if name in changed:
            raise ValueError(f"{_flag(name)} is for the local engine: {advice}")
    if "prefix_cache_mib" in changed and prefix_caching:
        raise ValueError(
            "--prefix-cache-mib can only be 0 with --engine vllm: its prefixes "
            "lie in the memory for keys and values that it takes anyway"
        )
    if importlib.util.find_spec("vllm") is None:
        raise ValueError(
            "--engine vllm needs vLLM: pip install 'pilothouse[vllm]' (Linux, with a GPU; "
            "the README says how on a CPU)"
        )


def parse_vllm_args(text: str) -> dict[str, Any]:
    """`--vllm-args`. Raises ValueError."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"--vllm-args is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError("--vllm-args must be a JSON object of engine arguments")
    return value


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
