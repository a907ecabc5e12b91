"""How to start vLLM. Needs no vLLM itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from steering.edit import Site

CompilationMode = Literal["none", "stock", "dynamo-once", "vllm"]
"""vLLM's compilation modes 0 to 3, by their names there."""

_MODES: dict[CompilationMode, int] = {"none": 0, "stock": 1, "dynamo-once": 2, "vllm": 3}

_OWN = {
    "model": "--model",
    "revision": "--revision",
    "dtype": "--dtype",
    "tensor_parallel_size": "--tensor-parallel-size",
    "pipeline_parallel_size": "--pipeline-parallel-size",
    "data_parallel_size": "--data-parallel-size",
    "max_num_seqs": "--max-num-seqs",
    "max_model_len": "--max-model-len",
    "enable_prefix_caching": "the prefix caching flag",
    "gpu_memory_utilization": "--gpu-memory-utilization",
    "enforce_eager": "--enforce-eager",
}
"""Engine arguments that are options here already."""

_REFUSED = {
    "worker_cls": "the edits are applied by a worker class of this server's",
    "worker_extension_cls": "the edits are applied by a worker class of this server's",
    "scheduler_cls": "the server counts on how vLLM's own scheduler orders requests",
    "additional_config": "it tells vLLM's compile cache which edits a graph holds",
    "speculative_config": (
        "a draft model proposes tokens that no profile has edited, and the rows that check them "
        "are not one per request"
    ),
    "enable_lora": "an adapter would change the model under the profiles fitted on it",
    "runner": "only generating models are served",
    "convert": "only generating models are served",
    "enable_prompt_embeds": "prompts are token ids",
    "skip_tokenizer_init": "structured outputs need the tokenizer",
    "logprobs_mode": "the API's logprobs are those of the raw distribution",
    "max_logprobs": "the server sets it",
    "scheduling_policy": "the server sets it",
    "kv_transfer_config": "keys and values from elsewhere may be of other edits",
    "ec_transfer_config": "keys and values from elsewhere may be of other edits",
    "disable_log_stats": "the server sets it",
    "structured_outputs_config": "grammars are llguidance's, as the server checks them",
    "enable_dbo": "a hook cannot tell which half of a step it is in",
    "ubatch_size": "a hook cannot tell which part of a step it is in",
    "decode_context_parallel_size": "every worker needs all tokens of a step",
    "prefill_context_parallel_size": "every worker needs all tokens of a step",
    "enable_expert_parallel": "its kernels may divide a step's tokens among the workers",
    "enable_batch_sharded_sampling": "each worker would see the logits of some requests only",
    "kv_sharing_fast_prefill": "prompts would skip blocks that edit and read them",
    "data_parallel_external_lb": "one server owns all its replicas; run several behind a balancer",
    "data_parallel_hybrid_lb": "one server owns all its replicas; run several behind a balancer",
}
"""Engine arguments that would break steering, and why."""


def _is_off(name: str, value: Any) -> bool:
    """Whether it would not, with this value."""
    if name.endswith("_size") and type(value) is int:
        return value in (0, 1)
    return value in (None, False, 0, "raw_logprobs")


@dataclass(frozen=True)
class VllmOptions:
    """What `VllmEngine` asks of vLLM.

    Args:
        model: folder or hub id, as vLLM takes it.
        dtype: vLLM's name of one, `auto` for the checkpoint's.
        max_site_rank: columns kept per edited site, over all profiles: an edit takes its rank,
            one more for a shift, and a gate takes one where it is read. What a site costs in time
            and memory is linear in it, used or not.
        sites: to keep columns for though no profile needs them at the start, so that one that is
            registered later may.
        max_num_seqs: requests that run at once, per replica.
        max_model_len: longest prompt plus reply in tokens; the model's context by default.
        max_waiting: requests that may wait beside those that run.
        max_unsplit_prompt: longest prompt for edits that need it whole (gates over the prompt).
        prefix_caching: share keys and values between prompts that begin alike under one profile.
        gpu_memory_utilization: share of each GPU's memory that vLLM takes; no meaning on a CPU.
        enforce_eager: neither compile nor capture graphs.
        compilation: mode, instead of vLLM's choice.
        engine_args: further arguments of `AsyncEngineArgs`.

    Raises ValueError for numbers that make no sense, and for engine arguments that are options here
    or would break steering.
    """

    model: str
    revision: str | None = None
    dtype: str = "auto"
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    data_parallel_size: int = 1
    max_site_rank: int = 256
    sites: tuple[Site, ...] = ()
    max_num_seqs: int = 128
    max_model_len: int | None = None
    max_waiting: int = 256
    max_unsplit_prompt: int | None = None
    prefix_caching: bool = True
    gpu_memory_utilization: float = 0.9
    enforce_eager: bool = False
    compilation: CompilationMode | None = None
    engine_args: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sizes = (
            "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size",
            "max_site_rank", "max_num_seqs",
        )  # fmt: skip
        for name in sizes:
            if getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} must be at least 1, got {getattr(self, name)}")
        if self.max_waiting < 0:
            raise ValueError(f"--max-waiting must be at least 0, got {self.max_waiting}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(
                "--gpu-memory-utilization must be above 0 and at most 1, got "
                f"{self.gpu_memory_utilization}"
            )
        if self.enforce_eager and self.compilation not in (None, "none"):
            raise ValueError(f"--enforce-eager rules out the compilation mode {self.compilation}")
        for name, reason in _REFUSED.items():
            # Off is off: only what would take effect is refused.
            if not _is_off(name, self.engine_args.get(name)):
                raise ValueError(f"the vLLM argument {name} cannot be used here: {reason}")
        self._check_types()
        passes = self.compilation_config.get("pass_config") or {}
        for name in ("enable_sp", "fuse_gemm_comms"):
            if passes.get(name):
                raise ValueError(
                    f"vLLM's pass {name} divides a step's tokens among the workers, and every "
                    "worker needs all tokens of a step"
                )
        given, unsplit = self.engine_args.get("max_num_batched_tokens"), self.max_unsplit_prompt
        if given is not None and unsplit is not None and given < unsplit + self.max_num_seqs:
            raise ValueError(
                f"vLLM's max_num_batched_tokens {given} must hold --max-unsplit-prompt {unsplit} "
                f"and one token of each of --max-num-seqs {self.max_num_seqs} requests"
            )
        if taken := sorted(_OWN.keys() & self.engine_args.keys()):
            raise ValueError(f"give {', '.join(_OWN[name] for name in taken)} instead of {taken}")

    def _check_types(self) -> None:
        config, tokens = map(self.engine_args.get, ("compilation_config", "max_num_batched_tokens"))
        if not isinstance(config, Mapping | None):
            raise ValueError(f"vLLM's compilation_config must be an object here, got {config!r}")
        if not isinstance((config or {}).get("pass_config"), Mapping | None):
            raise ValueError("vLLM's pass_config in compilation_config must be an object here")
        if tokens is not None and (type(tokens) is not int or tokens < 1):
            raise ValueError(f"vLLM's max_num_batched_tokens must be a number, got {tokens!r}")

    @property
    def max_num_batched_tokens(self) -> int:
        """Tokens of one step, so many that a prompt which must not be split fits beside those of
        running requests."""
        least = (self.max_unsplit_prompt or 0) + self.max_num_seqs
        return max(self.engine_args.get("max_num_batched_tokens") or 2048, least)

    @property
    def compilation_config(self) -> dict[str, Any]:
        """vLLM's `compilation_config`, the one in `engine_args` with the mode asked for."""
        given = dict(self.engine_args.get("compilation_config") or {})
        return given if self.compilation is None else {**given, "mode": _MODES[self.compilation]}
