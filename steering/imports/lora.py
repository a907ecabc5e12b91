"""LoRA adapters in PEFT's format: edits at the outputs of the sublayers' last Linears.

`o = W0 x + c` becomes `o + k B A x`. For an edit this must be a function of `o`, so `A = R^T W0`
for some `R`; then it is `o + k B R^T (o - c)`, an edit with `W = k B`. That is so for adapters that
were edits before (LLM-VA, ablation), and for any where `W0` has full column rank; a trained
adapter of `down_proj`, which has more inputs than outputs, reads what `o` no longer holds.

Not covered: DoRA, other modules, weights saved in full.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import FiniteFloat, PositiveInt, TypeAdapter, ValidationError
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from steering.edit import Edit, Point, Site
from steering.export.peft import CONFIG, PREFIX, WEIGHTS
from steering.imports.found import Found, check_numbers, read_object
from steering.models import LanguageModel
from steering.storage import read_tensors

PICKLED = "adapter_model.bin"
TOLERANCE = 1e-3
"""Part of an adapter's change that may be lost, unless its dtype rounds more coarsely."""
_SMALLEST_PIVOT = 1e-5
_CONFIG: dict[str, Any] = {
    "r": PositiveInt,
    "lora_alpha": FiniteFloat,
    "rank_pattern": dict[str, PositiveInt] | None,
    "alpha_pattern": dict[str, FiniteFloat] | None,
}
_PARTS = ("lora_A.weight", "lora_B.weight", "lora_B.bias")
_NOT_LOW_RANK = (
    "use_dora",
    "use_qalora",
    "modules_to_save",
    "layer_replication",
    "alora_invocation_tokens",
)
_POINTS: tuple[Point, ...] = ("attn_out", "mlp_out")


def read_adapter(lm: LanguageModel, folder: Path) -> Found:
    """Read an adapter's folder. ValueError where an edit cannot do what it does."""
    config = _read_config(folder)
    if not (folder / WEIGHTS).is_file() and (folder / PICKLED).is_file():
        raise ValueError(
            f"{folder / PICKLED} is a pickle, which is never read: if you trust it, load it with "
            f"peft and save it again, which writes {WEIGHTS}"
        )
    tensors, _ = read_tensors(folder / WEIGHTS, "adapter")
    for name, tensor in tensors.items():
        check_numbers(f"{folder / WEIGHTS}: {name}", tensor)
    sites = _sites(lm)
    edits, lost = [], {}
    for module, parts in _by_module(folder, tensors).items():
        if module not in sites:
            raise ValueError(
                f"{folder} changes {module}; only the last Linear of a sublayer "
                f"({', '.join(sorted({n.rpartition('.')[2] for n in sites}))}) can become an edit. "
                "Merge the adapter into the model and steer that instead"
            )
        edit, share = _edit(lm, sites[module], module, parts, _scale(config, module, parts))
        lost[module] = share
        if edit is not None:
            edits.append(edit)
    note = folder / "pilothouse.json"
    said = read_object(note, note.read_bytes()) if note.is_file() else {}
    edits.sort(key=lambda edit: edit.site.order)
    figures = {"largest_share_lost": max(lost.values(), default=0.0)}
    return Found(tuple(edits), said, figures, _notes(lm, config, said))


def _notes(
    lm: LanguageModel, config: Mapping[str, Any], said: Mapping[str, Any]
) -> tuple[str, ...]:
    base = config.get("base_model_name_or_path")
    # By its last part: a hub's model may lie in a folder here. Ours says more than a name.
    if not base or "base" in said or Path(str(base)).name == Path(lm.name).name:
        return ()
    return (f"the adapter was trained on {base}, this is {lm.name}: make sure they are the same",)


def _read_config(folder: Path) -> dict[str, Any]:
    config = read_object(folder / CONFIG, (folder / CONFIG).read_bytes())
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{folder} is a {config.get('peft_type')} adapter; only LORA is read")
    for feature in _NOT_LOW_RANK:
        if config.get(feature):
            raise ValueError(f"{folder} uses {feature}, which is no low-rank change of a weight")
    for key, kind in _CONFIG.items():
        try:
            config[key] = TypeAdapter(kind).validate_python(config.get(key))
        except ValidationError as error:
            raise ValueError(
                f"{folder / CONFIG}: {key} is {config.get(key)!r}: {error.errors()[0]['msg']}"
            ) from None
    return config


def _sites(lm: LanguageModel) -> dict[str, Site]:
    """Every sublayer's last Linear by name."""
    names = {id(module): name for name, module in lm.model.named_modules()}
    found = {}
    for layer in range(len(lm.sites.blocks)):
        for point in _POINTS:
            site = Site(layer, point)
            try:
                found[names[id(lm.sites.last_linear(site))]] = site
            except ValueError:  # a mixture of experts has no single one
                continue
    return found


def _by_module(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        part = next((part for part in _PARTS if name.endswith(f".{part}")), None)
        if part is None:
            raise ValueError(f"{folder} holds {name}, which is no part of a LoRA of a Linear")
        module = name.removeprefix(PREFIX).removesuffix(f".{part}")
        found.setdefault(module, {})[part] = tensor
    for module, parts in found.items():
        if not {"lora_A.weight", "lora_B.weight"} <= parts.keys():
            raise ValueError(f"{folder}: {module} lacks lora_A or lora_B")
    return found


def _scale(config: Mapping[str, Any], module: str, parts: Mapping[str, Tensor]) -> float:
    """`k`, as peft takes it: `alpha / r`, each possibly by module."""

    def by_module(pattern: str, default: float) -> float:
        for key, value in (config.get(pattern) or {}).items():
            try:
                matches = re.match(rf"(.*\.)?({key})$", module)
            except re.error as error:
                raise ValueError(f"{pattern} in {CONFIG}: {key!r}: {error}") from error
            if matches:
                return float(value)
        return default

    rank = by_module("rank_pattern", config["r"])
    alpha = by_module("alpha_pattern", config["lora_alpha"])
    if parts["lora_A.weight"].shape[0] != rank:
        raise ValueError(f"{module}: lora_A has {parts['lora_A.weight'].shape[0]} rows, not {rank}")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _edit(
    lm: LanguageModel, site: Site, module: str, parts: Mapping[str, Tensor], scale: float
) -> tuple[Edit | None, float]:
    """The edit (None if the adapter does nothing) and the share of the change that it lacks."""
    linear: Any = lm.model.get_submodule(module)
    base = linear.weight.detach().double().cpu()
    base = base.mT if isinstance(linear, Conv1D) else base  # [d, in]
    a, b = (parts[name].double() for name in _PARTS[:2])
    if a.shape[1] != base.shape[1] or b.shape[0] != base.shape[0] or a.shape[0] != b.shape[1]:
        raise ValueError(
            f"{module}: lora_A {list(a.shape)} and lora_B {list(b.shape)} do not fit its weight "
            f"{list(base.shape)}"
        )
    used = a.any(1) & b.any(0)  # uniform ranks are padded with zeros
    a, b = a[used], b[:, used]
    bias = parts.get("lora_B.bias")
    shift = torch.zeros(len(base)) if bias is None else bias.double() * scale
    if not used.any() and not shift.any():
        return None, 0.0
    read = _read_factor(base, a)
    out = torch.linalg.qr(b).R  # `B` has the norm of its triangle, which is thin
    share = float((out @ (a - read.mT @ base)).norm() / (out @ a).norm()) if used.any() else 0.0
    dtype = parts["lora_A.weight"].dtype
    if share > max(TOLERANCE, torch.finfo(dtype).eps):
        raise ValueError(
            f"{module}: {share:.0%} of the adapter's change depends on what the Linear's output no "
            "longer holds, so no edit of that output can do it. Merge the adapter into the model "
            "and steer that instead"
        )
    write = b * scale
    if linear.bias is not None:
        # The adapter leaves the bias alone, an edit of the output would map it too.
        mapped = write @ (read.mT @ linear.bias.detach().double().cpu())
        shift = shift - mapped
        # An edit that mapped it, exported with lora_bias, leaves rounding.
        if shift.norm() <= TOLERANCE * mapped.norm():
            shift = torch.zeros_like(shift)
    return Edit(site, read, write, shift), share


def _read_factor(base: Tensor, a: Tensor) -> Tensor:
    """`R` `[d, r]` that makes `R^T W0` closest to `A`, for `W0` `[d, in]` and `A` `[r, in]`.

    Normal equations with refinement: several times faster than a QR of `W0`, which is kept for
    weights that are ill-conditioned or have more outputs than inputs.
    """
    factor, failed = torch.linalg.cholesky_ex(base @ base.mT)
    pivots = factor.diagonal()
    if failed or pivots.min() < _SMALLEST_PIVOT * pivots.max():
        found: Tensor = torch.linalg.lstsq(base.mT, a.mT, rcond=1e-7, driver="gelsy").solution
        return found
    read = torch.zeros(len(base), len(a), dtype=base.dtype)
    for _ in range(3):
        read = read + torch.cholesky_solve(base @ (a - read.mT @ base).mT, factor)
    return read
