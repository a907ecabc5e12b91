from __future__ import annotations

from dataclasses import replace

import pytest

from steering.fit import fit_profile, make_method
from steering.judge import JUDGE_VERSION
from steering.methods import FitData
from steering.methods.alphasteer import AlphaSteer
from steering.methods.llm_va import LlmVa
from steering.methods.raw import Raw
from steering.models import LanguageModel
from steering.prompts import Prompt, PromptSet
from tests.steering.methods.synthetic import Scripted, fit_data


def test_settings_are_json_where_they_parse_and_text_else() -> None:
    method = make_method("alphasteer", {"blocks": "[1, 2]", "rho": "0.5", "gate": "token"})
    assert method == AlphaSteer(blocks=(1, 2), rho=0.5, gate="token")


def test_settings_have_the_type_of_their_field() -> None:
    method = make_method("llm_va", {"scale_free": "False", "select": "0.5", "damping": "[1, 0.5]"})
    assert isinstance(method, LlmVa)
    assert method.scale_free is False and method.select == (0.5,) and method.damping == (1.0, 0.5)


def test_a_preset_is_a_starting_point_that_settings_override() -> None:
    paper = make_method("llm-va", {"preset": "paper", "iterations": "5"})
    assert isinstance(paper, LlmVa)
    assert (paper.iterations, paper.cost, paper.scale_free) == (5, (1.0,), False)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("telepathy", {}, "unknown method 'telepathy'; there are activation_addition, "),
        ("raw", {"x": "1"}, "raw has no hyper-parameter 'x'; it has none"),
        ("alphasteer", {"roh": "1"}, "it has blocks, depth"),
        ("alphasteer", {"gate": "late"}, "gate cannot be 'late'"),
        ("llm_va", {"scale_free": "perhaps"}, "scale_free cannot be 'perhaps'; it is a bool"),
        ("alphasteer", {"max_benign_loss": "lots"}, "max_benign_loss cannot be 'lots'"),
        ("optimal_transport", {"window": "2.5"}, "window cannot be '2.5'; it is a int"),
        ("llm_va", {"preset": "mine"}, "it has tuned, paper|it has paper, tuned"),
        ("alphasteer", {"preset": "paper"}, "it has none"),
    ],
)
def test_what_a_method_lacks_is_an_error_that_lists_what_it_has(
    name: str, settings: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_method(name, settings)


def test_provenance_says_how_the_profile_was_made(tiny_llama: LanguageModel) -> None:
    prompts = PromptSet((Prompt("a", True), Prompt("b", False)))
    data = FitData(tiny_llama, prompts, prompts, seed=7)
    profile = fit_profile(Raw(), data, name="mine")
    assert profile.name == "mine" and profile.method == "raw" and profile.edits == ()
    provenance = profile.provenance
    assert provenance["prompts"] == {"fit": prompts.digest, "selection": prompts.digest}
    assert provenance["seed"] == 7 and provenance["base_model"] == "tiny-llama"
    assert provenance["judge"] == JUDGE_VERSION
    assert provenance["versions"]["torch"].startswith("2.")
    assert len(provenance["date"]) == len("2026-01-01")


def test_repeated_prompts_are_counted_without_their_text_and_reported(
    tiny_llama: LanguageModel,
) -> None:
    fit = PromptSet((Prompt("do a", True), Prompt("do b", False), Prompt("Do A!", False)))
    selection = PromptSet((Prompt("do b", False), Prompt("c", True)))
    lines: list[str] = []
    data = FitData(tiny_llama, fit, selection, report=lines.append)
    found = fit_profile(Raw(), data).provenance["overlaps"]
    assert found == {
        "fit": {"checked": 3, "exact": 0, "normalized": 1, "conflicts": 1},
        "selection": {"checked": 2, "exact": 0, "normalized": 0, "conflicts": 0},
        "selection in fit": {"checked": 2, "exact": 1, "normalized": 0, "conflicts": 0},
    }
    warnings = [line for line in lines if line.startswith("warning")]
    assert len(warnings) == 2 and "1 of them with the other label, as 'Do A!'" in warnings[0]


def test_seconds_are_of_this_fit_and_add_up(tiny_llama: LanguageModel) -> None:
    data = fit_data(tiny_llama, Scripted())
    for _ in range(2):  # the second must not count the first
        start = data.clock.now()
        seconds = fit_profile(AlphaSteer(), data).provenance["seconds"]
        assert set(seconds) == {"collecting", "generating", "selecting", "solving"}
        assert 0 < sum(seconds.values()) <= data.clock.now() - start + 0.02


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("activation_addition", {"candidates": "0"}, "candidates is at least 1"),
        ("leace", {"prompts_per_kind": "0"}, "prompts_per_kind is at least 1"),
        ("leace", {"shrinkages": "[0, 2]"}, "shrinkages are shares"),
        ("cast", {"condition_depth": "[0.9, 0.1]"}, "two shares in order"),
        ("cast", {"condition_blocks": "[1, 1]"}, "condition_blocks are distinct"),
        ("activation_addition", {"blocks": "-1"}, "blocks are distinct and count from 0"),
        ("activation_addition", {"contrasts": "both"}, "takes labels, filtered, outcomes$"),
        ("affine_concept_editing", {"towards": "sideways"}, "takes refusal, answer$"),
        ("affine_concept_editing", {"alphas": "NaN"}, "alphas holds a number that is not finite"),
        ("directional_ablation", {"min_induce": "nan"}, "not finite"),
        ("optimal_transport", {"ridge": "inf"}, "not finite"),
        ("alphasteer_plus", {"strength": "0"}, "strength is above 0"),
        ("alphasteer_plus", {"rho": "1.5"}, "rho is a share"),
        ("alphasteer", {"alpha": "0"}, "the ridge penalty"),
        ("alphasteer", {"alpha_scale": "-1"}, "the ridge penalty"),
    ],
)
def test_what_is_wrong_with_a_setting_shows_before_anything_is_computed(
    name: str, settings: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_method(name, settings)


def test_a_prompt_that_leaves_no_room_for_a_reply_is_named_at_once(
    tiny_llama: LanguageModel,
) -> None:
    generator = Scripted()
    data = fit_data(tiny_llama, generator)
    long = Prompt("tell me " + "more " * 100, True)
    with pytest.raises(ValueError, match=r"'tell me more .*tokens, and with 12 of reply .* 256"):
        fit_profile(AlphaSteer(), replace(data, selection=PromptSet((long,))))
    assert not generator.calls
