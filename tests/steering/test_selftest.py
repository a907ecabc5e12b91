from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from steering.edit import Edit, Site
from steering.models import LanguageModel
from steering.plan import Step
from steering.profile import RAW, Profile, ProfileError
from steering.selftest import self_test
from tests.conftest import make_model
from tests.steering.edits import mixture, random_edit, random_gate

EDITS = {name: [a.edit for a in row if a.strength] for name, row in mixture().items()}
EDITS = {name: row for name, row in EDITS.items() if row}


def profile(lm: LanguageModel, *edits: Edit, strength: float = 0.8) -> Profile:
    return Profile("tested", "raw", tuple(edits), lm.fingerprint, strength=strength)


@pytest.mark.parametrize("name", EDITS)
def test_sound_profiles_pass(name: str, tiny_llama: LanguageModel) -> None:
    self_test(tiny_llama, profile(tiny_llama, *EDITS[name]))


def test_sound_profiles_pass_on_every_family(any_model: LanguageModel) -> None:
    edits = EDITS["sublayers"] + EDITS["several at one site"]
    self_test(any_model, profile(any_model, *edits))


def test_sound_profiles_pass_in_bfloat16() -> None:
    lm = make_model("llama", seed=5)
    lm = replace(lm, model=type(lm.model)(lm.config).to(torch.bfloat16).eval())
    from steering.models import find_sites

    lm = replace(lm, sites=find_sites(lm.model))
    self_test(lm, profile(lm, *EDITS["sublayers"], *EDITS["last-prompt-token gate"]))


def test_a_profile_without_edits_passes_without_a_forward_pass(tiny_llama: LanguageModel) -> None:
    self_test(replace(tiny_llama, model=None), RAW)
    self_test(replace(tiny_llama, model=None), profile(tiny_llama, *EDITS["sublayers"], strength=0))


def test_hooks_are_gone_afterwards(tiny_llama: LanguageModel) -> None:
    self_test(tiny_llama, profile(tiny_llama, random_edit("1.resid_post")))
    for module in tiny_llama.model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


@pytest.mark.parametrize("sound", [True, False])
def test_only_what_it_hands_over_touches_the_model(tiny_llama: LanguageModel, sound: bool) -> None:
    """A server's other thread may run the model between any two pieces."""
    model, inside = tiny_llama.model, []

    def hooks() -> list[int]:
        return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]

    def run(function: Any) -> Any:
        inside.append(True)
        found = function()
        between.append(hooks())
        inside.pop()
        return found

    between: list[list[int]] = []
    calls: list[bool] = []
    watch = model.register_forward_pre_hook(lambda *_: calls.append(bool(inside)))
    edit = random_edit("1.resid_post", scale=0.3 if sound else 1e25)
    tested = profile(tiny_llama, edit, strength=1 if sound else 1e10)
    try:
        before = hooks()
        if sound:
            self_test(tiny_llama, tested, run)
            assert calls == [True] * 6
        else:
            with pytest.raises(ProfileError):
                self_test(tiny_llama, tested, run)
        assert calls and all(calls)
        assert before == between[0] == between[-1] == hooks() != between[1]
    finally:
        watch.remove()


def broken(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    edit = Step._edit

    def wrong(self: Step, stack: Any, x: Tensor) -> Tensor:
        return change(self, x, edit(self, stack, x))  # type: ignore[no-any-return]

    monkeypatch.setattr(Step, "_edit", wrong)


@pytest.mark.parametrize(
    ("what", "change", "message"),
    [
        ("off by a thousandth", lambda _, x, y: x + (y - x) * 1.001, "is not the edit's"),
        ("nothing at all", lambda _, x, y: x.clone(), "is not the edit's"),
        ("other rows", lambda _, x, y: y + 1e-6, "reached a row without edits"),
        ("only the prompt", lambda s, x, y: x.clone() if s.generating else y, "while generating"),
        ("NaN", lambda _, x, y: torch.cat([y[:1] * float("nan"), y[1:]]), "not finite"),
    ],
)
def test_an_engine_that_applies_something_else_is_caught(
    monkeypatch: pytest.MonkeyPatch, tiny_llama: LanguageModel, what: str, change: Any, message: str
) -> None:
    broken(monkeypatch, change)
    with pytest.raises(ProfileError, match=message):
        self_test(tiny_llama, profile(tiny_llama, random_edit("1.resid_post", 2)))


def test_a_phase_or_first_token_rule_that_is_ignored_is_caught(
    monkeypatch: pytest.MonkeyPatch, tiny_llama: LanguageModel
) -> None:
    monkeypatch.setattr("steering.plan._phase_index", lambda edit: 4)
    for kwargs in ({"phase": "generation"}, {"skip_first_token": True}):
        with pytest.raises(ProfileError, match="on the prompt"):
            edits = (random_edit("1.resid_post", **kwargs), random_edit("1.resid_post"))
            self_test(tiny_llama, profile(tiny_llama, *edits))


def test_hooks_that_touch_an_unedited_model_are_caught(
    monkeypatch: pytest.MonkeyPatch, tiny_llama: LanguageModel
) -> None:
    at = Step.at
    monkeypatch.setattr(Step, "at", lambda self, sites, x: at(self, sites, x) + 1e-5)
    with pytest.raises(ProfileError, match="at strength 0"):
        self_test(tiny_llama, profile(tiny_llama, random_edit("1.resid_post")))


def test_an_edit_that_overflows_the_model_is_refused(tiny_llama: LanguageModel) -> None:
    edit = random_edit("1.resid_post", scale=1e25)
    with pytest.raises(ProfileError, match="tested fails its self-test"):
        self_test(tiny_llama, profile(tiny_llama, edit, strength=1e10))


def test_a_gate_that_overflows_the_model_is_refused(tiny_llama: LanguageModel) -> None:
    gate = random_gate("1.resid_post")
    gate = replace(gate, direction=gate.direction * 1e30)
    edit = random_edit("1.resid_post", 1, scale=1e5, gate=gate)
    with pytest.raises(ProfileError, match="not finite"):
        self_test(tiny_llama, profile(tiny_llama, edit, strength=1e6))


def test_a_site_that_the_model_lacks_is_refused(tiny_llama: LanguageModel) -> None:
    edit = replace(random_edit("1.resid_post"), site=Site(9, "resid_post"))
    with pytest.raises(ProfileError, match="the model has 4 blocks"):
        self_test(tiny_llama, profile(tiny_llama, edit))
