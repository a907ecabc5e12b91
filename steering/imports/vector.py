"""Control vectors of llama.cpp and repeng: shifts of the residual stream after a block.

Not covered: repeng's `normalize` and other operators, which no file mentions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from steering.export.gguf import HINTS, PROVENANCE_KEY, add_direction, read_directions, shift_after
from steering.imports.found import Found, check_numbers, read_object
from steering.models import LanguageModel
from steering.storage import read_tensors


def read_vector(lm: LanguageModel, path: Path) -> Found:
    """Read a `.gguf` or `.safetensors`. ValueError if it is not a vector for this model."""
    if path.suffix == ".gguf":
        directions, fields = read_directions(path)
        hint = fields.get("controlvector.model_hint", "")
        said = read_object(f"{path}: {PROVENANCE_KEY}", fields.get(PROVENANCE_KEY, "{}"))
    else:
        directions, metadata = _safetensors_directions(path)
        hint = metadata.get("model_type") or metadata.get("model_hint", "")
        said = dict[str, Any](metadata)
    family = str(lm.config.model_type)
    plain = {str(n).replace("_", "").replace("-", "") for n in (family, HINTS.get(family, family))}
    if hint and hint.replace("_", "").replace("-", "") not in plain:
        raise ValueError(f"{path} was made for a {hint} model, {lm.name} is a {family}")
    depth, size = len(lm.sites.blocks), lm.sites.hidden_size
    for layer, direction in directions.items():
        check_numbers(f"{path}: direction.{layer}", direction)
        if layer >= depth:
            raise ValueError(f"{path}: direction.{layer}, but {lm.name} has {depth} blocks, from 0")
        if tuple(direction.shape) != (size,):
            raise ValueError(
                f"{path}: direction.{layer} has shape {list(direction.shape)}, {lm.name} has "
                f"hidden size {size}"
            )
    edits = tuple(shift_after(layer, directions[layer]) for layer in sorted(directions))
    return Found(edits, said)


def _safetensors_directions(path: Path) -> tuple[dict[int, Tensor], dict[str, str]]:
    tensors, metadata = read_tensors(path, "control vector")
    directions: dict[int, Tensor] = {}
    for name, value in tensors.items():
        add_direction(directions, path, name, value)
    return directions, metadata
