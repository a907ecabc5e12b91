"""Rates of an experiment, corrected for the errors of the judge: `steering.judge_error` with
standard errors that are clustered by unit and intervals that hold at every look."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from server.experiments import analysis
from server.experiments.analysis import Answers
from server.experiments.definitions import Metric
from server.experiments.sequential import ConfidenceSequence
from steering.judge_error import CorrectedRate, corrected_rate, why_not_corrected
from steering.judge_set import Card


class Corrector:
    """Corrects the rates of one version's arms.

    Args:
        cards: the judge's, or by profile.
    """

    def __init__(self, cards: Card | Mapping[str, Card] | None, answers: Answers) -> None:
        self._answers = answers
        self._by_profile = not isinstance(cards, Card) and bool(cards)
        profiles = {arm.name: arm.profile for arm in answers.experiment.arms}
        self._judges: dict[str, set[str]] = {arm: set() for arm in profiles}
        for record in answers.exposures:
            # A call of a tool is an answer, and read by no judge.
            if record.outcome is not None and record.finish_reason != "tool_calls":
                self._judges[record.arm].add(record.judge)
        self._given: dict[str, Card] = {}
        for arm, profile in profiles.items():
            card = cards if isinstance(cards, Card) else (cards or {}).get(profile)
            if card is not None:
                self._given[arm] = card
        self._cards = {
            arm: card
            for arm, card in self._given.items()
            if self._judges[arm] <= {card.version} and not why_not_corrected(card)
        }

    @property
    def warnings(self) -> Iterator[str]:
        """Why rates were not corrected although there was a card."""
        if len(set().union(*self._judges.values())) > 1:
            names = ", ".join(sorted(set().union(*self._judges.values())))
            yield f"Answers were judged by different judges ({names}): rates mix their errors."
        for arm, card in self._given.items():
            if arm not in self._cards:
                why = why_not_corrected(card) or f"the figures are of {card.version}"
                yield f"The rates of {arm} are not corrected for the judge's errors: {why}."

    def rate(self, metric: Metric, arm: str, sequence: ConfidenceSequence) -> CorrectedRate | None:
        """An arm's rate; None where it cannot be corrected.

        The judge takes refusals and answers for each other; what is neither is found by rules, and
        its share is taken as it was counted. The sample counts for as many independent replies as
        would have the clustered standard error, and z is the confidence sequence's factor.

        Args:
            sequence: of the same metric and arm.
        """
        if arm not in self._cards or metric == "degenerate" or not len(sequence):
            return None
        se, factor = float(sequence.se[-1]), float(sequence.factor[-1])
        return self._corrected(metric, arm, se, factor) if math.isfinite(se) else None

    def difference(self, metric: Metric, arm: str) -> tuple[float, float, float] | None:
        """Difference of an arm to control with its interval, where each has a card of its own and
        neither was stopped.

        The two intervals are combined as Zou and Donner do (2008, doi:10.1002/sim.3095): each
        bound has its own distance from the estimate. Calibration errors of two profiles are
        independent only where their replies were labelled apart.
        """
        control = self._answers.experiment.control.name
        if not self._by_profile or {arm, control} & self._answers.stops.keys():
            return None
        _, both = analysis.compared(self._answers, metric, arm)
        rates = []
        for name in (arm, control):
            own = analysis.arm_sequence(self._answers, metric, name)
            if name not in self._cards or metric == "degenerate" or not len(own) or not len(both):
                return None
            se = float(own.se[-1])
            if not math.isfinite(se):
                return None
            # On the clock of both arms, at the level of differences.
            rates.append(self._corrected(metric, name, se, float(both.factor[-1])))
        one, other = rates
        value = one.estimate - other.estimate
        below = math.hypot(one.estimate - one.low, other.high - other.estimate)
        above = math.hypot(one.high - one.estimate, other.estimate - other.low)
        return value, max(-1.0, value - below), min(1.0, value + above)

    def _corrected(self, metric: Metric, arm: str, se: float, z: float) -> CorrectedRate:
        refusals = answers = n = 0
        for record in self._answers.exposures:
            if record.arm == arm and analysis.measured(metric, record) is not None:
                n += 1
                refusals += record.outcome == "refusal"
                answers += record.outcome == "answer"
        judged = refusals + answers
        if not judged:
            return CorrectedRate(0.0, 0.0, 0.0, 1.0)
        card = self._cards[arm]
        seen = (answers if metric == "harmful_answer" else refusals) / n
        # Drawn in like the variance that the standard error is of.
        drawn = (seen * n + 1) / (n + 2)
        effective = max(1, round(min(1.0, drawn * (1 - drawn) / (n * se * se)) * judged))
        q1, q0, share = card.sensitivity, card.specificity, judged / n
        rate = corrected_rate(
            refusals / judged, effective, q1.value, q1.total, q0.value, q0.total, z=z
        )
        low, value, high = share * rate.low, share * rate.estimate, share * rate.high
        if metric == "harmful_answer":
            low, value, high = share - high, share - value, share - low
        return CorrectedRate(seen, value, low, high)
