"""Prompts of another form than the monitor was fitted on carry no probes, and say so."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from server.cli import main
from server.hosting import Host, open_host
from server.settings import load_settings
from steering.models import LanguageModel, load_model
from steering.template import TemplateForm
from tests.conftest import REASONING_TEMPLATE, make_model, with_template
from tests.server.fakes import body, error_of, http_client, post
from tests.server.templates import HERMES
from tests.server.test_hosting import make_monitor, rank_one

NO_THINKING = TemplateForm({"enable_thinking": False})
PROBES = ("answer_probability", "benign_probability")


def saved_with(template: str, path: Path) -> LanguageModel:
    lm = with_template(make_model("llama"), template)
    lm.model.save_pretrained(path)
    lm.tokenizer.save_pretrained(path)
    return load_model(str(path))


@pytest.fixture(scope="module")
def reasoner(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    """A saved model with a reasoning template."""
    return saved_with(REASONING_TEMPLATE, tmp_path_factory.mktemp("models") / "tiny")


def host_of(
    lm: LanguageModel, path: Path, form: TemplateForm = NO_THINKING, **settings: Any
) -> Host:
    """A host of the model, a profile that edits before the good probe, and a monitor."""
    rank_one(lm).save(path / "bold.safetensors")
    monitor = make_monitor(lm)
    raw = monitor.answer[""]
    edited = replace(raw, direction=raw.direction.clone())
    probes = {"": raw, rank_one(lm).fingerprint: edited}
    replace(monitor, answer=probes, template=form).save(path / "monitor.safetensors")
    return open_host(load_settings({"model": lm.name, "profile": [str(path)], **settings}))


def replies(host: Host, *requests: dict[str, Any]) -> list[dict[str, Any]]:
    """Replies to one request after the other; a host serves once."""

    async def ask() -> list[dict[str, Any]]:
        async with http_client(host) as client:
            sent = [
                await client.post("/v1/chat/completions", json=body(max_tokens=2, **changes))
                for changes in requests
            ]
        assert [response.status_code for response in sent] == [200] * len(sent)
        return [response.json() for response in sent]

    return asyncio.run(ask())


def receipts(host: Host, *requests: dict[str, Any]) -> list[dict[str, Any]]:
    return [reply["steering"] for reply in replies(host, *requests)]


def messages(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def test_a_plain_request_is_of_the_form_that_is_fitted_by_default(
    reasoner: LanguageModel, tmp_path: Path
) -> None:
    host = host_of(reasoner, tmp_path)
    again = messages(("user", "Hi"), ("assistant", "Yes?"), ("user", "Nothing."))
    for receipt in receipts(
        host,
        {},
        {"chat_template_kwargs": {}},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"chat_template_kwargs": {"enable_thinking": None}},
        {"messages": again, "model": "tiny:bold"},
    ):
        assert "monitor" not in receipt
        assert all(isinstance(receipt[score], float) for score in (*PROBES, "refusal_score"))


def test_other_kwargs_change_the_prompt_and_leave_no_score(
    reasoner: LanguageModel, tmp_path: Path
) -> None:
    """Not even the refusal score: the first token opens the reasoning, and no reply."""
    host = host_of(reasoner, tmp_path)
    thinking = {"chat_template_kwargs": {"enable_thinking": True}}
    plain, *others = replies(host, {}, thinking, {"model": "tiny:bold", **thinking})
    for reply in others:
        receipt = reply["steering"]
        assert receipt["monitor"] == "out_of_template"
        assert [receipt[score] for score in (*PROBES, "refusal_score")] == [None] * 3
        tokens = [each["usage"]["prompt_tokens"] for each in (plain, reply)]
        assert tokens[0] == tokens[1] + len("<think></think>")


def test_another_system_prompt_leaves_the_refusal_score_alone(
    reasoner: LanguageModel, tmp_path: Path
) -> None:
    kind = messages(("system", "Be kind."), ("user", "Hi"))
    host = host_of(reasoner, tmp_path, replace(NO_THINKING, system_prompt="Be kind."))
    as_developer = [{**kind[0], "role": "developer"}, kind[1]]
    *same, receipt = receipts(host, {"messages": kind}, {"messages": as_developer}, {})
    assert all("monitor" not in each for each in same)
    assert receipt["monitor"] == "out_of_template"
    assert [receipt[score] for score in PROBES] == [None] * 2
    assert isinstance(receipt["refusal_score"], float)


def test_tools_make_another_form_only_where_the_prompt_tells_of_them(tmp_path: Path) -> None:
    lm = saved_with(HERMES, tmp_path / "tiny")
    (tmp_path / "profiles").mkdir()
    host = host_of(lm, tmp_path / "profiles", TemplateForm(), max_model_len=256)
    tools = [{"type": "function", "function": {"name": "f"}}]
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    ask, go_on = messages(("user", "Hi"), ("user", "And?"))
    called = {"role": "assistant", "content": "", "tool_calls": [call]}
    *same, offered, told, continued = receipts(
        host,
        {"tools": []},
        {"tools": tools, "tool_choice": "none"},
        {"tools": tools},
        {"messages": [ask, called, go_on]},
        {"messages": [ask, *messages(("assistant", "Yes"))], "continue_final_message": True},
    )
    for receipt in same:
        assert "monitor" not in receipt
        assert all(isinstance(receipt[score], float) for score in PROBES)
    for receipt in (offered, told, continued):
        assert receipt["monitor"] == "out_of_template"
        assert [receipt[score] for score in PROBES] == [None] * 2


def test_such_replies_are_counted_under_no_class_and_in_no_probe_histogram(
    reasoner: LanguageModel, tmp_path: Path
) -> None:
    host = host_of(reasoner, tmp_path)

    async def page() -> str:
        async with http_client(host) as client:
            thinking = body(max_tokens=2, chat_template_kwargs={"enable_thinking": True})
            await client.post("/v1/chat/completions", json=thinking)
            return (await client.get("/metrics")).text

    lines = asyncio.run(page()).splitlines()
    judged = [line for line in lines if line.startswith("steering_responses_judged_total{")]
    counted = [line for line in judged if line.endswith(" 1.0")]
    assert len(counted) == 1 and 'prompt_class="unknown"' in counted[0]
    for metric in ("benign_probe_score", "answer_probe_score", "refusal_score"):
        assert f'steering_{metric}_count{{profile="raw"}} 0.0' in lines


def test_the_servers_own_kwargs_hold_where_a_request_has_none(
    reasoner: LanguageModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flags = {"chat_template_kwargs": '{"enable_thinking": true}'}
    host = host_of(reasoner, tmp_path, **flags)
    assert "the monitor" in caplog.text and "a plain request is rendered with" in caplog.text
    plain = {"chat_template_kwargs": {"enable_thinking": False}}
    other, same = receipts(host, {}, plain)
    assert other["monitor"] == "out_of_template" and "monitor" not in same
    with pytest.raises(ValueError, match="'thinking'; it takes enable_thinking"):
        host_of(reasoner, tmp_path, chat_template_kwargs='{"thinking": 1}')
    with pytest.raises(ValueError, match="--chat-template-kwargs: write a JSON object"):
        load_settings({"chat_template_kwargs": "[1]"})


@pytest.mark.parametrize(
    ("read", "free", "edited_first"),
    [("always", True, True), ("when-free", True, False), ("off", False, False)],
)
def test_monitor_read_decides_whose_prompts_are_read(
    reasoner: LanguageModel, tmp_path: Path, read: str, free: bool, edited_first: bool
) -> None:
    host = host_of(reasoner, tmp_path, monitor_read=read)
    models = {"tiny": free, "tiny:bold": edited_first}
    found = receipts(host, *({"model": model} for model in models))
    for receipt, expected in zip(found, models.values(), strict=True):
        assert (receipt["benign_probability"] is not None) == expected
        assert (receipt["answer_probability"] is not None) == (read != "off")
        assert isinstance(receipt["refusal_score"], float)
        assert "monitor" not in receipt


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"thinking": True}, "does not know 'thinking'; it takes enable_thinking"),
        ({"chat_template": "{{ 1 }}"}, "does not know 'chat_template'"),
        ({"messages": "x"}, "does not know 'messages'"),
        ({"enable_thinking": [1]}, "chat_template_kwargs.enable_thinking"),
        ({str(i): 1 for i in range(17)}, "at most 16 items"),
        ("x", "'chat_template_kwargs' should be a valid dictionary"),
    ],
)
def test_kwargs_that_the_template_cannot_use_are_a_400(
    reasoner: LanguageModel, tmp_path: Path, kwargs: Any, says: str
) -> None:
    response = post(host=host_of(reasoner, tmp_path), chat_template_kwargs=kwargs)
    assert response.status_code == 400
    error = error_of(response)
    assert says in error["message"]
    assert error["param"].startswith("chat_template_kwargs")


def test_profiles_show_a_monitors_card(
    reasoner: LanguageModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    replace(make_monitor(reasoner), template=NO_THINKING).save(tmp_path / "monitor.safetensors")
    assert main(["profiles", "show", str(tmp_path / "monitor.safetensors")]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["template"]["template_kwargs"] == {"enable_thinking": False}
    assert [probe["auroc"] for probe in shown["benign"]] == [0.8, 0.9]
    assert (shown["harmful_below"], shown["benign_above"]) == (0.5, 0.5)
