"""Files of tensors with a JSON header: safetensors and nothing else. Pickle is never read.

The header lies in the metadata under one key per kind of file, with the version of its format.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

FORMAT = 1


def write_safetensors(
    path: Path | str, key: str, header: dict[str, Any], tensors: dict[str, Tensor]
) -> Path:
    """Write atomically; the file's bytes depend on its content only.

    Args:
        key: of the metadata, by kind of file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    text = json.dumps({"format": FORMAT, **header}, sort_keys=True)
    # Not `save_file`, whose files nobody but their owner can read, whatever the umask.
    partial.write_bytes(save(tensors, {key: text}))
    partial.replace(path)
    return path


def read_safetensors(
    path: Path | str, key: str, kind: str, error: type[ValueError]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a file that `write_safetensors` made.

    Args:
        kind: what it should be, for messages.
        error: raised, saying what is wrong, for any other file.
    """
    tensors, metadata = read_tensors(path, kind, error)
    try:
        header = json.loads(metadata[key])
        version = header["format"]
    except (KeyError, TypeError, json.JSONDecodeError, RecursionError):
        raise error(
            f"{path} is a safetensors file but not a {kind}: it has no {key!r} metadata"
        ) from None
    if version != FORMAT:
        raise error(f"{path} has {kind} format {version}; this version reads {FORMAT}")
    return header, tensors


def read_tensors(
    path: Path | str, kind: str, error: type[ValueError] = ValueError
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of any safetensors file; `kind` and `error` as above."""
    path = Path(path)
    if not path.is_file():
        raise error(f"there is no {kind} file at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as cause:
        raise error(
            f"{path} is not a whole safetensors file ({cause}). {kind.capitalize()}s are "
            "safetensors; pickle files (.pt, .pth, .bin) are never read."
        ) from cause
