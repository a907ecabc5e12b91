"""What is compared: profiles at strengths, on sets of prompts, with one way of decoding."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from steering.edit import AppliedEdit, edits_digest
from steering.models import LanguageModel
from steering.profile import RAW, Profile
from steering.prompts import PromptSet, load_prompts
from steering.template import form_of

_LABELS = {"harmful": True, "harmless": False, "benign": False}


@dataclass(frozen=True)
class Arm:
    """A profile at a strength."""

    profile: Profile
    strength: float

    @property
    def main(self) -> bool:
        """Whether this is the profile as it is served, not a point of a sweep."""
        return self.strength == self.profile.strength

    @property
    def name(self) -> str:
        """`llm-va`, or `llm-va at 0.5` at another strength than its own."""
        return self.profile.name + ("" if self.main else f" at {self.strength:g}")

    @property
    def edits(self) -> tuple[AppliedEdit, ...]:
        return self.profile.applied(self.strength)

    @property
    def digest(self) -> str:
        """Of what it does; arms that do the same share it, and with it their responses.

        Covers the profile's edits and the strength. `""` for the unedited model.
        """
        return edits_digest(self.edits)


RAW_ARM = Arm(RAW, RAW.strength)


def arms_of(profiles: Iterable[Profile], strengths: Sequence[float] = ()) -> list[Arm]:
    """Every profile at its own strength, those with edits at `strengths` too; raw comes first.

    The order is that of the profiles, then by strength. Raises ValueError for two profiles of one
    name.
    """
    named = {RAW.name: RAW}
    for profile in profiles:
        if profile.name in named and named[profile.name] is not RAW:
            raise ValueError(f"there are two profiles named {profile.name}; rename one of them")
        if profile.name == RAW.name and profile.edits:
            raise ValueError("a profile with edits cannot be named raw: raw is the unedited model")
        named[profile.name] = profile
    return [
        Arm(profile, strength)
        for profile in named.values()
        for strength in sorted({profile.strength, *(strengths if profile.edits else ())})
    ]


@dataclass(frozen=True)
class Decoding:
    """How replies are drawn.

    Args:
        max_tokens: of a reply.
        temperature: 0 takes the most likely token.
        top_p, top_k: as in `server.engine.base.Sampling`.
        seed: with temperature, the same prompt meets the same chance under every arm.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def seed_of(self, prompt: str) -> int:
        """The seed of a prompt's reply, another for each prompt."""
        return int(_sha256(f"{self.seed} {prompt}")[:8], 16)


@dataclass(frozen=True)
class NamedPrompts:
    """A set of prompts with the name it is reported under.

    Args:
        source: the file it came from, or how it was made.
    """

    name: str
    prompts: PromptSet
    source: str = ""


def read_prompt_file(argument: str) -> NamedPrompts:
    """Prompts of `FILE`, `FILE:harmful`, `FILE:benign` or `FILE:DATASET`.

    Raises ValueError naming what is malformed, or that a label is missing.
    """
    path, colon, suffix = argument.rpartition(":")
    if not colon or Path(argument).exists():
        return NamedPrompts(Path(argument).stem, load_prompts(argument), argument)
    if suffix in _LABELS:
        found = load_prompts(path, harmful=_LABELS[suffix])
    else:
        found = load_prompts(path, dataset=suffix)
    return NamedPrompts(Path(path).stem, found, path)


def distinct_names(sets: Sequence[NamedPrompts]) -> None:
    """Raise ValueError where two sets would be reported under one name."""
    names = [found.name for found in sets]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two prompt files are named {name}; rename one of them")


def response_key(lm: LanguageModel, arm: Arm, prompt: str, decoding: Decoding) -> str:
    """SHA-256 (hex) of everything that decides a reply; resuming looks replies up by it."""
    parts = [lm.fingerprint.digest, arm.digest, _sha256(prompt), asdict(decoding)]
    return _sha256(json.dumps([*parts, str(lm.dtype), form_of(lm).to_json()], sort_keys=True))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
