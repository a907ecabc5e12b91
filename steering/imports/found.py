"""What importers share: their result, and what a file says about itself."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steering.edit import Edit


@dataclass(frozen=True)
class Found:
    """What a file holds.

    Args:
        edits: what it does.
        said: what it says about itself.
        figures: measured while reading, for the provenance.
        notes: lines for people: what speaks against the file, but does not rule it out.
    """

    edits: tuple[Edit, ...]
    said: dict[str, Any]
    figures: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_object(where: Path | str, text: bytes | str) -> dict[str, Any]:
    """A JSON object. Raises ValueError naming where it was found for anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where} does not hold a JSON object")
    return value


def check_numbers(where: str, tensor: Tensor) -> None:
    """Raise ValueError unless a tensor holds finite floating-point numbers."""
    if not tensor.is_floating_point():
        raise ValueError(f"{where} holds {tensor.dtype}, expected floating-point numbers")
    if not torch.isfinite(tensor.float()).all():
        raise ValueError(f"{where} holds values that are not finite")
