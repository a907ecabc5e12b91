"""Records -> what they show: rates, differences, verdicts.

Lower counts as better: less over-refusal, fewer answers to harmful prompts, fewer broken replies.
Refusals of all prompts are good or bad by what was asked, which the definition says (`better`). A
verdict is on one metric; a warning names each other one by which the arm is surely worse.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from server.experiments import analysis
from server.experiments.analysis import LATENCIES, METRICS, SCORES, Answers, Figure
from server.experiments.correction import Corrector
from server.experiments.definitions import Arm, Experiment, Metric
from server.experiments.records import AnswerRecord, EventRecord
from server.experiments.report import (
    ArmReport,
    Bounds,
    Comparison,
    Interval,
    Latency,
    Look,
    McNemarReport,
    Report,
    SampleRatio,
)
from server.experiments.report_warnings import warnings_of
from server.experiments.sequential import ConfidenceSequence, Floats, rate_bounds
from server.experiments.verdict import Decision, decide
from steering.evaluate.statistics import holm, mcnemar
from steering.judge_set import Card

MOST_OTHERS = 0.05
"""Share of answers by another judge than the one with the card that are left unjudged; where there
are more, rates mix both judges' errors, and a warning says so."""

MOST_LOOKS = 200
"""Of a confidence sequence in a report; all looks are paid for, these are drawn."""


def make_report(
    experiment: Experiment,
    records: Iterable[AnswerRecord],
    events: Iterable[EventRecord] = (),
    *,
    judge_card: Card | Mapping[str, Card] | None = None,
    notes: Sequence[str] = (),
    now: float | None = None,
) -> Report:
    """Analyse an experiment.

    Args:
        records, events: in any order; those of other experiments and versions are left out.
        judge_card: the judge's sensitivity and specificity, or those by profile: only with the
            latter are differences corrected, since judges err differently on different profiles.
        notes: more warnings, of what the caller knows.
        now: seconds since 1970; decides whether the end has come.
    """
    now = time.time() if now is None else now
    # Times are for people and tests; which answers count does not depend on them.
    events = sorted(events, key=lambda event: event.time)
    cards = [judge_card] if isinstance(judge_card, Card) else (judge_card or {}).values()
    records = _by_one_judge(records, {card.version for card in cards})
    answers = analysis.select(experiment, records, events)
    corrector = Corrector(judge_card, answers)
    ended = experiment.end is not None and now >= experiment.end.timestamp()
    arms = [_arm(answers, arm, corrector) for arm in experiment.arms]
    ratio = SampleRatio(
        analysis.sample_ratio_p(answers),
        analysis.SAMPLE_RATIO_ALPHA,
        {arm.name: arm.expected_share for arm in arms},
        {arm.name: arm.units for arm in arms},
    )
    report = Report(
        experiment,
        now,
        ended,
        ratio,
        arms,
        _comparisons(answers, corrector, ratio, paired=False, ended=ended),
        _comparisons(answers, corrector, ratio, paired=True, ended=ended),
        {reason: n for reason, n in answers.counts.items() if reason != "shadows"},
        [e for e in events if (e.experiment, e.version) == (experiment.name, experiment.version)],
        (),
    )
    return dataclasses.replace(report, warnings=(*warnings_of(report, answers, corrector), *notes))


def _by_one_judge(records: Iterable[AnswerRecord], versions: set[str]) -> list[AnswerRecord]:
    """The records, where a slow judge's have few others among them: those it has not read yet, or
    could not keep up with. They count as not judged, so that all rates have one judge's errors.
    """
    records = list(records)
    judged = [record for record in records if record.outcome is not None]
    others = {r.id for r in judged if r.judge not in versions and r.finish_reason != "tool_calls"}
    if len(versions) != 1 or len(others) > MOST_OTHERS * len(judged):
        return records
    return [dataclasses.replace(r, outcome=None) if r.id in others else r for r in records]


def _arm(answers: Answers, arm: Arm, corrector: Corrector) -> ArmReport:
    experiment, name = answers.experiment, arm.name
    mine = [record for record in answers.exposures if record.arm == name]
    loose = [record for record in answers.unsticky if record.arm == name]
    rates = {metric: analysis.arm_sequence(answers, metric, name) for metric in METRICS}
    return ArmReport(
        name,
        arm.profile,
        arm.strength,
        arm == experiment.control,
        experiment.shares[answers.arms[name]],
        answers.stops.get(name),
        len({record.unit for record in mine}),
        len(mine),
        sum(record.outcome in (None, "error") for record in mine),
        {metric: _rate(rate) for metric, rate in rates.items()},
        {
            metric: Bounds(found.estimate, found.low, found.high)
            for metric, rate in rates.items()
            if (found := corrector.rate(metric, name, rate)) is not None
        },
        {
            score: _interval(analysis.arm_sequence(answers, score, name), analysis.extremes(score))
            for score in SCORES
        },
        _latency([record for record in (*mine, *loose) if record.finish_reason != "error"]),
        len(loose),
        {
            metric: _rate(analysis.arm_sequence(answers, metric, name, sticky=False))
            for metric in METRICS
        }
        if loose
        else {},
    )


def _latency(records: Sequence[AnswerRecord]) -> Latency:
    ttft = [record.ttft_seconds for record in records if record.ttft_seconds is not None]
    duration = [record.duration_seconds for record in records]

    def quantile(values: Sequence[float], q: float) -> float | None:
        return float(np.quantile(values, q)) if values else None

    return Latency(
        quantile(ttft, 0.5), quantile(ttft, 0.95), quantile(duration, 0.5), quantile(duration, 0.95)
    )


def _comparisons(
    answers: Answers, corrector: Corrector, ratio: SampleRatio, *, paired: bool, ended: bool
) -> list[Comparison]:
    experiment = answers.experiment
    metric, control = experiment.metric, experiment.control.name
    compare = analysis.compared_in_pairs if paired else analysis.compared
    # Shadows wait for everybody else: their latencies say nothing.
    figures: tuple[Figure, ...] = (*METRICS, *SCORES, *(() if paired else LATENCIES))
    found = {
        arm.name: {what: compare(answers, what, arm.name) for what in figures}
        for arm in experiment.arms[1:]
    }
    if paired:
        found = {
            arm: pairs
            for arm, pairs in found.items()
            if any(len(sequence) for _, sequence in pairs.values())
        }
    p_values = {arm: _last(pairs[metric][1].p, 1.0) for arm, pairs in found.items()}
    adjusted = holm(p_values)
    tests = _mcnemar(answers, list(found)) if paired and ended else {}
    comparisons = []
    for arm, each in found.items():
        series, sequence = each[metric]
        decision = decide(
            sequence,
            adjusted[arm],
            alpha=experiment.alpha,
            margin=experiment.margin,
            limits=analysis.boundary(experiment, arm, control),
            better=experiment.better,
        )
        if ended or {arm, control} & answers.stops.keys():  # no more will come
            decision = dataclasses.replace(decision, more_units=None)
        # How units were spread does not matter where both arms answered the same prompts.
        if ratio.mismatch and not paired:
            why = f"units are not spread as the weights say (p = {ratio.p:.2g}): find out why"
            decision = Decision("blocked", why)
        differences: dict[str, Interval] = {
            what: _interval(result, None if analysis.extremes(what) is None else (-1.0, 1.0))
            for what, (_, result) in each.items()
        }
        corrected = {} if paired else _corrected(answers, corrector, arm)
        looks = _looks(sequence, series.times)
        comparisons.append(
            Comparison(
                arm, differences, corrected, p_values[arm], adjusted[arm], decision, looks,
                tests.get(arm),
            )
        )  # fmt: skip
    return comparisons


def _corrected(answers: Answers, corrector: Corrector, arm: str) -> dict[Metric, Bounds]:
    found: dict[Metric, Bounds] = {}
    for metric in METRICS:
        difference = corrector.difference(metric, arm)
        if difference is not None:
            found[metric] = Bounds(*difference)
    return found


def _mcnemar(answers: Answers, arms: Sequence[str]) -> dict[str, McNemarReport]:
    tests = {}
    for arm in arms:
        series, _ = analysis.compared_in_pairs(answers, answers.experiment.metric, arm)
        _, first = np.unique(series.units, return_index=True)
        values = series.values[first]
        # Pairs on which both do the same say nothing.
        tests[arm] = mcnemar([bool(v < 0) for v in values], [bool(v > 0) for v in values])
    adjusted = holm({arm: test.p for arm, test in tests.items()})
    return {
        arm: McNemarReport(test.first_only, test.second_only, test.p, adjusted[arm])
        for arm, test in tests.items()
    }


def _interval(sequence: ConfidenceSequence, limits: tuple[float, float] | None) -> Interval:
    if not len(sequence):
        return Interval(None, None, None, 0, 0)
    value, n, units = sequence.estimate[-1], sequence.n[-1], sequence.units[-1]
    low, high = float(sequence.low[-1]), float(sequence.high[-1])
    if not math.isfinite(low):
        return Interval(float(value), None, None, int(n), int(units))
    if limits is not None:
        low, high = max(low, limits[0]), min(high, limits[1])
    return Interval(float(value), low, high, int(n), int(units))


def _rate(sequence: ConfidenceSequence) -> Interval:
    found = _interval(sequence, None)
    if found.low is None:
        return found
    low, high = rate_bounds(sequence.estimate, sequence.se, sequence.n, sequence.factor)
    return dataclasses.replace(found, low=float(low[-1]), high=float(high[-1]))


def _looks(sequence: ConfidenceSequence, times: Floats) -> list[Look]:
    known = np.flatnonzero(np.isfinite(sequence.se))
    if not len(known):
        return []
    chosen = known[np.unique(np.linspace(0, len(known) - 1, MOST_LOOKS).astype(int))]
    low, high = sequence.low, sequence.high
    return [
        Look(
            float(times[sequence.at[i]]),
            int(sequence.n[i]),
            int(sequence.units[i]),
            float(sequence.estimate[i]),
            float(low[i]),
            float(high[i]),
        )
        for i in chosen
    ]


def _last(values: Floats, default: float) -> float:
    return float(values[-1]) if len(values) else default
