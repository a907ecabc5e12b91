"""Files of tensors with a JSON header: safetensors and nothing else. Pickle is never read.

The header lies in the metadata under one key per kind of file, with the version of its format.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

FORMAT = 1

_MAX_DEPTH = 64
"""Of JSON headers. What is nested deeper was made to break a reader."""


def write_safetensors(
    path: Path | str, key: str, header: dict[str, Any], tensors: dict[str, Tensor]
) -> Path:
    """Write atomically; the file's bytes depend on its content only.

    Args:
        key: of the metadata, by kind of file.

    Raises OSError where it cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Of one process alone: several may be writing the same file.
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    text = json.dumps({"format": FORMAT, **header}, sort_keys=True)
    try:
        # Not `save_file`, whose files nobody but their owner can read, whatever the umask.
        partial.write_bytes(save(tensors, {key: text}))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def read_safetensors(
    source: Path | str | bytes,
    key: str,
    kind: str,
    error: type[ValueError],
    *,
    called: str | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a file that `write_safetensors` made.

    Args:
        source: a file, or the bytes of one, which no other process can change while it is read.
        kind: what it should be, for messages.
        error: raised, saying what is wrong, for any other file.
        called: how messages name the source; bytes need it.
    """
    called = called or str(source)
    tensors, metadata = read_tensors(source, kind, error, called=called)
    try:
        header = json.loads(metadata[key])
        version = header["format"]
        _check_text(header)
    except (KeyError, TypeError, ValueError, RecursionError):
        raise error(
            f"{called} is a safetensors file but not a {kind}: it has no sound {key!r} metadata"
        ) from None
    if version != FORMAT:
        raise error(f"{called} has {kind} format {version}; this version reads {FORMAT}")
    return header, tensors


def read_tensors(
    source: Path | str | bytes,
    kind: str,
    error: type[ValueError] = ValueError,
    *,
    called: str | None = None,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of any safetensors file; arguments as above."""
    called = called or str(source)
    if not (isinstance(source, bytes) or Path(source).is_file()):
        raise error(f"there is no {kind} file at {called}")
    try:
        if isinstance(source, bytes):
            tensors = load(source)  # checks the header, so that the next lines may trust it
            size = int.from_bytes(source[:8], "little")
            return tensors, json.loads(source[8 : 8 + size]).get("__metadata__") or {}
        with safe_open(source, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, RuntimeError) as cause:
        raise error(
            f"{called} is not a whole safetensors file ({cause}). {kind.capitalize()}s are "
            "safetensors; pickle files (.pt, .pth, .bin) are never read."
        ) from cause


def _check_text(header: Any) -> None:
    """Raise ValueError for JSON that could not be written again: text that is no Unicode (half of
    a surrogate pair), or too deep."""
    level, depth = [header], 0
    while level:
        if (depth := depth + 1) > _MAX_DEPTH:
            raise ValueError("nested too deeply")
        below: list[Any] = []
        for value in level:
            if isinstance(value, str):
                value.encode()
            elif isinstance(value, dict):
                below += [*value, *value.values()]
            elif isinstance(value, list):
                below += value
        level = below
