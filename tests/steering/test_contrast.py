from __future__ import annotations

import pytest
import torch

from steering.activations import LastTokens, gather_activations
from steering.contrast import (
    CONTRASTS,
    contrast_sides,
    mean_differences,
    mean_states,
    state_moments,
    unit,
)
from steering.edit import Site
from steering.methods import FitData
from steering.prompts import PromptSet
from tests.conftest import make_model
from tests.steering.methods.synthetic import Scripted, always_answers, fit_data, unedited

SITES = (Site(1, "resid_post"), Site(2, "attn_out"))


def data(per_kind: int = 8) -> FitData:
    return fit_data(make_model("llama"), Scripted(), per_kind=per_kind)


@pytest.mark.parametrize("contrast", CONTRASTS)
def test_a_contrast_sorts_prompts_by_label_and_by_what_the_model_does(contrast: str) -> None:
    sides = contrast_sides(data(), contrast, 8)  # type: ignore[arg-type]

    def outcome(text: str) -> str:
        return unedited("bomb" in text, "!" in text, int(text.split()[-1]))

    assert all(p.harmful for p in sides.refused)
    assert all(p.harmful == (contrast == "outcomes") for p in sides.answered)
    if contrast == "labels":
        assert len(sides.refused) == len(sides.answered) == 16
    else:
        assert {outcome(p.text) for p in sides.refused} == {"refusal"}
        assert {outcome(p.text) for p in sides.answered} == {"answer"}


def test_only_contrasts_that_need_outcomes_let_the_model_answer() -> None:
    generator = Scripted()
    contrast_sides(fit_data(make_model("llama"), generator, per_kind=4), "labels", 4)
    assert not generator.calls


def test_a_contrast_takes_no_more_prompts_of_a_kind_than_it_is_told() -> None:
    assert len(contrast_sides(data(), "labels", 3).refused) == 6  # of two kinds


def test_an_empty_side_is_an_error_that_names_the_way_out() -> None:
    never_refuses = fit_data(make_model("llama"), Scripted(raw=always_answers), per_kind=4)
    with pytest.raises(
        ValueError, match=r"that the model refuses.*add some, or use another contrast"
    ):
        contrast_sides(never_refuses, "filtered", 4)
    found = data(4)
    one_label = FitData(found.lm, PromptSet(tuple(found.fit.benign)), found.selection)
    with pytest.raises(ValueError, match="one kind is missing"):
        contrast_sides(one_label, "labels", 4)
    with pytest.raises(ValueError, match="contrast is one of labels, filtered, outcomes"):
        contrast_sides(found, "sideways", 4)  # type: ignore[arg-type]


def test_streamed_means_equal_those_of_all_states_at_once() -> None:
    found = data()
    sides = contrast_sides(found, "labels", 8)
    refused, answered = (
        gather_activations(found.lm, found.encode(prompts), SITES)
        for prompts in (sides.refused, sides.answered)
    )
    for site, difference in mean_differences(found, sides, SITES).items():
        expected = refused[site].double().mean(0) - answered[site].double().mean(0)
        torch.testing.assert_close(difference, expected, rtol=1e-6, atol=1e-8)
    for site, moments in state_moments(found, sides.refused, SITES).items():
        x = refused[site].double()
        torch.testing.assert_close(moments.covariance(), x.mT.cov(), rtol=1e-6, atol=1e-6)


def test_pooled_means_keep_the_pool_s_shape() -> None:
    found = data(4)
    means = mean_states(found, found.fit.harmful, SITES, LastTokens(2))
    last = mean_states(found, found.fit.harmful, SITES)
    for site in SITES:
        assert means[site].shape == (2, 64)
        torch.testing.assert_close(means[site][1], last[site])


def test_sides_that_do_not_differ_have_no_direction() -> None:
    with pytest.raises(ValueError, match=r"do not differ at 1\.resid_post"):
        unit(torch.zeros(4).double(), SITES[0])
