"""How well a judge judges: labelled replies, and a judge's sensitivity and specificity on them.

The replies in `judge_data/` were written for this project, in ten languages and of every kind that
phrase judges get wrong. Rules are tuned on `development`; `held_out` was written before them and is
only ever counted. One author wrote both parts and the rules, so that even the held-out figures are
kinder than strangers' text would be; and hard kinds are far commoner here than in real traffic.

A partial refusal (the request itself is declined and something near it offered) is a refusal; a
limitation in passing ("I can't see live weather, but ...") is an answer.

Not covered: agreement of several labellers, other languages, whether an answer is any good.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from steering.evaluate import wilson_interval
from steering.judge import Judge, OnJudged, Outcome, ask

DATA = Path(__file__).with_name("judge_data")
Part = Literal["development", "held_out"]

LANGUAGES = {
    "en": "English",
    "de": "German",
    "fr": "French",
    "es": "Spanish",
    "it": "Italian",
    "pt": "Portuguese",
    "zh": "Chinese",
    "ja": "Japanese",
    "ru": "Russian",
    "ar": "Arabic",
}


@dataclass(frozen=True)
class Labelled:
    """A reply, what it was a reply to, and what it is."""

    language: str
    kind: str
    label: Outcome
    prompt: str
    reply: str


@cache
def labelled_replies(part: Part) -> tuple[Labelled, ...]:
    """One part of the labelled set, in the order of its file."""
    lines = (DATA / f"{part}.jsonl").read_text("utf-8").split("\n")
    return tuple(Labelled(**json.loads(line)) for line in lines if line)


def set_digest(part: Part) -> str:
    """SHA-256 (hex) of one part's file: which labelled replies a judge was measured on."""
    return hashlib.sha256((DATA / f"{part}.jsonl").read_bytes()).hexdigest()


@dataclass(frozen=True)
class Rate:
    """A count out of a total; `interval` is Wilson's, 95 %."""

    count: int
    total: int

    @property
    def value(self) -> float:
        return self.count / self.total if self.total else float("nan")

    @property
    def interval(self) -> tuple[float, float]:
        return wilson_interval(self.count, self.total) if self.total else (0.0, 1.0)

    def __str__(self) -> str:
        if not self.total:
            return "-"
        low, high = self.interval
        return f"{self.value:.3f} [{low:.3f}, {high:.3f}] of {self.total}"


@dataclass(frozen=True)
class Card:
    """What a report says of its judge.

    Args:
        sensitivity: share of the labelled refusals that it calls refusals.
        specificity: share of all other labelled replies that it does not call refusals.
    """

    version: str
    part: Part
    sensitivity: Rate
    specificity: Rate

    @property
    def n(self) -> int:
        return self.sensitivity.total + self.specificity.total

    def to_json(self) -> dict[str, Any]:
        """For provenance and reports."""
        found: dict[str, Any] = {"version": self.version, "part": self.part, "n": self.n}
        for name in ("sensitivity", "specificity"):
            rate: Rate = getattr(self, name)
            found[name] = rate.value
            found[f"{name}_95"] = list(rate.interval)
            found[f"{name}_n"] = rate.total
        return found


@dataclass(frozen=True)
class Measured:
    """A judge's outcomes on one part of the labelled set."""

    version: str
    part: Part
    replies: Sequence[Labelled]
    outcomes: Sequence[Outcome]

    def rates(
        self, keep: Callable[[Labelled], bool] = lambda reply: True
    ) -> tuple[Rate, Rate, Rate]:
        """Sensitivity, specificity and share judged exactly as labelled, of the replies kept."""
        pairs = [
            (r.label, outcome)
            for r, outcome in zip(self.replies, self.outcomes, strict=True)
            if keep(r)
        ]
        refusals = [outcome for label, outcome in pairs if label == "refusal"]
        others = [outcome for label, outcome in pairs if label != "refusal"]
        return (
            Rate(refusals.count("refusal"), len(refusals)),
            Rate(len(others) - others.count("refusal"), len(others)),
            Rate(sum(label == outcome for label, outcome in pairs), len(pairs)),
        )

    @property
    def card(self) -> Card:
        return Card(self.version, self.part, *self.rates()[:2])

    def mistakes(self) -> list[tuple[Labelled, Outcome]]:
        """What was judged differently than labelled. For the development part only: whoever tunes
        rules on the held-out part has none left."""
        return [
            (r, outcome)
            for r, outcome in zip(self.replies, self.outcomes, strict=True)
            if r.label != outcome
        ]


def measure(judge: Judge, part: Part = "held_out", on_done: OnJudged = None) -> Measured:
    """Judge one part of the labelled set."""
    replies = labelled_replies(part)
    outcomes = ask(judge, [r.reply for r in replies], [r.prompt for r in replies], on_done)
    return Measured(judge.version, part, replies, outcomes)


def render(measured: Measured) -> Iterator[str]:
    """The table in Markdown: over all, by language, by kind."""
    labels = Counter(r.label for r in measured.replies)
    counts = ", ".join(f"{count} {label}" for label, count in labels.most_common())
    yield f"Judge {measured.version} on the {measured.part.replace('_', '-')} part: {counts}."
    yield "Rates with 95 % Wilson intervals."
    yield ""
    yield "| replies | sensitivity | specificity | judged as labelled |"
    yield "|---|---|---|---|"
    yield _row("all", measured.rates())
    for code, language in LANGUAGES.items():
        yield _row(language, measured.rates(lambda r, code=code: r.language == code))  # type: ignore[misc]
    for kind in dict.fromkeys(r.kind for r in measured.replies):
        yield _row(
            kind.replace("_", " "),
            measured.rates(lambda r, kind=kind: r.kind == kind),  # type: ignore[misc]
        )


def _row(name: str, rates: Sequence[Rate]) -> str:
    return f"| {' | '.join((name, *map(str, rates)))} |"
