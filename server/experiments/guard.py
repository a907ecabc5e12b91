"""Stops an arm whose rate is surely above a limit; looked at after every answer."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from server.experiments.analysis import measured
from server.experiments.definitions import Experiment, GuardRail, Metric
from server.experiments.records import AnswerRecord
from server.experiments.sequential import Boundary, rate_bounds

LEAST_UNITS = 10
"""Effective ones, before a guard-rail may fire: one user's requests say nothing of the others'."""


@dataclass(frozen=True)
class Fired:
    """A guard-rail that fired.

    Args:
        rate, low: of the arm, and its lower bound.
        n, units: judged answers, and units that they are of.
    """

    arm: str
    metric: Metric
    limit: float
    rate: float
    low: float
    n: int
    units: int


@dataclass
class Watch:
    """One guard-rail on one arm, fed answer by answer, in constant time.

    The lower confidence bound is one-sided at `alpha`, the lower of two: a rate that is at the
    limit sets it off with probability alpha at most, over the arm's whole life.
    """

    rail: GuardRail
    boundary: Boundary
    n: int = 0
    total: float = 0.0
    yy: float = 0.0
    yn: float = 0.0
    nn: float = 0.0
    units: dict[str, tuple[float, int]] = field(default_factory=dict)

    @classmethod
    def make(cls, rail: GuardRail, alpha: float) -> Watch:
        # One-sided; tightest somewhat later than the earliest moment at which it may fire.
        return cls(rail, Boundary.tightest_at(4 * rail.minimum, 2 * alpha))

    def add(self, unit: str, value: float) -> None:
        y, n = self.units.get(unit, (0.0, 0))
        self.units[unit] = (y + value, n + 1)
        self.n += 1
        self.total += value
        self.yy += value * (2 * y + value)
        self.yn += y + value * (n + 1)
        self.nn += 2 * n + 1

    @property
    def low(self) -> float:
        """Lower confidence bound, `-inf` while there are too few units."""
        if self.n**2 < LEAST_UNITS * self.nn:
            return -math.inf
        effective = self.n**2 / self.nn
        # One success and one failure more in the variance, as `running_mean` has it.
        centre = (self.total + 1) / (self.n + 2)
        spread = max(0.0, self.yy - 2 * centre * self.yn + centre**2 * self.nn)
        spread += centre**2 + (1 - centre) ** 2
        se = math.sqrt(spread * effective / (effective - 1)) / self.n
        n = np.array(self.n)
        rate, factor = self.total / n, self.boundary.factor(n)
        low, _ = rate_bounds(rate, np.array(se), n, factor)
        # Wilson's bound is too high for rates near 0, the plain one for rates near 1.
        return float(min(low, rate - factor * se))

    @property
    def fires(self) -> bool:
        return self.n >= self.rail.minimum and self.low > self.rail.limit


class Guard:
    """All guard-rails of one version of an experiment, but on its control, which nothing replaces.

    What clients were sent counts, shadows do not; a request without a unit is a unit.
    """

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self._watches: dict[str, list[Watch]] = {
            arm.name: [Watch.make(rail, experiment.alpha) for rail in experiment.guard_rails]
            for arm in experiment.arms[1:]
        }

    def feed(self, record: AnswerRecord) -> list[Fired]:
        """Take in an answer, each once; what fires now, each guard-rail once."""
        if (record.experiment, record.version) != (self.experiment.name, self.experiment.version):
            return []
        fired, left = [], []
        for watch in self._watches.get(record.arm, []):
            value = measured(watch.rail.metric, record) if record.kind == "exposure" else None
            if value is not None:
                watch.add(record.unit, value)
            if value is not None and watch.fires:
                rail, n = watch.rail, watch.n
                rate, low, units = watch.total / n, watch.low, len(watch.units)
                fired.append(Fired(record.arm, rail.metric, rail.limit, rate, low, n, units))
            else:
                left.append(watch)
        if fired:
            self._watches[record.arm] = left
        return fired
