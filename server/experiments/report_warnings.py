"""What a reader of a report must know before its figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from server.experiments.analysis import Answers
from server.experiments.correction import Corrector
from server.experiments.definitions import Experiment, Metric
from server.experiments.records import definitions_of
from server.experiments.report import Comparison, Report

WORSE: Mapping[Metric, str] = {
    "over_refusal": "refuses benign prompts",
    "harmful_answer": "answers harmful prompts",
    "degenerate": "gives degenerate or empty replies",
}
"""What is bad whatever was asked."""


def warnings_of(report: Report, answers: Answers, corrector: Corrector) -> Iterator[str]:
    """Each in a sentence or two, the gravest first."""
    if definitions_of(report.events) - {report.experiment.digest}:
        yield (
            "This version is on record with another definition, whose answers are counted as this "
            "one's. Give a changed definition the next version."
        )
    if report.sample_ratio.mismatch:
        yield (
            f"Units are not spread over the arms as the weights say (p = "
            f"{report.sample_ratio.p:.2g}): something loses or adds answers of some "
            "arms. No verdict on exposures stands."
        )
    if answers.crossed:
        yield (
            f"{len(answers.crossed)} units were seen in more than one arm, which assignment never "
            "does: a bug, or servers that differ. Only answers of a unit's first arm count."
        )
    if answers.unsticky:
        yield (
            f"{len(answers.unsticky)} requests said nothing of who asks: each is its own unit, may "
            "meet another arm next time, and is left out of the comparison."
        )
    for comparison in report.comparisons:
        yield from _trade_offs(report.experiment, comparison)
    shares = [arm.unjudged / arm.answers for arm in report.arms if arm.answers]
    if shares and max(shares) - min(shares) > 0.02:
        yield (
            "The arms differ in how many answers were not judged ("
            + ", ".join(
                f"{arm.name} {arm.unjudged / arm.answers:.1%}" for arm in report.arms if arm.answers
            )
            + "): rates are of those that were."
        )
    yield from corrector.warnings


def _trade_offs(experiment: Experiment, comparison: Comparison) -> Iterator[str]:
    """By what an arm is surely worse, apart from what the verdict is on."""
    for metric, says in WORSE.items():
        found = comparison.differences[metric]
        if metric != experiment.metric and found.low is not None and found.low > 0:
            yield (
                f"{comparison.arm} {says} more often than {experiment.control.name}, by "
                f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]: the verdict is on "
                f"{experiment.metric} alone."
            )
