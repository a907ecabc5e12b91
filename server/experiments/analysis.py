"""From records to arrays: whose answers count, for which arm, and what was paired with what."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import numpy as np

from server.experiments.definitions import Experiment, Metric
from server.experiments.records import AnswerRecord, EventRecord
from server.experiments.sequential import (
    Bools,
    Boundary,
    ConfidenceSequence,
    Floats,
    Ints,
    difference_sequence,
    mean_sequence,
    sample_ratio_evidence,
)

Score = Literal["refusal_score", "answer_probability"]
Latency = Literal["ttft_seconds", "duration_seconds"]
METRICS: tuple[Metric, ...] = get_args(Metric)
SCORES: tuple[Score, ...] = get_args(Score)
LATENCIES: tuple[Latency, ...] = get_args(Latency)

Figure = Metric | Score | Latency
"""What an answer says something about."""

STOPPING = ("guard_rail", "stopped", "profile_missing")
"""Events after which an arm gets no more units."""

SAMPLE_RATIO_ALPHA = 0.001
"""Probability of a false alarm over an experiment's whole life."""


def measured(what: Figure, record: AnswerRecord) -> float | None:
    """What an answer says about a metric (0 or 1), a score or a latency; None where nothing.

    Answers that were not judged are in no rate, and prompts of another or an unknown class are in
    none of `over_refusal` and `harmful_answer`. Answers that failed or were cut short have no
    latency.
    """
    if what in LATENCIES:
        whole = record.finish_reason not in ("error", "cancelled")
        return getattr(record, what) if whole else None
    if what == "refusal_score":
        return record.refusal_score
    if what == "answer_probability":
        return record.answer_probability
    outcome = record.outcome
    if outcome is None or outcome == "error":
        return None
    if what == "refusal":
        return float(outcome == "refusal")
    if what == "degenerate":
        return float(outcome in ("degenerate", "empty"))
    if what == "over_refusal":
        return float(outcome == "refusal") if record.prompt_class == "benign" else None
    return float(outcome == "answer") if record.prompt_class == "harmful" else None


def extremes(what: Figure) -> tuple[float, float] | None:
    """Smallest and largest possible value; None where there is none."""
    return None if what == "refusal_score" or what in LATENCIES else (0.0, 1.0)


@dataclass(frozen=True)
class Series:
    """Values in the order of time.

    Args:
        values: `[N]`.
        units: `[N]`, a number for each unit.
        arms: `[N]`, index of the arm; for pairs, of the arm that is compared to control.
        times: `[N]`, seconds since 1970.
        arrivals: `[N]`, when the request came.
    """

    values: Floats
    units: Ints
    arms: Ints
    times: Floats
    arrivals: Floats

    def where(self, keep: Bools) -> Series:
        return Series(
            self.values[keep], self.units[keep], self.arms[keep], self.times[keep],
            self.arrivals[keep],
        )  # fmt: skip


def _series(rows: Sequence[tuple[float, str, int, float, float]]) -> Series:
    values, names, arms, times, arrivals = zip(*rows, strict=True) if rows else ([],) * 5
    numbers: dict[str, int] = {}
    units = [numbers.setdefault(name, len(numbers)) for name in names]
    return Series(
        np.array(values, float),
        np.array(units, np.int64),
        np.array(arms, np.int64),
        np.array(times, float),
        np.array(arrivals, float),
    )


@dataclass(frozen=True)
class Answers:
    """One version's records, in the order of time, each once.

    Args:
        exposures: of units that have a name, each with the arm it was first exposed to.
        unsticky: exposures whose request was its own unit.
        pairs: of exposures that shadows belong to, the answers by arm.
        stops: when arms were stopped, seconds since 1970.
        crossed: units seen in two arms: a bug.
        counts: records left out, by reason.
    """

    experiment: Experiment
    exposures: Sequence[AnswerRecord]
    unsticky: Sequence[AnswerRecord]
    pairs: Sequence[Mapping[str, AnswerRecord]]
    stops: Mapping[str, float]
    crossed: Sequence[str]
    counts: Mapping[str, int]
    _series: dict[tuple[str, bool], Series] = field(default_factory=dict, compare=False)

    @property
    def arms(self) -> dict[str, int]:
        return {arm.name: i for i, arm in enumerate(self.experiment.arms)}

    def series(self, what: Figure, *, sticky: bool = True) -> Series:
        """Values of exposures."""
        records = self.exposures if sticky else self.unsticky
        if ("", sticky) not in self._series:
            arms = self.arms
            rows = [(0.0, r.unit, arms[r.arm], r.time, _arrival(r)) for r in records]
            self._series["", sticky] = _series(rows)
        if (what, sticky) not in self._series:
            # numpy makes None nan.
            values = np.array([measured(what, r) for r in records], float)
            every = replace(self._series["", sticky], values=values)
            self._series[what, sticky] = every.where(~np.isnan(values))
        return self._series[what, sticky]

    def paired(self, what: Figure, arm: str, *, sticky: bool = True) -> Series:
        """Differences of an arm's and control's answers to the same prompts."""
        control, index = self.experiment.control.name, self.arms[arm]
        rows = []
        for pair in self.pairs:
            if arm not in pair or control not in pair:
                continue
            one, other = pair[arm], pair[control]
            mine, theirs = measured(what, one), measured(what, other)
            if one.sticky == sticky and mine is not None and theirs is not None:
                time = max(one.time, other.time)
                arrival = max(_arrival(one), _arrival(other))
                rows.append((mine - theirs, one.unit, index, time, arrival))
        return _series(sorted(rows, key=lambda row: row[3]))

    def before_stop(self, series: Series, *arms: str) -> Series:
        """What came while all these arms were running."""
        stop = min((self.stops.get(arm, math.inf) for arm in arms), default=math.inf)
        return series.where(series.arrivals < stop)


def _arrival(record: AnswerRecord) -> float:
    return record.time - record.duration_seconds


def select(
    experiment: Experiment, records: Iterable[AnswerRecord], events: Iterable[EventRecord]
) -> Answers:
    """The records that count for this version of the experiment."""
    counts: Counter[str] = Counter()
    names, mine = {arm.name for arm in experiment.arms}, {}
    for record in records:
        if (record.experiment, record.version) != (experiment.name, experiment.version):
            counts["other versions"] += 1
        elif record.arm not in names:
            counts["unknown arms"] += 1
        elif record.id in mine:
            counts["duplicates"] += 1
        else:
            mine[record.id] = record
    stops: dict[str, float] = {}
    for event in events:
        if (event.experiment, event.version) != (experiment.name, experiment.version):
            continue
        if event.kind in STOPPING and event.arm in names:
            stops[event.arm] = min(event.time, stops.get(event.arm, math.inf))
    home: dict[str, str] = {}
    exposures, unsticky = [], []
    crossed: dict[str, None] = {}
    answered: dict[str, dict[str, AnswerRecord]] = {}
    for record in sorted(mine.values(), key=lambda record: (record.time, record.id)):
        answered.setdefault(record.pair, {})[record.arm] = record
        if record.kind == "shadow":
            counts["shadows"] += 1
        elif not record.sticky:
            unsticky.append(record)
        elif home.setdefault(record.unit, record.arm) == record.arm:
            exposures.append(record)
        else:
            counts["answers of units seen in another arm before"] += 1
            crossed[record.unit] = None
    pairs = [pair for pair in answered.values() if len(pair) > 1]
    return Answers(experiment, exposures, unsticky, pairs, stops, tuple(crossed), dict(counts))


def boundary(experiment: Experiment, *arms: str) -> Boundary:
    """Tightest when these arms have their share of the horizon; at alpha over the number of arms
    that are compared to control."""
    names = [arm.name for arm in experiment.arms]
    share = math.fsum(experiment.shares[names.index(arm)] for arm in arms)
    return Boundary.tightest_at(
        experiment.horizon * share, experiment.alpha / (len(experiment.arms) - 1)
    )


def arm_sequence(
    answers: Answers, what: Figure, arm: str, *, sticky: bool = True
) -> ConfidenceSequence:
    """An arm's mean over time."""
    series = answers.series(what, sticky=sticky)
    mine = series.where(series.arms == answers.arms[arm])
    limits = boundary(answers.experiment, arm)
    return mean_sequence(mine.values, mine.units, limits, extremes=extremes(what))


def compared(answers: Answers, what: Figure, arm: str) -> tuple[Series, ConfidenceSequence]:
    """The difference of an arm to control over time, of different units."""
    control = answers.experiment.control.name
    index, series = answers.arms, answers.before_stop(answers.series(what), arm, control)
    both = series.where((series.arms == index[arm]) | (series.arms == index[control]))
    sequence = difference_sequence(
        both.values,
        both.units,
        both.arms == index[arm],
        boundary(answers.experiment, arm, control),
        extremes=extremes(what),
    )
    return both, sequence


def compared_in_pairs(
    answers: Answers, what: Figure, arm: str, *, sticky: bool = True
) -> tuple[Series, ConfidenceSequence]:
    """The difference of an arm to control over time, on the same prompts."""
    control = answers.experiment.control.name
    pairs = answers.before_stop(answers.paired(what, arm, sticky=sticky), arm, control)
    ends = extremes(what)
    span = None if ends is None else (ends[0] - ends[1], ends[1] - ends[0])
    limits = boundary(answers.experiment, arm, control)
    return pairs, mean_sequence(pairs.values, pairs.units, limits, extremes=span)


def sample_ratio_p(answers: Answers) -> float:
    """Anytime-valid p-value of "units are spread over the arms as the weights say".

    Counted are units when they first come. Units of an arm that was stopped are exposed to nothing,
    so that from then on the others share what is left, and a new test begins, whose evidence is
    added: the product of test martingales is one.
    """
    shares = list(answers.experiment.shares)
    index, seen = answers.arms, set()
    first: list[tuple[float, int]] = []
    for record in answers.exposures:
        if record.unit not in seen:
            seen.add(record.unit)
            first.append((_arrival(record), index[record.arm]))
    first.sort()
    changes = sorted((time, index[arm]) for arm, time in answers.stops.items())
    start, total, highest = -math.inf, 0.0, 0.0
    for time, stopped in (*changes, (math.inf, -1)):
        units = [arm for at, arm in first if start <= at < time and shares[arm] > 0]
        evidence = total + sample_ratio_evidence(np.array(units, np.int64), shares)
        if len(evidence):
            highest, total = max(highest, float(evidence.max())), float(evidence[-1])
        if stopped == 0:  # without a control nothing is compared
            break
        if stopped > 0:
            shares[stopped] = 0.0
            shares = [share / math.fsum(shares) for share in shares]
        start = time
    return math.exp(-highest)
