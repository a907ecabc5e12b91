"""What confidence sequences promise, by simulation: a look after every value of every run."""

from __future__ import annotations

import numpy as np
import pytest

from server.experiments.sequential import (
    LEAST_UNITS,
    Boundary,
    difference_sequence,
    mean_sequence,
    rate_bounds,
    running_mean,
    sample_ratio_evidence,
    values_needed,
)
from tests.server.experiments.simulate import (
    ALPHA,
    Source,
    independent,
    one_after_another,
    returning,
    watched,
    watched_naively,
    watched_pairs,
    watched_ratio,
)


@pytest.mark.parametrize(
    "source",
    [
        independent(0.15, 0.15, 4000),
        independent(0.02, 0.02, 4000),
        independent(0.95, 0.95, 4000, share=0.1),
        independent(0.02, 0.02, 4000, share=0.1),
        returning(1, 5, 400, 4000),
        returning(1, 5, 80, 4000),
        returning(150, 850, 80, 4000),
        returning(1, 5, 400, 4000, heavy=True),
        one_after_another(1, 5, 400, 4000),
    ],
    ids=[
        "independent",
        "rare",
        "a small arm, often",
        "a small arm, rare",
        "returning",
        "few units",
        "few alike",
        "heavy users",
        "in turn",
    ],
)
def test_two_equal_arms_are_rarely_called_different_whoever_looks(source: Source) -> None:
    found = watched(source, runs=500, horizon=2000)
    assert found.share <= ALPHA


@pytest.mark.parametrize("rate", [0.02, 0.95])
def test_a_small_arm_without_refusals_by_chance_is_not_certain(rate: float) -> None:
    """Its own spread is least just when it is furthest off."""
    treated = np.arange(2000) % 10 == 0
    values = (np.random.default_rng(0).random(2000) < rate).astype(float)
    values[treated] = round(rate)
    sequence = difference_sequence(
        values, np.arange(2000), treated, Boundary.tightest_at(2000, ALPHA), extremes=(0, 1)
    )
    # As wide as 200 values of this rate are, to either side of zero and more.
    assert sequence.se[-1] > 0.95 * np.sqrt(rate * (1 - rate) / 200)


def test_a_naive_interval_is_wrong_most_often_when_watched() -> None:
    source = independent(0.15, 0.15, 4000)
    assert watched_naively(source, runs=200).share > 5 * ALPHA


def test_a_real_difference_is_found_in_time() -> None:
    found = watched(independent(0.15, 0.22, 4000), runs=200, horizon=1000)
    assert found.share > 0.95
    assert found.median < 1300  # both arms; a fixed test of power 0.8 needs 986


def test_equal_arms_in_pairs_are_rarely_called_different() -> None:
    found = watched_pairs(0.15, 0.15, runs=500, units=300, n=2000, horizon=1000)
    assert found.share <= ALPHA


def test_pairs_need_fewer_prompts_than_separate_arms() -> None:
    pairs = watched_pairs(0.15, 0.22, runs=100, units=300, n=2000, horizon=1000)
    arms = watched(independent(0.15, 0.22, 4000), runs=100, horizon=1000)
    assert pairs.median < arms.median / 2


def test_a_wrong_sample_ratio_is_found_and_a_right_one_left_alone() -> None:
    assert watched_ratio(0.55, runs=200, n=10_000, alpha=0.001).share > 0.99
    assert watched_ratio(0.5, runs=1000, n=5000, alpha=0.05).share <= 0.05


def test_sample_ratio_evidence_is_a_bayes_factor() -> None:
    """Its mean under the hypothesis is 1, here over all ways in which ten units can come."""
    ways = np.array([[(way >> i) & 1 for i in range(10)] for way in range(1024)])
    chances = np.where(ways, 0.3, 0.7).prod(axis=1)
    factors = np.array([np.exp(sample_ratio_evidence(way, (0.7, 0.3))[-1]) for way in ways])
    assert chances @ factors == pytest.approx(1)


def test_units_in_an_arm_without_a_share_are_refused() -> None:
    with pytest.raises(ValueError, match="share is 0"):
        sample_ratio_evidence(np.array([0, 1]), (1.0, 0.0))


def test_running_mean_is_the_clustered_mean_of_every_prefix() -> None:
    rng = np.random.default_rng(0)
    values, units = rng.random(60), rng.integers(0, 9, 60)
    found = running_mean(values, units)
    for n in (9, 30, 60):
        y, who = values[:n], units[:n]
        mean, seen = y.mean(), np.unique(who)
        sums = np.array([(y[who == u] - mean).sum() for u in seen])
        effective = n**2 / sum((who == u).sum() ** 2 for u in seen)
        se = np.sqrt((sums**2).sum() * effective / (effective - 1)) / n
        assert found.units[n - 1] == len(seen)
        assert found.mean[n - 1] == pytest.approx(mean)
        assert found.se[n - 1] == pytest.approx(se)


def test_copies_of_every_answer_prove_nothing_more() -> None:
    rng = np.random.default_rng(0)
    values, units = rng.random(200), np.arange(200)
    once, often = (
        running_mean(values, units),
        running_mean(np.repeat(values, 5), np.repeat(units, 5)),
    )
    assert often.se[-1] == pytest.approx(once.se[-1])


def test_the_p_value_is_the_level_at_which_the_interval_leaves_zero() -> None:
    limits = Boundary.tightest_at(500, 0.05)
    n = np.array([30.0, 500.0, 9000.0])
    assert limits.p_value(limits.factor(n), n) == pytest.approx(0.05)
    assert np.all(limits.p_value(np.zeros(3), n) == 1)


def test_the_interval_is_tightest_about_the_horizon() -> None:
    n = np.arange(1.0, 20_000)
    for horizon in (200, 2000):
        # Compared to other horizons, at this one.
        reach = {
            t: Boundary.tightest_at(t, 0.05).factor(n)[horizon]
            for t in (horizon // 20, horizon, 20 * horizon)
        }
        assert min(reach, key=lambda t: reach[t]) == horizon


def test_an_arm_without_a_single_refusal_is_not_certain() -> None:
    n = 2 * LEAST_UNITS
    found = mean_sequence(
        np.zeros(n), np.arange(n), Boundary.tightest_at(1000, 0.05), extremes=(0, 1)
    )
    _, high = rate_bounds(found.estimate, found.se, found.n, found.factor)
    # 1 - 0.05 ** (1 / n): the exact upper bound at one look.
    assert high[-1] > found.high[-1] > 1 - 0.05 ** (1 / n)


@pytest.mark.parametrize("rate", [0.02, 0.3, 0.97])
def test_the_interval_of_a_rate_holds_it_at_every_look(rate: float) -> None:
    rng, limits, missed = np.random.default_rng(0), Boundary.tightest_at(1000, ALPHA), 0
    for _ in range(500):
        values = (rng.random(2000) < rate).astype(float)
        found = mean_sequence(values, np.arange(2000), limits, extremes=(0, 1))
        low, high = rate_bounds(found.estimate, found.se, found.n, found.factor)
        missed += not np.all((low <= rate) & (rate <= high))
    assert missed / 500 <= ALPHA


def test_one_unit_that_sends_nearly_everything_leaves_no_interval() -> None:
    rng, units = np.random.default_rng(0), np.concatenate([np.arange(100), np.zeros(900, int)])
    limits = Boundary.tightest_at(1000, ALPHA)
    found = mean_sequence(rng.random(1000), units, limits)
    assert np.isfinite(found.se[99]) and np.isinf(found.se[-1])


def test_there_is_no_interval_of_few_units() -> None:
    values, units = np.tile([0.0, 1.0], 500), np.tile([0, 1], 500)
    found = difference_sequence(
        values, units, values == 1, Boundary.tightest_at(100, 0.05), extremes=(0, 1)
    )
    assert np.isinf(found.high).all()
    assert (found.p == 1).all()


def test_values_that_are_all_the_same_are_not_certain() -> None:
    n, limits = 100, Boundary.tightest_at(100, 0.05)
    found = mean_sequence(np.full(n, 0.5), np.arange(n), limits)
    assert np.isinf(found.high).all() and (found.p == 1).all()


def test_values_needed_bring_the_interval_to_the_margin() -> None:
    limits = Boundary.tightest_at(1000, 0.05)
    needed = values_needed(limits, 0.5, 0.03)
    assert needed is not None
    reach = float(limits.factor(np.array(needed))) * 0.5 / np.sqrt(needed)
    assert reach == pytest.approx(0.03, rel=1e-3)
    assert values_needed(limits, 0.5, 1e-9) is None
