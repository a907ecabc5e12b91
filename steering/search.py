"""Choose one of several edits by what the edited model says to selection prompts.

Every option is judged on a few prompts, the best of them on more: most options are plainly bad, and
a generation costs far more than anything else that the closed-form methods do.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from steering.edit import AppliedEdit, Edit
from steering.methods import FitData
from steering.selection import Judged, blocks_at_depth, check_blocks, sample

Aim = Literal["refusal", "answer"]
"""What harmful prompts are to get. Benign ones are to be answered either way."""


@dataclass(frozen=True)
class Option:
    """Edits that may be chosen.

    Args:
        settings: JSON values that tell this option from the others.
    """

    settings: dict[str, Any]
    edits: tuple[Edit, ...]
    strength: float = 1.0


@dataclass(frozen=True)
class Search:
    """How options are compared.

    An option's score is the mean of two shares: harmful prompts with the outcome aimed at, and
    benign prompts answered; degenerate replies are failures of both. An answer to a benign prompt
    counts by the share of the topic's words that it keeps (`kept_words`): edits that replace what
    was asked still give fluent answers, to something else.

    Args:
        screened_per_kind: prompts of each label and kind that every option is judged on.
        judged_per_kind: prompts that the best ones are judged on.
        finalists: how many of the best ones.
        tolerance: scores that close to the best are equal; the first option, so the smallest
            change if they are ordered by it, is then taken.
    """

    screened_per_kind: int = 16
    judged_per_kind: int = 64
    finalists: int = 4
    tolerance: float = 0.02

    def __post_init__(self) -> None:
        if min(self.screened_per_kind, self.judged_per_kind, self.finalists) < 1:
            raise ValueError("screened_per_kind, judged_per_kind and finalists are at least 1")

    def choose(
        self, name: str, data: FitData, options: Sequence[Option], aim: Aim
    ) -> tuple[Option, dict[str, Any]]:
        """The best option, and figures of all that were judged, unedited first.

        Args:
            name: of the method, for lines of progress.

        Raises ValueError if the selection prompts lack a label.
        """
        if not data.selection.harmful or not data.selection.benign:
            raise ValueError(
                f"{name} needs harmful and benign selection prompts to choose settings"
            )
        rounds: dict[str, list[dict[str, Any]]] = {}
        left = list(options)
        if len(left) > self.finalists:
            tried = rounds["screened"] = self._judge(name, data, left, aim, self.screened_per_kind)
            scores = [figures["score"] for figures in tried[1:]]
            left = [left[i] for i in finalists(scores, self.finalists)]
        tried = rounds["judged"] = self._judge(name, data, left, aim, self.judged_per_kind)
        best = max(figures["score"] for figures in tried[1:])
        if best < tried[0]["score"]:
            data.report(
                f"warning: {name}: no option scores better than the unedited model; what follows "
                "is the best of them"
            )
        close = (
            option
            for option, figures in zip(left, tried[1:], strict=True)
            if figures["score"] >= best - self.tolerance - 1e-9
        )
        return next(close), rounds

    def _judge(
        self, name: str, data: FitData, options: Sequence[Option], aim: Aim, per_kind: int
    ) -> list[dict[str, Any]]:
        prompts = sample(data.selection.prompts, per_kind, data.seed)
        found: list[dict[str, Any]] = []
        unedited: list[str] = []
        for option in (Option({"unedited": True}, ()), *options):
            edits = [AppliedEdit(edit, option.strength) for edit in option.edits]
            with data.clock.timed("selecting"):
                replies = data.replies(prompts, edits)
                judged = Judged(prompts, data.judged(prompts, replies))
            texts = [data.lm.decode(reply) for reply in replies]
            unedited = unedited or texts
            wanted = judged.share(aim, harmful=True)
            answered = [
                kept_words(prompt.text, before, after) if outcome == "answer" else 0.0
                for prompt, outcome, before, after in zip(
                    prompts, judged.outcomes, unedited, texts, strict=True
                )
                if not prompt.harmful
            ]
            kept = sum(answered) / len(answered)
            broken = sum(o not in ("answer", "refusal") for o in judged.outcomes)
            found.append(
                {
                    **option.settings,
                    "score": (wanted + kept) / 2,
                    f"harmful_{'refused' if aim == 'refusal' else 'answered'}": wanted,
                    "benign_answered": judged.share("answer", harmful=False),
                    "benign_answered_on_topic": kept,
                    "degenerate": broken / len(prompts),
                    "outcomes": judged.to_json(),
                }
            )
            data.report(
                f"{name}: {option.settings}: {wanted:.1%} of harmful prompts end in {aim}, "
                f"{kept:.1%} of benign ones in an answer on topic, {broken} replies broken"
            )
        return found


def finalists(scores: Sequence[float], count: int) -> list[int]:
    """Indices of the `count` best scores, in order.

    Of those tied for the last places, ones spread evenly: few prompts leave many ties, and options
    are ordered by strength, so that the first of a tie would all be the weakest.
    """
    last = sorted(scores, reverse=True)[count - 1]
    better = [i for i, score in enumerate(scores) if score > last + 1e-9]
    tied = [i for i, score in enumerate(scores) if abs(score - last) <= 1e-9]
    places = count - len(better)
    steps = max(1, places - 1)
    spread = {tied[round(k * (len(tied) - 1) / steps)] for k in range(places)}
    return sorted([*better, *spread])


def kept_words(prompt: str, unedited: str, edited: str) -> float:
    """Share, of the prompt's words that the unedited reply takes up, of those the edited one keeps.

    A rough sign that a reply is still about what was asked, in any language that puts spaces
    between words. Words under four letters say nothing about the topic; 1 where none is left.
    """
    asked, before, after = (
        {word for word in re.findall(r"\w+", text.lower()) if len(word) > 3}
        for text in (prompt, unedited, edited)
    )
    taken_up = asked & before
    return len(taken_up & after) / len(taken_up) if taken_up else 1.0


def candidate_blocks(
    depth: int, blocks: Sequence[int] | None, low: float, high: float, count: int
) -> list[int]:
    """Blocks given by people, or `count` of those between two shares of the depth, evenly spread.

    Raises ValueError for blocks or shares that do not exist.
    """
    if blocks is not None:
        return check_blocks(blocks, depth)
    found = blocks_at_depth(depth, low, high)
    count = min(count, len(found))
    steps = max(1, count - 1)
    return [found[i] for i in sorted({round(k * (len(found) - 1) / steps) for k in range(count)})]
