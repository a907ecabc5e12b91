"""Choosing tokens."""

from __future__ import annotations

import pytest
import torch

from server.engine.base import Sampling
from server.engine.sampling import NOT_FINITE, check_sampling, make_generator, sample

GREEDY = Sampling(temperature=0)


def draws(logits: torch.Tensor, sampling: Sampling, count: int) -> torch.Tensor:
    """Frequencies `[V]` over `count` draws from one row of logits."""
    generators = [make_generator(sampling)] * count
    choice = sample(logits.expand(count, -1), [sampling] * count, generators)
    return torch.bincount(torch.tensor(choice.token_ids), minlength=len(logits)) / count


def test_temperature_zero_takes_the_most_likely_token() -> None:
    logits = torch.randn(5, 50)
    assert sample(logits, [GREEDY] * 5, [None] * 5).token_ids == logits.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_tempered_distribution(temperature: float) -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, float("-inf")])
    found = draws(logits, Sampling(temperature=temperature, seed=0), 20000)
    torch.testing.assert_close(found, (logits / temperature).softmax(-1), atol=0.015, rtol=0)


def test_top_k_and_top_p_keep_only_their_tokens() -> None:
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    top_k = draws(logits, Sampling(top_k=2, seed=1), 20000)
    torch.testing.assert_close(top_k, torch.tensor([0, 4 / 7, 0, 3 / 7]), atol=0.015, rtol=0)
    top_p = draws(logits, Sampling(top_p=0.75, seed=1), 20000)
    torch.testing.assert_close(top_p, torch.tensor([0, 4, 2, 3]) / 9, atol=0.015, rtol=0)
    # top_p is taken of what top_k left: 4/7 is enough.
    both = draws(logits, Sampling(top_k=2, top_p=0.5, seed=1), 1000)
    assert both.tolist() == [0, 1, 0, 0]


def test_a_long_tail_is_sorted_whole_when_the_head_does_not_cover_top_p() -> None:
    found = draws(torch.zeros(2000), Sampling(top_p=0.75, seed=3), 4000)
    assert 1024 < int((found > 0).sum()) <= 1500
    found = draws(torch.zeros(2000), Sampling(top_k=1500, seed=3), 4000)
    assert 1024 < int((found > 0).sum()) <= 1500


def test_extreme_temperatures_neither_overflow_nor_underflow() -> None:
    logits = torch.tensor([1e4, -1e4, 0.0])
    assert draws(logits, Sampling(temperature=1e-30, seed=0), 50)[0] == 1
    assert (draws(torch.randn(4), Sampling(temperature=1e30, seed=0), 2000) > 0.1).all()


def test_a_row_draws_the_same_in_any_company() -> None:
    logits = torch.randn(6, 3000)
    mine = Sampling(temperature=0.8, top_p=0.9, seed=5)
    alone = sample(logits[2:3], [mine], [make_generator(mine)])
    others = [GREEDY, Sampling(top_k=5), mine, Sampling(), Sampling(top_p=0.3), GREEDY]
    mixed = sample(logits, others, [make_generator(s) for s in others])
    assert mixed.token_ids[2] == alone.token_ids[0]
    assert mixed.logprobs[2] == pytest.approx(alone.logprobs[0])


def test_logprobs_are_of_the_raw_distribution_and_bad_rows_are_named() -> None:
    logits = torch.randn(4, 10)
    logits[1, 3] = float("nan")
    logits[2, 3] = float("inf")
    logits[3, 3] = float("-inf")
    samplings = [Sampling(temperature=0.1, seed=i) for i in range(4)]
    choice = sample(logits, samplings, [make_generator(s) for s in samplings])
    assert choice.errors == [None, NOT_FINITE, NOT_FINITE, None]
    expected = logits[0].log_softmax(-1)[choice.token_ids[0]]
    assert choice.logprobs[0] == pytest.approx(float(expected), abs=1e-5)


def test_any_integer_is_a_seed() -> None:
    for seed in (-1, 0, 2**64 - 1, 10**30):
        assert make_generator(Sampling(seed=seed)) is not None


@pytest.mark.parametrize("temperature", [1e-5, 1e-10, 1e-44, 1e-46])
def test_a_temperature_next_to_nothing_takes_the_most_likely_token(temperature: float) -> None:
    logits = torch.randn(200) * 3
    found = draws(logits, Sampling(temperature=temperature, seed=0), 3)
    assert found.argmax() == logits.argmax() and found.max() == 1


def test_a_top_p_next_to_nothing_still_leaves_the_best_token() -> None:
    logits = torch.randn(200)
    for top_p in (1e-10, 1e-46):
        assert draws(logits, Sampling(top_p=top_p, seed=0), 3)[logits.argmax()] == 1


def test_a_top_k_beyond_every_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match=r"2\*\*31"):
        check_sampling(Sampling(top_k=10**23))
