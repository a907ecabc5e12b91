"""Experiments with a known truth, many times over. Used by tests and by the benchmark."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from server.experiments.sequential import (
    Bools,
    Boundary,
    Floats,
    Ints,
    difference_sequence,
    mean_sequence,
    running_mean,
    sample_ratio_evidence,
)

ALPHA = 0.05
Draw = tuple[Floats, Ints, Bools]
Source = Callable[[np.random.Generator], Draw]


@dataclass(frozen=True)
class Found:
    """Of many runs, each looked at after every value.

    Args:
        share: of runs in which some look said that there is a difference.
        median: values in both arms until half of the runs said so; infinite if fewer ever did.
    """

    share: float
    median: float


def independent(control: float, arm: float, n: int, *, share: float = 0.5) -> Source:
    """One request a unit, `share` of them the arm's."""

    def draw(rng: np.random.Generator) -> Draw:
        treated = rng.random(n) < share
        values = rng.random(n) < np.where(treated, arm, control)
        return values.astype(float), np.arange(n), treated

    return draw


def returning(a: float, b: float, units: int, n: int, *, heavy: bool = False) -> Source:
    """Units that return at random, each with its own rate from Beta(a, b), alike in both arms.

    Args:
        heavy: few units send most requests.
    """

    def draw(rng: np.random.Generator) -> Draw:
        arms, rates = rng.random(units) < 0.5, rng.beta(a, b, units)
        weights = rng.pareto(2.5, units) + 0.1 if heavy else np.ones(units)
        who = rng.choice(units, n, p=weights / weights.sum())
        return (rng.random(n) < rates[who]).astype(float), who, arms[who]

    return draw


def one_after_another(a: float, b: float, units: int, n: int) -> Source:
    """As `returning`, but a unit sends all its requests before the next one comes."""

    def draw(rng: np.random.Generator) -> Draw:
        arms, rates = rng.random(units) < 0.5, rng.beta(a, b, units)
        who = np.repeat(np.arange(units), n // units)
        return (rng.random(len(who)) < rates[who]).astype(float), who, arms[who]

    return draw


def watched(source: Source, *, runs: int, horizon: int, seed: int = 0) -> Found:
    """Difference of two arms, a look after every value."""
    rng, limits = np.random.default_rng(seed), Boundary.tightest_at(horizon, ALPHA)
    stops = []
    for _ in range(runs):
        sequence = difference_sequence(*source(rng), limits, extremes=(0, 1))
        stops.append(_first(sequence.p <= ALPHA, sequence.n))
    return _found(stops)


def watched_naively(source: Source, *, runs: int, start: int = 100, seed: int = 0) -> Found:
    """As `watched` with a 95 % interval, from the look at which each arm has `start` values."""
    rng, stops = np.random.default_rng(seed), []
    for _ in range(runs):
        values, units, treated = source(rng)
        one = running_mean(values[treated], units[treated])
        other = running_mean(values[~treated], units[~treated])
        i, j = np.cumsum(treated) - 1, np.cumsum(~treated) - 1
        late = np.flatnonzero((i >= start) & (j >= start))
        i, j = i[late], j[late]
        error = np.hypot(one.se[i], other.se[j])
        stops.append(_first(np.abs(one.mean[i] - other.mean[j]) > 1.96 * error, late + 1))
    return _found(stops)


def watched_pairs(
    control: float, arm: float, *, runs: int, units: int, n: int, horizon: int, seed: int = 0
) -> Found:
    """Paired differences: prompts of a unit are alike, and so are two answers to one prompt."""
    rng, limits = np.random.default_rng(seed), Boundary.tightest_at(horizon, ALPHA)
    stops = []
    for _ in range(runs):
        who = rng.integers(0, units, n)
        # How hard a prompt is: one answer is a refusal where it is above the arm's threshold.
        hard = 0.3 * rng.random(units)[who] + 0.7 * rng.random(n)
        level = np.quantile(hard, [1 - control, 1 - arm])
        noise = 0.1 * rng.standard_normal((2, n))
        values = (hard + noise[1] > level[1]).astype(float) - (hard + noise[0] > level[0])
        sequence = mean_sequence(values, who, limits, extremes=(-1, 1))
        stops.append(_first(sequence.p <= ALPHA, sequence.n))
    return _found(stops)


def watched_ratio(share: float, *, runs: int, n: int, alpha: float, seed: int = 0) -> Found:
    """Sample-ratio test against 50:50, where `share` is the second arm's."""
    rng, stops = np.random.default_rng(seed), []
    for _ in range(runs):
        evidence = sample_ratio_evidence((rng.random(n) < share).astype(np.int64), (0.5, 0.5))
        stops.append(_first(evidence >= -np.log(alpha), np.arange(1, n + 1)))
    return _found(stops)


def _first(hit: Bools, n: Ints) -> float:
    return float(n[np.argmax(hit)]) if hit.any() else np.inf


def _found(stops: list[float]) -> Found:
    return Found(float(np.mean(np.isfinite(stops))), float(np.median(stops)))
