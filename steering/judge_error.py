"""A rate of refusals, corrected for the errors of the judge that counted them.

    theta = (p + q0 - 1) / (q0 + q1 - 1)

with p the rate that the judge saw, q1 its sensitivity and q0 its specificity (Rogan and Gladen
1978, doi:10.1093/oxfordjournals.aje.a112510). The interval takes in that q1 and q0 were themselves
counted on few replies (Lang and Reiczigel 2014, doi:10.1016/j.prevetmed.2013.09.015).

Judge error differs between profiles: with one true rate of 0.30, sensitivities of 0.95 and 0.80
make two profiles differ by 0.05. Correct each with its own labelled replies, or leave differences
between profiles uncorrected.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from steering.judge_set import Card

LEAST_SUM = 1.1
"""Of sensitivity and specificity. A judge with less is close to a coin, and the correction divides
by what it has above 1."""


@dataclass(frozen=True)
class CorrectedRate:
    """An estimate and its 95 % interval; `observed` is the rate before the correction."""

    observed: float
    estimate: float
    low: float
    high: float


def corrected_rate(
    p: float,
    n: int,
    sensitivity: float,
    n1: int,
    specificity: float,
    n0: int,
    *,
    z: float = 1.959964,
) -> CorrectedRate:
    """The share of refusals that a judge with these errors would see as `p`.

    The variance is the delta method's, over all three samples:

        var = (p (1 - p) / n + (1 - theta)^2 q0 (1 - q0) / n0 + theta^2 q1 (1 - q1) / n1) / J^2

    with J = q0 + q1 - 1. For the interval every rate is first drawn towards 1/2 (z^2 replies are
    added to n, two to n1 and to n0) and the centre is shifted, as Lang and Reiczigel do: else a
    judge without a mistake on thirty replies would count as certain.

    Args:
        p: rate judged to be refusals, of `n` replies.
        sensitivity: on `n1` labelled refusals.
        specificity: on `n0` labelled replies of other kinds.

    Raises ValueError where sensitivity and specificity add up to 1.1 or less.
    """
    for name, rate, count in (
        ("p", p, n),
        ("sensitivity", sensitivity, n1),
        ("specificity", specificity, n0),
    ):
        if not 0 <= rate <= 1 or count < 1:
            raise ValueError(f"{name} {rate:g} of {count} is no rate")
    if sensitivity + specificity <= LEAST_SUM:
        raise ValueError(
            f"sensitivity {sensitivity:.3f} and specificity {specificity:.3f} add up to "
            f"{LEAST_SUM} or less: rates of such a judge cannot be corrected; use another judge"
        )
    estimate = (p + specificity - 1) / (specificity + sensitivity - 1)
    seen, n_ = _drawn_in(p, n, z * z)
    q1, n1_ = _drawn_in(sensitivity, n1, 2)
    q0, n0_ = _drawn_in(specificity, n0, 2)
    if q0 + q1 <= 1:  # so few labelled replies that they say nothing
        return CorrectedRate(p, _clip(estimate), 0.0, 1.0)
    j = q0 + q1 - 1
    theta = _clip((seen + q0 - 1) / j)
    v, v1, v0 = seen * (1 - seen) / n_, q1 * (1 - q1) / n1_, q0 * (1 - q0) / n0_
    centre = theta + 2 * z * z * (theta * v1 - (1 - theta) * v0)
    spread = z * math.sqrt(v + (1 - theta) ** 2 * v0 + theta**2 * v1) / j
    # Clipping may leave the estimate outside; it is never outside of its own interval.
    low, high = _clip(centre - spread), _clip(centre + spread)
    estimate = _clip(estimate)
    return CorrectedRate(p, estimate, min(low, estimate), max(high, estimate))


def corrected_by(card: Card, refusals: int, n: int) -> CorrectedRate:
    """The rate of `refusals` among `n` judged replies, corrected by the judge's own card."""
    q1, q0 = card.sensitivity, card.specificity
    return corrected_rate(refusals / n, n, q1.value, q1.total, q0.value, q0.total)


def corrected_shares(
    card: Card, refusals: int, answers: int, n: int
) -> tuple[CorrectedRate, CorrectedRate] | None:
    """Shares of refusals and of answers among `n` replies, corrected by the judge's own card.

    The judge takes refusals and answers for each other; what is neither (degenerate, empty) is
    found by rules and taken as it was counted. None where all replies are such.
    """
    judged = refusals + answers
    if not judged:
        return None
    rate, share = corrected_by(card, refusals, judged), judged / n
    refused = (share * rate.estimate, share * rate.low, share * rate.high)
    answered = (share - refused[0], share - refused[2], share - refused[1])
    return CorrectedRate(refusals / n, *refused), CorrectedRate(answers / n, *answered)


def why_not_corrected(card: Card) -> str:
    """Why no rate can be corrected by this card; `""` where rates can."""
    try:
        corrected_by(card, 0, 1)
    except ValueError as error:
        return str(error)
    return ""


def _drawn_in(rate: float, count: int, added: float) -> tuple[float, float]:
    total = count + added
    return (rate * count + added / 2) / total, total


def _clip(value: float) -> float:
    return min(1.0, max(0.0, value))
