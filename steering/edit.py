"""The one primitive: a low-rank affine edit of the hidden state at a site.

    x' = x + s * g * ( W (R^T x) + b )

`R` and `W` are `[d, r]`, `b` is `[d]`, `s` is the profile's strength and `g` is 1 or the value of
a gate. Every method in `steering.methods` compiles to edits, which is why requests with different
profiles can share one forward pass: a row needs two thin products per edited site, whatever the
method was.

Not covered here: how edits are applied to a batch (`steering.plan`) or stored (`steering.profile`).
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

Point = Literal["resid_pre", "attn_out", "attn_add", "mlp_out", "mlp_add", "resid_post"]
"""Where in a decoder block. In the order in which a forward pass reaches them.

`resid_pre` and `resid_post` are a block's input and output; `attn_out` and `mlp_out` the outputs
of its sublayers' last Linear, before a post-sublayer norm (Gemma-2); `attn_add` and `mlp_add` what
the sublayer adds to the residual stream, after such a norm. The two `_add` points are for reading
only: an edit there could not be folded into the weights.
"""

POINTS: tuple[Point, ...] = get_args(Point)
EDITABLE_POINTS: tuple[Point, ...] = ("resid_pre", "attn_out", "mlp_out", "resid_post")

Phase = Literal["prompt", "generation", "all"]
"""Which tokens an edit meets: positions below the original prompt length, the others, or all."""

Reduce = Literal["token", "last_prompt_token", "prompt_mean"]
Comparator = Literal["linear", ">", "<"]


@dataclass(frozen=True)
class Site:
    """A place in the network: a block (0-based) and a point in it."""

    layer: int
    point: Point

    def __post_init__(self) -> None:
        if self.layer < 0:
            raise ValueError(f"a site's layer counts from 0, got {self.layer}")
        if self.point not in POINTS:
            raise ValueError(f"unknown point {self.point!r}; expected one of {', '.join(POINTS)}")

    @property
    def order(self) -> tuple[int, int]:
        """Sorts sites in the order in which a forward pass reaches them."""
        return self.layer, POINTS.index(self.point)

    def __str__(self) -> str:
        return f"{self.layer}.{self.point}"

    @classmethod
    def parse(cls, text: str) -> Site:
        """Read `"12.resid_post"`. Raises ValueError on anything else."""
        layer, _, point = text.partition(".")
        if not layer.isdigit() or point not in POINTS:
            raise ValueError(f"a site is written LAYER.POINT, as in 12.resid_post; got {text!r}")
        return cls(int(layer), point)


def _frozen_tensor(name: str, value: Tensor) -> Tensor:
    """A private float32 copy on the CPU, checked to be finite."""
    copy = torch.as_tensor(value).detach().to(device="cpu", dtype=torch.float32, copy=True)
    if not torch.isfinite(copy).all():
        raise ValueError(f"{name} holds values that are not finite; refit the profile")
    return copy.contiguous()


@dataclass(frozen=True, eq=False)
class Gate:
    """A scalar read from the hidden state that scales an edit.

    `direction . x` is read at `site` before any edit of that very site, reduced over the row's own
    token (`token`), its last prompt token, or the mean of its prompt tokens, and used as it is
    (`linear`) or compared with `threshold` to give 0 or 1. A gate that is not per token is
    evaluated once, when the prompt has been read, and kept for the request.

    Args:
        site: where to read; at or before the site of the edit it drives.
        direction: `[d]`.
    """

    site: Site
    direction: Tensor
    reduce: Reduce = "token"
    comparator: Comparator = "linear"
    threshold: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "direction", _frozen_tensor("gate.direction", self.direction))
        if self.direction.ndim != 1:
            raise ValueError(f"a gate's direction is [d]; got shape {tuple(self.direction.shape)}")
        if self.reduce not in get_args(Reduce):
            raise ValueError(f"unknown reduce {self.reduce!r}; one of {get_args(Reduce)}")
        if self.comparator not in get_args(Comparator):
            raise ValueError(f"unknown comparator {self.comparator!r}; {get_args(Comparator)}")
        if not math.isfinite(self.threshold):
            raise ValueError("a gate's threshold must be finite")

    @property
    def latches(self) -> bool:
        """True when the value is taken once from the whole prompt and kept."""
        return self.reduce != "token"

    def value(self, projection: Tensor) -> Tensor:
        """Map raw projections (any shape) to gate values of the same shape."""
        if self.comparator == "linear":
            return projection
        above = projection > self.threshold
        return (above if self.comparator == ">" else ~above).to(projection.dtype)


@dataclass(frozen=True, eq=False)
class Edit:
    """A low-rank affine change of the hidden state at a site.

    Args:
        site: where it acts; one of the editable points.
        read: `R`, `[d, r]`. Rank 0 (no linear part) is allowed.
        write: `W`, `[d, r]`.
        shift: `b`, `[d]`.
        phase: which tokens it meets.
        skip_first_token: leave the row's first token alone. It is the attention sink in most
            models, and last-token statistics say nothing about it.
        gate: scales the edit, or None.

    Raises ValueError on shapes that do not fit, values that are not finite, a read-only site, or a
    gate that would be read after the edit.
    """

    site: Site
    read: Tensor
    write: Tensor
    shift: Tensor
    phase: Phase = "all"
    skip_first_token: bool = False
    gate: Gate | None = field(default=None)

    def __post_init__(self) -> None:
        for name in ("read", "write", "shift"):
            object.__setattr__(self, name, _frozen_tensor(name, getattr(self, name)))
        if self.site.point not in EDITABLE_POINTS:
            raise ValueError(
                f"{self.site} can be read but not edited; edit one of {', '.join(EDITABLE_POINTS)}"
            )
        if self.phase not in get_args(Phase):
            raise ValueError(f"unknown phase {self.phase!r}; one of {get_args(Phase)}")
        if self.shift.ndim != 1:
            raise ValueError(f"shift is [d]; got shape {tuple(self.shift.shape)}")
        d = self.shift.shape[0]
        if self.read.shape != self.write.shape or self.read.ndim != 2 or self.read.shape[0] != d:
            raise ValueError(
                f"read and write must both be [d, r] with d = {d}; got "
                f"{tuple(self.read.shape)} and {tuple(self.write.shape)}"
            )
        if self.gate is not None:
            if self.gate.site.order > self.site.order:
                raise ValueError(f"the gate reads {self.gate.site}, after its edit at {self.site}")
            if self.gate.direction.shape[0] != d:
                raise ValueError(
                    f"the gate's direction has {self.gate.direction.shape[0]} entries, the edit {d}"
                )

    @property
    def dimension(self) -> int:
        """Hidden size `d`."""
        return self.shift.shape[0]

    @property
    def rank(self) -> int:
        """Rank `r` of the linear part."""
        return self.read.shape[1]

    @cached_property
    def has_shift(self) -> bool:
        """True unless the shift is zero."""
        return bool(self.shift.any())

    @property
    def needs_whole_prompt(self) -> bool:
        """True when a prompt must be processed in one piece: its gate is read at the prompt's end
        but already changes earlier positions of it, or is a mean over all of it."""
        return self.gate is not None and self.gate.latches

    def in_phase(self, phase: Phase) -> Edit:
        """The same edit on other tokens; it shares this one's tensors."""
        if phase == self.phase:
            return self
        other = copy.copy(self)
        other.__dict__.pop("fingerprint", None)
        object.__setattr__(other, "phase", phase)
        return other

    def change(self, x: Tensor, gate: float | Tensor = 1.0) -> Tensor:
        """`g * (W R^T x + b)` for rows `x` `[..., d]`, in `x`'s dtype: the definition, unbatched.

        The plan computes the same thing for many rows at once; the start-up self-test and the
        tests compare the two.
        """
        read, write, shift = (t.to(x.device, x.dtype) for t in (self.read, self.write, self.shift))
        return gate * (x @ read @ write.mT + shift)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of everything that decides what the edit does."""
        digest = hashlib.sha256(json.dumps(edit_header(self), sort_keys=True).encode())
        for tensor in edit_tensors(self).values():
            digest.update(str(tuple(tensor.shape)).encode())
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()


def edit_header(edit: Edit) -> dict[str, object]:
    """The JSON half of an edit: everything but its tensors. Inverse: `edit_from_parts`."""
    gate = edit.gate
    return {
        "site": str(edit.site),
        "phase": edit.phase,
        "skip_first_token": edit.skip_first_token,
        "gate": gate
        and {
            "site": str(gate.site),
            "reduce": gate.reduce,
            "comparator": gate.comparator,
            "threshold": gate.threshold,
        },
    }


def edit_tensors(edit: Edit) -> dict[str, Tensor]:
    """The tensor half of an edit, in a fixed order."""
    tensors = {"read": edit.read, "write": edit.write, "shift": edit.shift}
    if edit.gate is not None:
        tensors["gate_direction"] = edit.gate.direction
    return tensors


def edit_from_parts(header: dict[str, object], tensors: dict[str, Tensor]) -> Edit:
    """Rebuild an edit. Raises ValueError or KeyError where the parts do not make one."""
    gate = header["gate"]
    if gate is not None and not isinstance(gate, dict):
        raise ValueError("gate must be an object or null")
    return Edit(
        site=Site.parse(str(header["site"])),
        read=tensors["read"],
        write=tensors["write"],
        shift=tensors["shift"],
        phase=header["phase"],  # type: ignore[arg-type]  # checked by Edit
        skip_first_token=bool(header["skip_first_token"]),
        gate=Gate(
            site=Site.parse(str(gate["site"])),
            direction=tensors["gate_direction"],
            reduce=gate["reduce"],
            comparator=gate["comparator"],
            threshold=float(gate["threshold"]),
        )
        if gate is not None
        else None,
    )


@dataclass(frozen=True)
class AppliedEdit:
    """An edit at the strength one request asked for."""

    edit: Edit
    strength: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.strength):
            raise ValueError(f"strength must be a finite number, got {self.strength}")


def effective_edits(edits: Iterable[AppliedEdit]) -> tuple[AppliedEdit, ...]:
    """Drop edits at strength 0: a row without effective edits is raw, bit for bit."""
    return tuple(applied for applied in edits if applied.strength != 0.0)


def edits_digest(edits: Iterable[AppliedEdit]) -> str:
    """SHA-256 (hex) of the ordered effective edits; `""` when there are none.

    Cached keys and values are valid for one digest only. Phase and gate are part of each edit's
    fingerprint.
    """
    effective = effective_edits(edits)
    if not effective:
        return ""
    text = "|".join(f"{a.edit.fingerprint}*{a.strength!r}" for a in effective)
    return hashlib.sha256(text.encode()).hexdigest()
