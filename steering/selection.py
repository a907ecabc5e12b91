"""Choosing settings on selection prompts: depths to try, prompts to judge, rates to compare.

What a method prefers is its own business; here is what they share.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from steering.edit import AppliedEdit
from steering.hyper_parameters import check_depth
from steering.judge import Outcome
from steering.methods import FitData
from steering.prompts import Prompt


def blocks_at_depth(count: int, low: float, high: float) -> list[int]:
    """Blocks `l` of `count` with `low <= l / count <= high`; the nearest one if there is none."""
    check_depth(low, high)
    found = [
        block for block in range(count) if low <= block / count + 1e-9 and block / count <= high
    ]
    return found or [min(range(count), key=lambda block: abs(block / count - (low + high) / 2))]


def check_blocks(blocks: Sequence[int], count: int) -> list[int]:
    """Blocks given by people, in order. Raises ValueError unless they are distinct and exist."""
    ordered = sorted(set(blocks))
    if not ordered or len(ordered) < len(blocks) or ordered[0] < 0 or ordered[-1] >= count:
        raise ValueError(f"blocks {list(blocks)}: give distinct ones from 0 to {count - 1}")
    return ordered


def group_of(prompt: Prompt) -> str:
    """The class a prompt is reported under: its kind, else its label."""
    return prompt.kind or ("harmful" if prompt.harmful else "benign")


def sample(prompts: Sequence[Prompt], per_group: int, seed: int) -> list[Prompt]:
    """At most `per_group` prompts of each label and kind, drawn by seed, in their order."""
    groups: dict[tuple[bool, str], list[int]] = {}
    for index, prompt in enumerate(prompts):
        groups.setdefault((prompt.harmful, prompt.kind), []).append(index)
    rng = random.Random(seed)
    chosen = [
        index
        for _, group in sorted(groups.items())
        for index in rng.sample(group, min(per_group, len(group)))
    ]
    return [prompts[index] for index in sorted(chosen)]


@dataclass(frozen=True)
class Judged:
    """Prompts and the outcomes of a model's replies to them."""

    prompts: Sequence[Prompt]
    outcomes: Sequence[Outcome]

    @classmethod
    def of(
        cls, data: FitData, prompts: Sequence[Prompt], edits: Sequence[AppliedEdit] = ()
    ) -> Judged:
        """Let the (edited) model answer and judge it."""
        with data.clock.timed("selecting"):
            return cls(prompts, data.outcomes(prompts, edits))

    def share(self, outcome: Outcome, *, harmful: bool) -> float:
        """Share of the prompts of a label with this outcome; degenerate replies count in."""
        found = [
            o for p, o in zip(self.prompts, self.outcomes, strict=True) if p.harmful == harmful
        ]
        return found.count(outcome) / len(found)

    def counts(self, *, harmful: bool) -> dict[str, Counter[str]]:
        """Outcomes by group, of one label."""
        found: dict[str, Counter[str]] = {}
        for prompt, outcome in zip(self.prompts, self.outcomes, strict=True):
            if prompt.harmful == harmful:
                found.setdefault(group_of(prompt), Counter())[outcome] += 1
        return found

    def benign_loss(self, unedited: Judged) -> float:
        """The largest drop, over benign groups, of the share answered, against `unedited`."""
        before, after = unedited.counts(harmful=False), self.counts(harmful=False)
        return max(
            (counts["answer"] - after[group]["answer"]) / counts.total()
            for group, counts in before.items()
        )

    def to_json(self) -> dict[str, dict[str, dict[str, int]]]:
        """Counts by label, group and outcome."""
        return {
            label: {g: dict(sorted(c.items())) for g, c in sorted(self.counts(harmful=h).items())}
            for label, h in (("benign", False), ("harmful", True))
        }
