"""The form of prompts: kwargs of the template, a system prompt, a date."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers.utils import chat_template_utils

import steering
from steering.models import LanguageModel, load_model
from steering.monitor import Monitor, MonitorError
from steering.monitor_card import card, table
from steering.monitor_fit import fit_monitor
from steering.template import (
    FIXED_DATE,
    TemplateForm,
    check_kwargs,
    default_kwargs,
    form_of,
    prompt_ending,
    template_variables,
    with_form,
)
from tests.conftest import (
    CHAT_TEMPLATE,
    DATED_TEMPLATE,
    REASONING_TEMPLATE,
    make_model,
    with_template,
)
from tests.steering.methods.synthetic import Scripted, fit_data
from tests.steering.test_monitor import make_monitor

DEMO_MONITOR = Path(steering.__path__[0]) / "demo" / "profiles" / "monitor.safetensors"
USER = [{"role": "user", "content": "Hi"}]


def model_with(template: str, **changes: Any) -> LanguageModel:
    return replace(with_template(make_model("llama"), template), **changes)


def saved(lm: LanguageModel, path: Path) -> LanguageModel:
    lm.model.save_pretrained(path)
    lm.tokenizer.save_pretrained(path)
    return load_model(str(path))


# What templates take


def test_the_names_a_template_takes_are_found_and_what_rendering_provides_is_not() -> None:
    assert template_variables(CHAT_TEMPLATE) == set()
    assert template_variables(REASONING_TEMPLATE) == {"enable_thinking"}
    assert template_variables(DATED_TEMPLATE) == {"date_string"}
    more = "{% generation %}{{ eos_token }}{{ tools }}{{ documents }}{% endgeneration %}"
    loop = "{% for m in messages %}{% break %}{% endfor %}{{ raise_exception(style) }}"
    assert template_variables(more + loop) == {"style"}
    assert template_variables("{% broken") == set()


def test_a_kwarg_that_the_template_does_not_know_is_named_with_those_that_it_takes() -> None:
    lm = model_with(REASONING_TEMPLATE)
    check_kwargs(lm, {"enable_thinking": True})
    for name in ("thinking", "messages", "chat_template", "bos_token", "tokenize"):
        with pytest.raises(ValueError, match=f"'{name}'; it takes enable_thinking"):
            check_kwargs(lm, {name: 1})
    with pytest.raises(ValueError, match="nothing besides messages"):
        check_kwargs(make_model("llama"), {"enable_thinking": True})


def test_a_loaded_reasoning_model_replies_without_reasoning_unless_told(tmp_path: Path) -> None:
    lm = saved(model_with(REASONING_TEMPLATE), tmp_path)
    assert lm.template_kwargs == {"enable_thinking": False}
    assert lm.tokenizer.decode(lm.encode_prompt("Hi")).endswith("<|assistant|><think></think>")
    thinking = lm.encode_chat(USER, enable_thinking=True)
    assert lm.tokenizer.decode(thinking).endswith("<|assistant|>")
    assert default_kwargs(CHAT_TEMPLATE) == {}


# Dates


def test_prompts_of_a_dated_template_are_the_same_tomorrow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Someday(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Someday:
            return cls(2031, 5, 6)

    monkeypatch.setattr(chat_template_utils, "datetime", Someday)
    lm = saved(model_with(DATED_TEMPLATE), tmp_path)
    assert lm.template_date == FIXED_DATE
    assert "Today: 26 Jul 2024" in lm.tokenizer.decode(lm.encode_prompt("Hi"))
    other = replace(lm, template_date="2025-01-02")
    assert "Today: 02 Jan 2025" in lm.tokenizer.decode(other.encode_prompt("Hi"))
    today = replace(lm, template_date=None)
    assert "Today: 06 May 2031" in lm.tokenizer.decode(today.encode_prompt("Hi"))
    asked = today.encode_chat(USER, date_string="1 Apr 1999")
    assert "Today: 1 Apr 1999" in lm.tokenizer.decode(asked)


def test_a_template_without_a_date_has_none(tmp_path: Path) -> None:
    lm = saved(make_model("llama"), tmp_path)
    assert form_of(lm) == TemplateForm()


# Forms


def test_the_system_prompt_comes_before_every_prompt() -> None:
    lm = replace(make_model("llama"), system_prompt="Be kind.")
    text = lm.tokenizer.decode(lm.encode_prompt("Hi"))
    assert text == "<|begin|><|system|>Be kind.<|end|><|user|>Hi<|end|><|assistant|>"


@pytest.mark.parametrize(
    ("kwargs", "ending"),
    [
        ({}, "<|end|><|assistant|>"),
        ({"enable_thinking": False}, "<|end|><|assistant|><think></think>"),
    ],
)
def test_all_prompts_of_a_form_end_alike(kwargs: dict[str, Any], ending: str) -> None:
    lm = with_form(model_with(REASONING_TEMPLATE), TemplateForm(kwargs))
    assert lm.tokenizer.decode(prompt_ending(lm)) == ending


@pytest.mark.parametrize(
    ("system", "kwargs", "admitted"),
    [
        (["Be kind."], {"enable_thinking": False}, True),
        (["Be kind."], {"enable_thinking": False, "date_string": "1 Apr 1999"}, True),
        (["Be kind."], {"enable_thinking": True}, False),
        (["Be kind."], {"enable_thinking": 0}, False),  # no false to a template
        (["Be kind."], {}, False),
        (["Be rude."], {"enable_thinking": False}, False),
        (["Be kind.", "Be kind."], {"enable_thinking": False}, False),
        ([], {"enable_thinking": False}, False),
    ],
)
def test_a_form_admits_its_own_kwargs_and_system_prompt_whatever_the_date(
    system: list[str], kwargs: dict[str, Any], admitted: bool
) -> None:
    form = TemplateForm({"enable_thinking": False}, "Be kind.", "2024-01-01")
    messages = [{"role": "system", "content": text} for text in system] + USER
    assert form.admits(messages, kwargs) == admitted
    assert TemplateForm().admits(USER, {})


# Monitors


def test_a_fitted_monitor_records_its_form_and_keeps_it(tmp_path: Path) -> None:
    form = TemplateForm({"enable_thinking": False}, "Be kind.", None)
    lm = with_form(model_with(REASONING_TEMPLATE), form)
    monitor = fit_monitor(fit_data(lm, Scripted(), per_kind=24))
    assert monitor.template == form
    assert monitor.provenance["template_kwargs"] == {"enable_thinking": False}
    assert monitor.provenance["system_prompt"] == "Be kind."
    assert Monitor.load(monitor.save(tmp_path / "m.safetensors")).template == form


def test_the_card_says_how_good_the_probes_are_on_held_out_prompts() -> None:
    monitor = fit_monitor(fit_data(make_model("llama"), Scripted(), per_kind=24))
    shown, lines = card(monitor), "\n".join(table(monitor))
    json.dumps(shown)
    assert [probe["auroc"] for probe in shown["benign"]] == [p.auroc for p in monitor.benign]
    assert shown["answer"][0]["profile"] == "raw"
    held_out = sum(sum(classes.values()) for classes in shown["classes"].values())
    assert held_out == monitor.provenance["benign"][0]["held_out"]
    assert "answer, raw" in lines and f"benign above {monitor.benign_above:g}" in lines
    best = monitor.benign_probe
    assert f"{best.auroc:.3f}  {best.expected_calibration_error:.4f}  best" in lines


def test_monitors_from_before_there_were_forms_have_the_kwargs_of_their_provenance(
    tmp_path: Path,
) -> None:
    assert Monitor.load(DEMO_MONITOR).template == TemplateForm()
    provenance = {"template_kwargs": {"enable_thinking": True}}
    path = make_monitor(provenance=provenance).save(tmp_path / "m.safetensors")
    rewrite(path, lambda header: header.pop("template"))
    assert Monitor.load(path).template == TemplateForm({"enable_thinking": True})


@pytest.mark.parametrize(
    "template",
    [{"template_kwargs": [1]}, {"system_prompt": 3}, {"template_date": "tomorrow"}, []],
    ids=str,
)
def test_a_monitor_with_a_malformed_form_is_refused(tmp_path: Path, template: Any) -> None:
    path = make_monitor().save(tmp_path / "m.safetensors")
    rewrite(path, lambda header: header.update(template=template))
    with pytest.raises(MonitorError, match="not a sound monitor"):
        Monitor.load(path)


def rewrite(path: Path, change: Any) -> None:
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["pilothouse.monitor"])
    change(header)
    save_file(load_file(path), path, {"pilothouse.monitor": json.dumps(header)})
