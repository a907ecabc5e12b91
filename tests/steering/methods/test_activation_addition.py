from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from steering.activations import gather_activations
from steering.edit import AppliedEdit, Site
from steering.fit import fit_profile
from steering.methods.activation_addition import ActivationAddition, addition
from steering.prompts import Prompt, PromptSet
from tests.conftest import make_model
from tests.steering.methods.synthetic import Scripted, always_answers, fit_data, unedited


def test_the_vector_is_the_difference_of_the_classes_means() -> None:
    data = fit_data(make_model("llama"), Scripted())
    fitted = ActivationAddition(blocks=(2,)).fit(data)
    (edit,) = fitted.edits
    states = {
        harmful: gather_activations(data.lm, data.encode(prompts), [edit.site])[edit.site].double()
        for harmful, prompts in ((True, data.fit.harmful), (False, data.fit.benign))
    }
    expected = (states[True].mean(0) - states[False].mean(0)).float()
    torch.testing.assert_close(edit.shift, expected, rtol=1e-5, atol=1e-6)
    assert edit.rank == 0 and edit.gate is None and edit.skip_first_token


def test_the_contrast_decides_whose_means_are_compared() -> None:
    data = fit_data(make_model("llama"), Scripted())
    (edit,) = ActivationAddition(contrasts=("outcomes",), blocks=(2,)).fit(data).edits
    sides: dict[str, list[list[int]]] = {"refusal": [], "answer": []}
    for prompt in data.fit.harmful:
        outcome = unedited(True, "!" in prompt.text, int(prompt.text.split()[-1]))
        sides[outcome].append(data.lm.encode_prompt(prompt.text))
    refused, answered = (
        gather_activations(data.lm, ids, [edit.site])[edit.site].double().mean(0)
        for ids in sides.values()
    )
    torch.testing.assert_close(edit.shift, (refused - answered).float(), rtol=1e-5, atol=1e-6)


def test_the_state_moves_by_strength_times_the_vector() -> None:
    lm, site = make_model("llama"), Site(1, "resid_post")
    edit = addition(torch.randn(64, generator=torch.Generator().manual_seed(0)), site)
    ids = [lm.encode_prompt("one")]
    before = gather_activations(lm, ids, [site])[site]
    after = gather_activations(lm, ids, [site], edits=[AppliedEdit(edit, 0.3)])[site]
    torch.testing.assert_close(after, before + 0.3 * edit.shift, rtol=1e-5, atol=1e-5)


def test_away_from_refusal_is_the_same_vector_backwards_and_a_red_team_profile() -> None:
    lm = make_model("llama")
    towards = fit_profile(ActivationAddition(blocks=(1,)), fit_data(lm, Scripted()))
    away = fit_profile(
        ActivationAddition(blocks=(1,), towards="answer"), fit_data(lm, Scripted(always_answers))
    )
    torch.testing.assert_close(away.edits[0].shift, -towards.edits[0].shift)
    assert (towards.red_team, away.red_team) == (False, True)
    assert towards.provenance["diagnostics"]["search"]["judged"][1]["harmful_refused"] > 0.5
    assert away.provenance["diagnostics"]["search"]["judged"][1]["harmful_answered"] == 1


def test_settings_that_make_no_sense_are_refused() -> None:
    for settings, message in (
        ({"towards": "sideways"}, "towards is refusal or answer"),
        ({"contrasts": ()}, "contrasts needs at least one value"),
        ({"contrasts": "words"}, "contrasts are of labels, filtered, outcomes"),
        ({"phases": "late"}, "phases are of prompt, generation, all"),
        ({"strengths": (0.5, -1.0)}, "strengths are above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            ActivationAddition(**settings)  # type: ignore[arg-type]
    assert ActivationAddition(strengths=0.5).strengths == (0.5,)  # type: ignore[arg-type]


def test_selection_prompts_of_one_label_cannot_choose() -> None:
    data = fit_data(make_model("llama"), Scripted())
    lacking = type(data)(data.lm, data.fit, PromptSet(tuple(data.selection.harmful)))
    with pytest.raises(ValueError, match="needs harmful and benign selection prompts"):
        ActivationAddition().fit(lacking)


def test_sets_that_do_not_differ_have_no_direction() -> None:
    data = fit_data(make_model("llama"), Scripted())
    same = tuple(Prompt(f"cake {i}", label) for i in range(4) for label in (True, False))
    with pytest.raises(ValueError, match="the two sides of the contrast do not differ at 2"):
        ActivationAddition(blocks=(2,)).fit(replace(data, fit=PromptSet(same)))
