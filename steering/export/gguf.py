"""A control vector for llama.cpp: constant shifts of the residual stream.

The file holds `direction.N`, `[d]` float32, which llama.cpp adds to the output of its block N for
every token. Blocks count from 0 there as here, but its loader refuses `direction.0`: block 0's
output, and its input, cannot be shifted. A shift of a block's input is one of the block before.

Not covered: everything that is not a constant. Needs the package `gguf`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from steering.edit import AppliedEdit, Edit, Site
from steering.export import Job, Written
from steering.export.changes import NotExpressible

ARCHITECTURE = "controlvector"
PROVENANCE_KEY = "pilothouse.provenance"
# llama.cpp runs these families as another architecture; all others that it knows keep their name.
HINTS = {"mistral": "llama", "mixtral": "llama"}


@dataclass(frozen=True)
class Gguf:
    """Folder with one `.gguf` for `llama-server --control-vector`."""

    name: ClassVar[str] = "gguf"
    summary: ClassVar[str] = "A control vector for llama.cpp, for constant shifts."

    def check(self, job: Job) -> None:
        for applied in job.edits:
            reason = _why_no_vector(applied.edit)
            if reason is not None:
                raise NotExpressible(applied.edit, reason)

    def write(self, job: Job, folder: Path) -> Written:
        gguf = need_gguf()
        directions = _directions(job)
        path = folder / f"{job.profile.name}.gguf"
        writer = gguf.GGUFWriter(path, ARCHITECTURE)
        model_type = job.lm.config.model_type
        writer.add_string(f"{ARCHITECTURE}.model_hint", HINTS.get(model_type, model_type))
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(directions))
        writer.add_string(PROVENANCE_KEY, json.dumps(job.provenance))
        for layer, direction in directions.items():
            writer.add_tensor(f"direction.{layer}", direction.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        read = read_directions(path)[0]
        edits = tuple(AppliedEdit(shift_after(layer, value)) for layer, value in read.items())
        return Written(
            job.lm, edits, (f"use it with --control-vector {path.name} (its scale 1 is as fitted)",)
        )


FORMAT = Gguf


def need_gguf() -> Any:
    """The package, or a ValueError that says how to get it."""
    try:
        import gguf
    except ImportError:
        raise ValueError(
            "GGUF files need the package gguf: pip install pilothouse[export]"
        ) from None
    return gguf


def shift_after(layer: int, direction: Tensor) -> Edit:
    """The edit that adds `direction` `[d]` to a block's output."""
    nothing = torch.zeros(len(direction), 0)
    return Edit(Site(layer, "resid_post"), nothing, nothing, direction)


def read_directions(path: Path) -> tuple[dict[int, Tensor], dict[str, str]]:
    """Directions by block, all-zero ones left out, and the file's text fields.

    Raises ValueError where the file is not a control vector.
    """
    gguf = need_gguf()
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, OSError, IndexError) as error:
        raise ValueError(f"{path} is not a GGUF file: {error}") from error
    fields = {
        name: str(field.contents())
        for name, field in reader.fields.items()
        if field.types[:1] == [gguf.GGUFValueType.STRING]
    }
    architecture = fields.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise ValueError(f"{path} holds a {architecture}, not a control vector")
    found: dict[int, Tensor] = {}
    for tensor in reader.tensors:
        if tensor.tensor_type not in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
            raise ValueError(f"{path}: {tensor.name} is {tensor.tensor_type.name}, not F32")
        value = torch.from_numpy(np.array(tensor.data, dtype=np.float32))
        add_direction(found, path, tensor.name, value)
    return found, fields


def layer_of(path: Path, name: str) -> int:
    """The block of a tensor named `direction.N` or, as some tools write it, `N`."""
    number = name.removeprefix("direction.")
    if not number.isdecimal():
        raise ValueError(f"{path}: a control vector's tensors are named direction.N, not {name!r}")
    return int(number)


def add_direction(found: dict[int, Tensor], path: Path, name: str, value: Tensor) -> None:
    """Add a file's tensor to the directions by block, unless it is zero.

    Raises ValueError for a name that is no direction's, and for a second one of the same block.
    """
    layer = layer_of(path, name)
    if layer in found:
        raise ValueError(f"{path} holds two directions of block {layer}")
    if value.any():
        found[layer] = value.float() if value.is_floating_point() else value


def _after(site: Site) -> int:
    """The block whose output the site is; -1 for the embedding's."""
    return site.layer - (site.point == "resid_pre")


def _why_no_vector(edit: Edit) -> str | None:
    if edit.gate is not None:
        return "a control vector has no gate: it is added whatever the input"
    if edit.rank and bool((edit.write @ edit.read.mT).any()):
        return "it has a linear part (it depends on the hidden state), a control vector is constant"
    if edit.phase != "all":
        return f"it acts in the phase {edit.phase} only, a control vector is added to every token"
    if edit.skip_first_token:
        return "it leaves the first token alone, a control vector is added to every token"
    if edit.site.point not in ("resid_pre", "resid_post"):
        return "llama.cpp adds control vectors to the residual stream only"
    if _after(edit.site) < 1:
        return (
            "a shift at block 0 is not a GGUF vector: llama.cpp adds the first one after block 1 "
            "(counted from 0)"
        )
    return None


def _directions(job: Job) -> dict[int, Tensor]:
    """Every block's direction, `[d]`; zeros where nothing is added, because repeng needs all."""
    size, depth = job.lm.sites.hidden_size, len(job.lm.sites.blocks)
    found = {layer: torch.zeros(size) for layer in range(1, depth)}
    for applied in job.edits:
        found[_after(applied.edit.site)] += applied.strength * applied.edit.shift
    return found
