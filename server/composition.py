"""What a request asks to be applied: one profile or several, how strongly, and to which tokens.

Several profiles are applied in the order given: their edits are those of the first, then those of
the second, and so on. Edits at one site read the same state, and their changes add.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from server.errors import InvalidRequestError
from server.profiles import COMPOSED, ProfileStore
from server.protocol import SteeringChoice
from steering.edit import AppliedEdit, Edit, Phase, edits_digest
from steering.profile import Profile


@dataclass(frozen=True)
class Part:
    """One profile at the strength asked for."""

    profile: Profile
    strength: float


@dataclass(frozen=True)
class Composition:
    """What one request asked for, understood.

    Args:
        parts: in the order of application; at least one.
        phase: replaces that of every edit; None leaves each its own.
        edits: effective ones, for the engine; none of a profile that is folded into the weights.
    """

    parts: tuple[Part, ...]
    phase: Phase | None
    edits: tuple[AppliedEdit, ...]

    @property
    def profiles(self) -> tuple[Profile, ...]:
        return tuple(part.profile for part in self.parts)

    @property
    def name(self) -> str:
        """The profile's name, or all names joined in order: `a+b`."""
        return "+".join(part.profile.name for part in self.parts)

    @property
    def label(self) -> str:
        """Value of `profile` in metrics: there are too many compositions for a label each."""
        return self.name if len(self.parts) == 1 else COMPOSED

    @cached_property
    def fingerprint(self) -> str:
        """The profile's own, or the digest of the ordered effective edits of several."""
        if len(self.parts) == 1:
            return self.parts[0].profile.fingerprint
        return edits_digest(self.edits)

    @property
    def strength(self) -> float | None:
        """Of the one profile; several have one each."""
        return self.parts[0].strength if len(self.parts) == 1 else None

    @property
    def answer_probe(self) -> str | None:
        """The key of the probe calibrated for just this, None if nobody did."""
        if not any(part.profile.applied(part.strength) for part in self.parts):
            return ""
        if len(self.parts) > 1:
            return None
        [part] = self.parts
        rephased = any(self.phase not in (None, edit.phase) for edit in part.profile.edits)
        same = part.strength == part.profile.strength and not rephased
        return part.profile.fingerprint if same else None


def compose(store: ProfileStore, model: str, steering: SteeringChoice | None) -> Composition:
    """What `model` and `steering` ask for together. Raises ApiError."""
    if steering is None:
        profile = store.choose(model)
        part = Part(profile, profile.strength)
        return Composition((part,), None, tuple(_applied(store, part)))
    if steering.profiles is None:
        profile = store.choose(model, steering.profile)
        own = profile.strength if steering.strength is None else steering.strength
        parts = [Part(profile, own)]
    else:
        parts = _parts(store, model, steering)
    for i, part in enumerate(parts):
        if part.profile.name == store.folded:
            _check_folded(part, steering, i)
    edits = [a for part in parts for a in _applied(store, part)]
    if steering.phase is not None:
        edits = [replace(a, edit=_in_phase(a.edit, steering.phase)) for a in edits]
    return Composition(tuple(parts), steering.phase, tuple(edits))


def _parts(store: ProfileStore, model: str, steering: SteeringChoice) -> list[Part]:
    assert steering.profiles is not None
    for other in ("profile", "strength"):
        if getattr(steering, other) is not None:
            raise InvalidRequestError(
                f"'steering.profiles' and 'steering.{other}' exclude each other; give each of "
                "'profiles' its own 'strength'.",
                param=f"steering.{other}",
            )
    if (named := store.named_by(model)) is not None:
        raise InvalidRequestError(
            f"'model' asks for the profile {named!r} and 'steering.profiles' for others; send "
            f"'model': {store.served_name!r}.",
            param="steering.profiles",
        )
    parts: list[Part] = []
    for i, choice in enumerate(steering.profiles):
        profile = store.resolve(choice.name, param=f"steering.profiles[{i}].name")
        strength = profile.strength if choice.strength is None else choice.strength
        if profile in [part.profile for part in parts]:
            raise InvalidRequestError(
                f"'steering.profiles' names {profile.name!r} twice; name it once, with the sum of "
                "the strengths.",
                param=f"steering.profiles[{i}].name",
            )
        parts.append(Part(profile, strength))
    return parts


def _check_folded(part: Part, steering: SteeringChoice, index: int) -> None:
    name, own = part.profile.name, part.profile.strength
    field = "strength" if steering.profiles is None else f"profiles[{index}].strength"
    if part.strength != own:
        raise InvalidRequestError(
            f"{name!r} is folded into the weights at strength {own}; leave 'steering.{field}' out.",
            param=f"steering.{field}",
        )
    if steering.phase is not None:
        raise InvalidRequestError(
            f"{name!r} is folded into the weights, which meet every token; leave 'steering.phase' "
            "out.",
            param="steering.phase",
        )


def _applied(store: ProfileStore, part: Part) -> Sequence[AppliedEdit]:
    return () if part.profile.name == store.folded else part.profile.applied(part.strength)


def _in_phase(edit: Edit, phase: Phase) -> Edit:
    """The edit on other tokens.

    Raises InvalidRequestError where a linear gate is read once, at the prompt: it is the size of
    the change there, and generated tokens would all get that one vector, whatever they are. A
    threshold is a condition, and a gate that is read at each token belongs there.
    """
    gate = edit.gate
    measures = gate is not None and gate.latches and gate.comparator == "linear"
    if measures and phase not in ("prompt", edit.phase):
        raise InvalidRequestError(
            f"The gate of the edit at {edit.site} measures the prompt and means nothing for "
            f"generated tokens; it cannot have the phase {phase!r}.",
            param="steering.phase",
        )
    return edit.in_phase(phase)
