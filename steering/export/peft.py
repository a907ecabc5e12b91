"""A LoRA adapter in PEFT's format, for `peft` and for servers of many adapters.

For `o = W0 x` the edit `o + s W R^T o` adds `(s W) (R^T W0) x`: a LoRA with `B = s W` and
`A = R^T W0`, exact up to its rank. It is stored balanced (the singular values shared evenly), so
that servers may keep it in 16 bits, with one rank throughout (narrower modules are padded with
zeros) and `lora_alpha = r`, because servers commonly ignore rank patterns.

Not covered: embeddings, gates, shifts. Writing needs no `peft`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from steering.export import Job, Written
from steering.export.changes import Change, NotExpressible, weight_changes
from steering.fold import shared_copy
from steering.models import LanguageModel

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
_ROUNDING = 1e-7  # singular values below this share of the largest are float32 noise


@dataclass(frozen=True)
class Peft:
    """Folder that `PeftModel.from_pretrained` loads."""

    name: ClassVar[str] = "peft"
    summary: ClassVar[str] = "A LoRA adapter for peft and multi-LoRA servers."

    def check(self, job: Job) -> None:
        for change in weight_changes(job.lm, job.edits):
            module = job.lm.model.get_submodule(change.module)
            if isinstance(module, nn.Embedding):
                raise NotExpressible(
                    change.module,
                    "the edit at block 0's input changes the token embedding, and adapters of "
                    "embeddings are not something that servers take",
                )
            if not module.weight.is_floating_point():
                raise NotExpressible(change.module, f"its weights are {module.weight.dtype}")

    def write(self, job: Job, folder: Path) -> Written:
        lm, tensors = job.lm, dict[str, Tensor]()
        factors, largest_error = {}, 0.0
        for change in weight_changes(lm, job.edits):
            a, b, error = _factors(lm, change, job.max_rank)
            factors[change.module] = a, b
            largest_error = max(largest_error, error)
        rank = max(1, *(a.shape[0] for a, _ in factors.values()))
        biases = _biases(lm, job)
        for module, (a, b) in factors.items():
            pad = rank - a.shape[0]
            tensors[f"{PREFIX}{module}.lora_A.weight"] = nn.functional.pad(a, (0, 0, 0, pad))
            tensors[f"{PREFIX}{module}.lora_B.weight"] = nn.functional.pad(b, (0, pad))
            if biases:
                zeros = torch.zeros(b.shape[0])
                tensors[f"{PREFIX}{module}.lora_B.bias"] = biases.get(module, zeros)
        (folder / WEIGHTS).write_bytes(save(tensors, {"format": "pt"}))
        config = _config(lm, list(factors), rank, bias=bool(biases))
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        (folder / "pilothouse.json").write_text(json.dumps(job.provenance, indent=2) + "\n")
        notes = [f"rank {rank}, {len(factors)} modules"]
        if largest_error > 0:
            notes.append(
                f"truncated to rank {rank}: up to {largest_error:.1%} of a module's change "
                "(Frobenius norm) is lost"
            )
        else:
            notes.append("the rank is exact")
        if biases:
            notes.append(
                "modules with a bias carry its change as lora_bias: peft loads it, servers such as "
                "vLLM refuse it"
            )
        return Written(_merged(lm, folder, list(factors)), notes=tuple(notes))


FORMAT = Peft


def _factors(
    lm: LanguageModel, change: Change, max_rank: int | None
) -> tuple[Tensor, Tensor, float]:
    """`A` `[r, in]`, `B` `[d, r]` and the relative error of the truncation (0 if there is none)."""
    module = lm.model.get_submodule(change.module)
    weight = module.weight.detach().double().cpu()
    base = weight.mT if change.outputs_last else weight  # [d, in]
    q_out, r_out = torch.linalg.qr(change.write.double())
    q_in, r_in = torch.linalg.qr((change.read.double().mT @ base).mT)
    u, s, vh = torch.linalg.svd(r_out @ r_in.mT)
    kept = int((s > _ROUNDING * s[0]).sum())
    cut = min(kept, max_rank or kept)
    error = float((s[cut:kept].square().sum() / s.square().sum()).sqrt()) if cut < kept else 0.0
    root = s[:cut].sqrt()
    a = root[:, None] * (vh[:cut] @ q_in.mT)
    b = (q_out @ u[:, :cut]) * root
    return a.float().contiguous(), b.float().contiguous(), error


def _biases(lm: LanguageModel, job: Job) -> dict[str, Tensor]:
    """What the edits add through the modules' biases, where that is not zero, `[d]` each."""
    found = {}
    for change in weight_changes(lm, job.edits):
        bias = getattr(lm.model.get_submodule(change.module), "bias", None)
        if bias is not None:
            wide = bias.detach().float().cpu()
            delta = change.bias(wide) - wide
            if delta.any():
                found[change.module] = delta
    return found


def _config(lm: LanguageModel, modules: list[str], rank: int, *, bias: bool) -> dict[str, Any]:
    conv1d = any(isinstance(lm.model.get_submodule(name), Conv1D) for name in modules)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": lm.name,
        "revision": lm.revision or None,
        "r": rank,
        "lora_alpha": rank,
        "target_modules": _target_modules(lm, modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "lora_bias": bias,
        "fan_in_fan_out": conv1d,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
        "inference_mode": True,
    }


def _target_modules(lm: LanguageModel, modules: list[str]) -> list[str]:
    """Last names (`o_proj`) where they mean exactly these modules, else full names."""
    endings = {name.rpartition(".")[2] for name in modules}
    meant = {n for n, _ in lm.model.named_modules() if n.rpartition(".")[2] in endings}
    return sorted(endings) if meant == set(modules) else sorted(modules)


def _merged(lm: LanguageModel, folder: Path, modules: list[str]) -> LanguageModel:
    """The model with the adapter's content, as the file holds it, merged into shared weights."""
    tensors: Mapping[str, Tensor] = load_file(folder / WEIGHTS)
    merged = shared_copy(lm)
    for name in modules:
        a, b, bias = (
            tensors.get(f"{PREFIX}{name}.{part}")
            for part in ("lora_A.weight", "lora_B.weight", "lora_B.bias")
        )
        assert a is not None and b is not None
        module = merged.model.get_submodule(name)
        delta = (a.mT @ b.mT) if isinstance(module, Conv1D) else b @ a
        module.weight = _plus(module.weight, delta)
        if bias is not None and module.bias is not None:
            module.bias = _plus(module.bias, bias)
    return merged


def _plus(value: Tensor, delta: Tensor) -> nn.Parameter:
    wide = value.detach().float() + delta.to(value.device)
    return nn.Parameter(wide.to(value.dtype).contiguous(), requires_grad=False)
