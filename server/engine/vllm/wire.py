"""What goes between the server and vLLM's workers: edits as safetensors bytes, the rest as JSON.

A request names edits by their numbers; no tensor ever comes with one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import safetensors
import safetensors.torch
from torch import Tensor

from server.engine.vllm.columns import PlacedEdit, PlacedGate
from steering.edit import (
    AppliedEdit,
    Phase,
    edit_from_parts,
    edit_header,
    edit_tensors,
    edits_digest,
)

_METADATA_KEY = "pilothouse.edits"
ARGUMENT = "pilothouse"
"""Under this name in `SamplingParams.extra_args`."""
Report = dict[str, Any]
"""What a worker tells of one request: `key`, and what was read, failed or found in a check."""


@dataclass(frozen=True)
class AskedEdit:
    """A registered edit by its number, at a strength, in a phase."""

    number: int
    strength: float
    phase: Phase


@dataclass(frozen=True)
class RowSteering:
    """What the workers are to do for one request.

    Args:
        key: names it in reports; vLLM's own request ids are changed on their way.
        report: tell what was read at the last prompt token.
        trace: tell what was read wherever a token is chosen.
        check: compare what the edits do with their definition, every gate counting as 1
            (self-test).
    """

    key: str
    edits: tuple[AskedEdit, ...] = ()
    report: bool = False
    trace: bool = False
    check: bool = False

    def to_json(self) -> dict[str, Any]:
        edits = [[e.number, e.strength, e.phase] for e in self.edits]
        flags = [name for name in ("report", "trace", "check") if getattr(self, name)]
        return {"key": self.key, "edits": edits, "flags": flags}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RowSteering:
        edits = tuple(AskedEdit(number, float(s), phase) for number, s, phase in data["edits"])
        return cls(data["key"], edits, **dict.fromkeys(data["flags"], True))


@dataclass(frozen=True)
class RequestEdits:
    """A request's edits and where they are.

    Args:
        placed: in the order of the request's effective edits.
    """

    applied: tuple[AppliedEdit, ...] = ()
    placed: tuple[PlacedEdit, ...] = ()

    @property
    def latches(self) -> bool:
        return any(applied.edit.needs_whole_prompt for applied in self.applied)

    def steering(self, key: str, **flags: bool) -> RowSteering:
        pairs = zip(self.placed, self.applied, strict=True)
        edits = tuple(AskedEdit(p.number, a.strength, a.edit.phase) for p, a in pairs)
        return RowSteering(key, edits, **flags)

    def cache_salt(self, *, check: bool = False) -> str | None:
        """What keeps apart keys and values of different edits.

        vLLM also keeps those of replies, which are a prompt in the next turn: they are for nobody
        else where an edit knows phases. Registered anew, an edit has another number, so that
        nothing is found that was computed while its columns were another's. Nor does a check share
        any: its gates count as 1, and it is to see its whole prompt computed.
        """
        phased = any(applied.edit.phase != "all" for applied in self.applied)
        if check or phased or self.latches:
            return uuid4().hex
        if not self.applied:
            return None
        numbers = ".".join(str(placed.number) for placed in self.placed)
        return f"{edits_digest(self.applied)}.{numbers}"


def pack_tensors(tensors: Mapping[str, Tensor]) -> bytes:
    return safetensors.torch.save({name: t.contiguous() for name, t in tensors.items()})


def unpack_tensors(data: bytes) -> dict[str, Tensor]:
    return safetensors.torch.load(data)


def pack_edits(placed: Sequence[PlacedEdit]) -> bytes:
    """Edits with their places. Inverse: `unpack_edits`."""
    header = [
        {
            "number": p.number,
            "columns": p.columns,
            "gate": p.gate and [p.gate.number, p.gate.index, p.gate.column],
            "edit": edit_header(p.edit),
        }
        for p in placed
    ]
    tensors = {
        f"{p.number}.{name}": tensor
        for p in placed
        for name, tensor in edit_tensors(p.edit).items()
    }
    # Edits of one profile may share tensors, which safetensors would refuse.
    separate = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    return safetensors.torch.save(separate, metadata={_METADATA_KEY: json.dumps(header)})


def unpack_edits(data: bytes) -> Iterable[PlacedEdit]:
    length = int.from_bytes(data[:8], "little")
    header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][_METADATA_KEY])
    tensors = safetensors.torch.load(data)
    for part in header:
        prefix = f"{part['number']}."
        own = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
        edit = edit_from_parts(part["edit"], own)
        place = part["gate"]
        gate = None
        if place is not None:
            assert edit.gate is not None
            gate = PlacedGate(edit.gate, *place)
        yield PlacedEdit(edit, part["number"], tuple(part["columns"]), gate)
