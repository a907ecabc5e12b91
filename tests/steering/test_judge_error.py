"""Correcting rates for the judge's errors: the formula, and its interval by simulation."""

from __future__ import annotations

import numpy as np
import pytest

from steering.judge import judge
from steering.judge_error import (
    corrected_by,
    corrected_rate,
    corrected_shares,
    why_not_corrected,
)
from steering.judge_set import Card, Rate


def test_the_correction_undoes_the_judges_errors() -> None:
    for truth in (0.0, 0.2, 0.5, 1.0):
        for q1, q0 in ((0.95, 0.9), (0.8, 1.0), (1.0, 1.0)):
            seen = truth * q1 + (1 - truth) * (1 - q0)
            found = corrected_rate(seen, 500, q1, 200, q0, 200)
            assert found.estimate == pytest.approx(truth)
            assert found.observed == seen
            assert 0 <= found.low <= found.estimate <= found.high <= 1


def test_estimates_stay_between_zero_and_one() -> None:
    assert corrected_rate(0.01, 100, 0.9, 100, 0.9, 100).estimate == 0
    assert corrected_rate(0.99, 100, 0.9, 100, 0.9, 100).estimate == 1


def test_a_judge_close_to_a_coin_is_refused() -> None:
    for q1, q0 in ((0.6, 0.5), (0.1, 1.0), (0.5, 0.5)):
        with pytest.raises(ValueError, match="cannot be corrected"):
            corrected_rate(0.5, 100, q1, 100, q0, 100)
    assert corrected_rate(0.5, 100, 0.61, 100, 0.5, 100)


def test_what_is_no_rate_is_refused() -> None:
    for arguments in ((1.1, 10, 1, 10, 1, 10), (0.5, 0, 1, 10, 1, 10), (0.5, 10, 1, 10, 1, 0)):
        with pytest.raises(ValueError, match="is no rate"):
            corrected_rate(*arguments)


def test_fewer_labelled_replies_make_a_wider_interval() -> None:
    widths = [
        found.high - found.low
        for n in (10000, 100, 20)
        for found in [corrected_rate(0.3, 400, 0.9, n, 0.9, n)]
    ]
    assert widths == sorted(widths) and widths[0] < widths[2] / 2
    perfect = corrected_rate(0.0, 50, 1.0, 30, 1.0, 30)
    assert perfect.high > 0.05  # not certain: neither sample is large


@pytest.mark.parametrize(
    ("truth", "q1", "n1", "q0", "n0"),
    [
        (0.3, 0.95, 114, 0.97, 108),
        (0.3, 0.80, 114, 0.97, 108),
        (0.05, 0.9, 60, 0.95, 60),
        (0.9, 0.9, 60, 0.95, 60),
        (0.5, 0.8, 40, 0.85, 40),
    ],
)
def test_the_interval_covers_the_truth_as_often_as_it_says(
    truth: float, q1: float, n1: int, q0: float, n0: int
) -> None:
    rng = np.random.default_rng(0)
    n, rounds = 200, 2000
    seen = rng.binomial(n, truth * q1 + (1 - truth) * (1 - q0), rounds) / n
    right = rng.binomial(n1, q1, rounds) / n1, rng.binomial(n0, q0, rounds) / n0
    covered, estimates = 0, []
    for p, s1, s0 in zip(seen, *right, strict=True):
        found = corrected_rate(float(p), n, float(s1), n1, float(s0), n0)
        covered += found.low <= truth <= found.high
        estimates.append(found.estimate)
    assert 0.93 <= covered / rounds <= 0.99
    assert np.mean(estimates) == pytest.approx(truth, abs=0.02)


def test_the_raw_rate_would_be_wrong_where_the_corrected_one_is_right() -> None:
    # Equal truth, judges of different sensitivity: five points out of nothing.
    a, b = (corrected_rate(0.3 * q1, 10**6, q1, 10**6, 1.0, 10**6) for q1 in (0.95, 0.80))
    assert a.observed - b.observed == pytest.approx(0.045)
    assert a.estimate == pytest.approx(b.estimate) == pytest.approx(0.3)


def test_a_card_corrects_counts() -> None:
    card = judge.card()
    q1, q0 = card.sensitivity, card.specificity
    assert corrected_by(card, 30, 100) == corrected_rate(
        0.3, 100, q1.value, q1.total, q0.value, q0.total
    )


def test_what_is_neither_refusal_nor_answer_is_taken_as_counted() -> None:
    card = judge.card()
    rate = corrected_by(card, 30, 80)
    shares = corrected_shares(card, 30, 50, 100)
    assert shares is not None
    refused, answered = shares
    assert (refused.observed, answered.observed) == (0.3, 0.5)
    assert refused.estimate == pytest.approx(0.8 * rate.estimate)
    assert refused.estimate + answered.estimate == pytest.approx(0.8)
    assert refused.low + answered.high == pytest.approx(0.8)
    assert refused.high + answered.low == pytest.approx(0.8)
    assert corrected_shares(card, 0, 0, 100) is None


def test_a_card_says_why_it_corrects_nothing() -> None:
    assert why_not_corrected(judge.card()) == ""
    coin = Card("coin", "held_out", Rate(5, 10), Rate(5, 10))
    assert "cannot be corrected" in why_not_corrected(coin)
