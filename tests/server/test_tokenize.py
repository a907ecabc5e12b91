"""Counting a prompt, and how it ends."""

from __future__ import annotations

from typing import Any

import pytest

from tests.conftest import make_model
from tests.server.fakes import FakeEngine, error_of, make_host, post

USER = {"role": "user", "content": "Hi"}
BEGUN = {"role": "assistant", "content": "Sure, "}


def tokenize(**payload: Any) -> Any:
    return post({"model": "tiny", **payload}, path="/tokenize")


def test_the_tokens_are_those_that_the_engine_gets() -> None:
    engine = FakeEngine()
    post(host=make_host(engine), messages=[USER])
    counted = tokenize(messages=[USER]).json()
    assert counted["tokens"] == list(engine.requests[0].prompt_ids)
    assert counted["count"] == 6 and counted["max_model_len"] == 200
    assert counted["token_strs"] is None


def test_a_plain_prompt_is_counted_as_completions_read_it() -> None:
    counted = tokenize(prompt="Hé", return_token_strs=True).json()
    assert counted["token_strs"] == ["H", "bytes:\\xc3", "bytes:\\xa9"]
    assert counted["count"] == 3


def test_messages_may_end_without_a_generation_prompt_or_in_the_middle_of_one() -> None:
    def text(**payload: Any) -> str:
        return str(make_model("llama").tokenizer.decode(tokenize(**payload).json()["tokens"]))

    assert text(messages=[USER]).endswith("<|end|><|assistant|>")
    assert text(messages=[USER], add_generation_prompt=False).endswith("Hi<|end|>")
    begun = text(messages=[USER, BEGUN], continue_final_message=True)
    assert begun.endswith("<|assistant|>Sure, ")


@pytest.mark.parametrize("more", [{}, {"add_generation_prompt": False}])
def test_a_last_message_is_continued_without_echo(more: dict[str, Any]) -> None:
    engine = FakeEngine("of course.")
    host = make_host(engine)
    answer = post(host=host, messages=[USER, BEGUN], continue_final_message=True, **more).json()
    assert answer["choices"][0]["message"]["content"] == "of course."
    decode = make_model("llama").tokenizer.decode
    assert decode(engine.requests[0].prompt_ids).endswith("<|assistant|>Sure, ")


@pytest.mark.parametrize(
    ("payload", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "a", "messages": [USER]}, "prompt"),
        ({"prompt": "a", "add_generation_prompt": True}, "add_generation_prompt"),
        ({"messages": [USER], "add_special_tokens": True}, "add_special_tokens"),
        ({"messages": [USER], "continue_final_message": True}, "continue_final_message"),
        ({"messages": []}, "messages"),
        ({"prompt": "\ud83d"}, "prompt"),
        ({"prompt": "x" * 20000}, "prompt"),
        ({"prompt": "a", "x": 1}, "x"),
        ({"messages": [{**USER, "tool_call_id": "x"}]}, "messages[0].tool_call_id"),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}],
                    }
                ]
            },
            "messages[0].tool_calls",
        ),
    ],
)
def test_a_wrong_field_is_a_400_that_names_it(payload: dict[str, Any], param: str) -> None:
    response = tokenize(**payload)
    assert response.status_code == 400
    assert error_of(response)["param"] == param


def test_an_unknown_model_is_a_404() -> None:
    assert tokenize(model="gpt-4", prompt="a").status_code == 404
