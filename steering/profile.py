"""Profiles: named edits with provenance, stored as safetensors and nothing else.

A profile file holds the edits' tensors (`edit.0.read`, ...) and, under the metadata key
`pilothouse`, one JSON object: format version, name, method, the edits' headers, the base model's
fingerprint, provenance and card. Pickle is never read.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steering.edit import (
    AppliedEdit,
    Edit,
    edit_from_parts,
    edit_header,
    edit_tensors,
    effective_edits,
)
from steering.models import LanguageModel, ModelFingerprint
from steering.storage import read_safetensors, write_safetensors

_METADATA_KEY = "pilothouse"
IMPORTED = "imported"
"""The `method` of profiles that no method here has fitted (`steering.imports`)."""
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


class ProfileError(ValueError):
    """A profile that cannot be read or used as asked; the message says why and what to do."""


def check_name(name: str) -> None:
    """Raise ProfileError unless a profile can have this name."""
    if not _NAME.fullmatch(name):
        raise ProfileError(
            f"{name!r} is not a profile name: use up to 64 lower-case letters, digits, '.', '_' "
            "and '-', starting with a letter or digit"
        )


@dataclass(frozen=True, eq=False)
class Profile:
    """Named edits that a server offers.

    Args:
        name: lower-case letters, digits, `.`, `_`, `-`; clients name the profile by it.
        method: the method that fitted it, a module of `steering.methods`, or `IMPORTED`.
        edits: none for a profile that leaves the model alone.
        base: the model it belongs to; None only where there are no edits.
        strength: applied when a request names none.
        red_team: it removes refusals, and is served only to keys that name it.
        provenance: how it was made: hyper-parameters, prompt-set digests, versions, date.
        card: what to tell people: a sentence, and held-out results.
    """

    name: str
    method: str
    edits: tuple[Edit, ...] = ()
    base: ModelFingerprint | None = None
    strength: float = 1.0
    red_team: bool = False
    provenance: dict[str, Any] = field(default_factory=dict)
    card: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_name(self.name)
        if self.edits and self.base is None:
            raise ProfileError(f"profile {self.name}: edits need the base model they belong to")
        if len({edit.dimension for edit in self.edits}) > 1:
            raise ProfileError(f"profile {self.name}: its edits differ in hidden size")
        try:
            self.applied(self.strength)
        except ValueError as error:
            raise ProfileError(f"profile {self.name}: {error}") from None

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of what the profile does; `""` for one without edits."""
        if not self.edits:
            return ""
        parts = [edit.fingerprint for edit in self.edits]
        return hashlib.sha256("|".join([*parts, repr(self.strength)]).encode()).hexdigest()

    def applied(self, strength: float | None = None) -> tuple[AppliedEdit, ...]:
        """The effective edits at a strength (the profile's own if None)."""
        s = self.strength if strength is None else strength
        return effective_edits(AppliedEdit(edit, s) for edit in self.edits)

    def check_base(self, lm: LanguageModel, *, allow_derived: bool = False) -> None:
        """Raise ProfileError if the profile does not belong to this model."""
        if self.base is not None:
            reason = self.base.mismatch(lm.fingerprint, allow_derived=allow_derived)
            if reason is not None:
                raise ProfileError(f"profile {self.name} does not fit {lm.name}: {reason}")
        for edit in self.edits:
            if edit.dimension != lm.sites.hidden_size:
                raise ProfileError(
                    f"profile {self.name}: its edits have hidden size {edit.dimension}, "
                    f"{lm.name} has {lm.sites.hidden_size}"
                )
            gate = edit.gate
            for site in [edit.site] + ([gate.site] if gate is not None else []):
                try:
                    lm.sites.module_at(site)
                except ValueError as error:
                    raise ProfileError(f"profile {self.name}: {error}") from None

    def save(self, path: Path | str) -> Path:
        """Write the profile; the file's bytes depend on its content only."""
        header = {
            "name": self.name,
            "method": self.method,
            "edits": [edit_header(edit) for edit in self.edits],
            "base": self.base and self.base.to_json(),
            "strength": self.strength,
            "red_team": self.red_team,
            "provenance": self.provenance,
            "card": self.card,
        }
        tensors = {
            f"edit.{i}.{name}": tensor
            for i, edit in enumerate(self.edits)
            for name, tensor in edit_tensors(edit).items()
        }
        return write_safetensors(path, _METADATA_KEY, header, tensors)

    @classmethod
    def load(cls, source: Path | str | bytes, *, called: str | None = None) -> Profile:
        """Read a profile. Raises ProfileError for anything that is not a whole, sound one.

        Args:
            source: a file, or the bytes of one.
            called: how messages name the source; its path by default. Bytes need it.
        """
        # Imported here because the methods' contract is written in terms of profiles' parts.
        from steering import methods

        path = called or str(source)
        header, tensors = read_safetensors(
            source, _METADATA_KEY, "profile", ProfileError, called=path
        )
        if header.get("method") not in (*methods.names(), IMPORTED):
            raise ProfileError(
                f"{path} was made by the unknown method {header.get('method')!r}; this version "
                f"knows {', '.join(methods.names())}"
            )
        try:
            base, parts = header["base"], header["edits"]
            if not isinstance(parts, list):
                raise ValueError("edits must be a list")
            numbers = {name.removeprefix("edit.").partition(".")[0] for name in tensors}
            if stray := numbers - set(map(str, range(len(parts)))):
                raise ValueError(f"it holds tensors of edits {', '.join(sorted(stray))} it lacks")
            if not all(tensor.dtype in _DTYPES for tensor in tensors.values()):
                raise ValueError("its tensors must be of 16, 32 or 64 bit floating point")
            return cls(
                name=str(header["name"]),
                method=str(header["method"]),
                edits=tuple(
                    edit_from_parts(part, _with_prefix(tensors, f"edit.{i}."))
                    for i, part in enumerate(parts)
                ),
                base=ModelFingerprint(**base) if base is not None else None,
                strength=float(header["strength"]),
                red_team=bool(header["red_team"]),
                provenance=dict(header["provenance"]),
                card=dict(header["card"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            what = f"missing {error}" if isinstance(error, KeyError) else str(error)
            raise ProfileError(f"{path} is not a sound profile: {what}") from error


RAW = Profile(name="raw", method="raw", card={"summary": "The unedited model."})
"""The profile that leaves the model alone; every server offers it."""


def _with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
