"""What is kept of each answer in an experiment. No text unless the operator asks for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, Self

from steering.judge import Outcome
from steering.monitor import PromptClass

Kind = Literal["exposure", "shadow"]

DEFINITION = "definition"
"""In the detail of a `registered` event, the digest of what was defined."""


@dataclass(frozen=True)
class AnswerRecord:
    """One answer of one arm.

    Args:
        id: unique; writing a record twice is writing it once. `{completion id}` of an exposure,
            `{completion id}/{arm}` of a shadow.
        time: seconds since 1970, when the answer was complete.
        version: of the experiment.
        unit: hash of who asked, hex; the same for all requests of one unit in one experiment.
        sticky: False where the unit is the request itself.
        kind: `exposure` was sent to the client; `shadow` answered the same prompt unseen.
        pair: id of the exposure that a shadow belongs to; its own id for an exposure.
        request_id: `X-Request-Id`.
        model, weights: served name, and digest of the base model's weights.
        outcome: the judge's; None where the answer was not judged (an error, a client that left).
        finish_reason: stop, length, tool_calls, cancelled or error.
        ttft_seconds, duration_seconds: from arrival to first token and to the end.
        prompt, reply: text, only where the operator keeps it.
    """

    id: str
    time: float
    experiment: str
    version: int
    arm: str
    unit: str
    sticky: bool
    kind: Kind
    pair: str
    request_id: str
    profile: str
    fingerprint: str
    strength: float | None
    model: str
    weights: str
    prompt_class: PromptClass
    benign_probability: float | None
    refusal_score: float | None
    answer_probability: float | None
    outcome: Outcome | None
    judge: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    ttft_seconds: float | None
    duration_seconds: float
    prompt: str | None = None
    reply: str | None = None

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Raises TypeError for missing or unknown fields."""
        return cls(**values)


@dataclass(frozen=True)
class EventRecord:
    """Something that happened to an experiment: it began, an arm was stopped.

    Args:
        id: unique, as above.
        kind: `guard_rail`, `stopped`, `profile_missing`, `registered`, `removed`.
        detail: figures for people.
    """

    id: str
    time: float
    experiment: str
    version: int
    kind: str
    arm: str | None
    detail: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        return cls(**values)


def definitions_of(events: Iterable[EventRecord]) -> set[str]:
    """Digests of the definitions that a version is on record with; one, if all is well."""
    found = (event.detail.get(DEFINITION) for event in events if event.kind == "registered")
    return {digest for digest in found if isinstance(digest, str)}
