"""What a confidence sequence proves, and how much more it may need."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from server.experiments.sequential import Boundary, ConfidenceSequence, values_needed

Verdict = Literal["better", "worse", "no difference", "inconclusive", "blocked"]


@dataclass(frozen=True)
class Decision:
    """A verdict and why.

    Args:
        more_units: of the two arms together, if effect and spread stay as they are; None where
            there is a verdict, or where nobody can say.
    """

    verdict: Verdict
    why: str
    more_units: int | None = None


def decide(
    sequence: ConfidenceSequence,
    p: float,
    *,
    alpha: float,
    margin: float,
    limits: Boundary,
    better: Literal["lower", "higher"] = "lower",
) -> Decision:
    """The verdict on one arm.

    *No difference* where the interval was ever within the margin: a difference may be proven and
    still be too small to matter. *Better* or *worse* where p is at most alpha, in the direction of
    the look that proved it.

    Args:
        sequence: difference to control.
        p: anytime-valid, adjusted for the number of arms.
        margin: differences smaller than this do not matter.
        limits: with which the sequence was made.
        better: which rate is.
    """
    known = np.isfinite(sequence.se)
    if not known.any():
        return Decision("inconclusive", "too few units for an interval")
    if np.any(known & (sequence.low > -margin) & (sequence.high < margin)):
        return Decision("no difference", f"the interval is within {margin:g} of zero")
    if p <= alpha:
        word = "lower" if sequence.estimate[int(np.argmin(sequence.p))] < 0 else "higher"
        verdict: Verdict = "better" if word == better else "worse"
        return Decision(verdict, f"the rate is {word} (p = {p:.2g})")
    return Decision(
        "inconclusive", "the interval holds zero and more than the margin", _more(
            sequence, margin, limits
        )
    )  # fmt: skip


def _more(sequence: ConfidenceSequence, margin: float, limits: Boundary) -> int | None:
    estimate, se = float(sequence.estimate[-1]), float(sequence.se[-1])
    n, units = int(sequence.n[-1]), int(sequence.units[-1])
    if not math.isfinite(se):
        return None
    spread = se * math.sqrt(n)
    # Either zero or the margin gets out of the interval's reach first.
    ways = (values_needed(limits, spread, x) for x in (abs(estimate), margin - abs(estimate)))
    needed = min((way for way in ways if way is not None), default=None)
    return None if needed is None else max(1, math.ceil((needed - n) * units / n))
