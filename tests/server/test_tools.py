"""Tools through the official client, on an engine that plays its part."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from server.hosting import Host
from server.tool_parsers import ToolParserSetting
from server.tools import ToolSupport, find_tool_support
from tests.conftest import make_model
from tests.server.fakes import FakeEngine, error_of, make_host, openai_client, post
from tests.server.templates import HERMES, LLAMA3, MISTRAL, QWEN3_CODER, with_template

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
TIME: dict[str, Any] = {"type": "function", "function": {"name": "get_time"}}
USER = {"role": "user", "content": "Hi"}
CALL = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'},
}
PARIS = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
TWO = f'Wait.\n<tool_call>\n{PARIS}\n</tool_call>\n<tool_call>{{"name": "get_time", "arguments": {{}}}}</tool_call>'  # noqa: E501


class RoomyEngine(FakeEngine):
    max_model_len = 4096


def host_with(
    template: str = HERMES, reply: str = TWO, tool_parser: ToolParserSetting = "auto"
) -> Host:
    return replace(
        make_host(RoomyEngine(reply)), lm=with_template(template), tool_parser=tool_parser
    )


def ask(host: Host, **arguments: Any) -> ChatCompletion:
    async def run() -> ChatCompletion:
        async with openai_client(host) as client:
            return await client.chat.completions.create(
                **{"model": "tiny", "messages": [USER], **arguments}
            )

    return asyncio.run(run())


def ask_streaming(host: Host, **arguments: Any) -> list[ChatCompletionChunk]:
    async def run() -> list[ChatCompletionChunk]:
        async with openai_client(host) as client:
            stream = await client.chat.completions.create(
                **{"model": "tiny", "messages": [USER], "stream": True, **arguments}
            )
            return [chunk async for chunk in stream]

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("template", "support"),
    [
        (HERMES, ToolSupport(True, True, True, "hermes")),
        (LLAMA3, ToolSupport(True, True, True, "llama3")),
        (MISTRAL, ToolSupport(True, True, True, None)),
        (QWEN3_CODER, ToolSupport(True, True, True, None)),
        (None, ToolSupport()),
    ],
)
def test_a_template_tells_what_it_can_do_and_how_calls_are_written(
    template: str | None, support: ToolSupport
) -> None:
    assert find_tool_support(with_template(template)) == support


def test_an_operator_has_the_last_word_on_the_parser() -> None:
    assert find_tool_support(with_template(MISTRAL), "hermes").format == "hermes"
    assert find_tool_support(with_template(HERMES), "none").format is None


def test_the_official_client_gets_tool_calls() -> None:
    completion = ask(host_with(), tools=[WEATHER, TIME])
    ChatCompletion.model_validate(completion.model_dump(), strict=True)
    [choice] = completion.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Wait."
    calls = choice.message.tool_calls
    assert calls is not None
    assert [(c.type, c.function.name, c.function.arguments) for c in calls] == [  # type: ignore[union-attr]
        ("function", "get_weather", '{"city": "Paris"}'),
        ("function", "get_time", "{}"),
    ]
    assert len({call.id for call in calls}) == 2


def test_the_official_client_gets_tool_calls_in_a_stream() -> None:
    chunks = ask_streaming(host_with(), tools=[WEATHER, TIME])
    calls: dict[int, dict[str, Any]] = {}
    content = ""
    for chunk in chunks:
        delta = chunk.choices[0].delta
        content += delta.content or ""
        for call in delta.tool_calls or []:
            assert call.function is not None
            if call.index not in calls:  # the first piece names the call
                assert call.id and call.type == "function" and call.function.name
                calls[call.index] = {"name": call.function.name, "arguments": ""}
            else:
                assert call.id is None and call.function.name is None
            calls[call.index]["arguments"] += call.function.arguments or ""
    assert content == "Wait."
    assert [calls[i]["name"] for i in sorted(calls)] == ["get_weather", "get_time"]
    assert json.loads(calls[0]["arguments"]) == {"city": "Paris"}
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_the_official_clients_stream_helper_puts_the_calls_together() -> None:
    async def run() -> Any:
        async with (
            openai_client(host_with()) as client,
            client.chat.completions.stream(
                model="tiny",
                messages=[{"role": "user", "content": "Hi"}],
                tools=[WEATHER, TIME],  # type: ignore[list-item]
            ) as stream,
        ):
            async for _ in stream:
                pass
            return await stream.get_final_completion()

    message = asyncio.run(run()).choices[0].message
    assert [call.function.name for call in message.tool_calls] == ["get_weather", "get_time"]


def test_every_choice_of_a_stream_has_its_calls_and_logprobs() -> None:
    chunks = ask_streaming(host_with(), tools=[WEATHER, TIME], n=2, logprobs=True)
    for index in (0, 1):
        own = [c.choices[0] for c in chunks if c.choices[0].index == index]
        calls = [call for choice in own for call in choice.delta.tool_calls or []]
        assert [call.index for call in calls if call.id] == [0, 1]
        assert own[-1].finish_reason == "tool_calls"
        told = [t.token for c in own if c.logprobs for t in c.logprobs.content or []]
        assert "".join(told) == TWO


def test_a_llama_reply_is_a_call_without_content() -> None:
    host = host_with(LLAMA3, '{"name": "get_weather", "parameters": {"city": "Zoë"}}')
    message = ask(host, tools=[WEATHER]).choices[0].message
    assert message.content is None
    assert message.tool_calls is not None
    assert message.tool_calls[0].function.arguments == '{"city": "Zoë"}'  # type: ignore[union-attr]


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_call_is_an_answer_to_the_judge(stream: bool) -> None:
    judged: list[str] = []
    host = host_with(reply=f"<tool_call>{PARIS}</tool_call>")
    host.judge = lambda text: judged.append(text) or "empty"  # type: ignore[func-returns-value]
    if stream:
        receipt = ask_streaming(host, tools=[WEATHER])[-1].steering  # type: ignore[attr-defined]
    else:
        receipt = ask(host, tools=[WEATHER]).steering  # type: ignore[attr-defined]
    assert receipt["outcome"] == "answer" and receipt["judge"] is None and not judged
    ask(host, tools=[TIME])  # the same text is no call of this tool
    assert judged == [f"<tool_call>{PARIS}</tool_call>"]


@pytest.mark.parametrize(
    "arguments",
    [{}, {"tools": [TIME]}, {"tools": [WEATHER], "tool_choice": "none"}, {"tools": []}],
)
def test_what_was_not_offered_is_content(arguments: dict[str, Any]) -> None:
    text = f"<tool_call>{PARIS}</tool_call>"
    [choice] = ask(host_with(reply=text), **arguments).choices
    assert (choice.message.content, choice.message.tool_calls) == (text, None)
    assert choice.finish_reason == "stop"


def test_a_call_that_max_tokens_cuts_is_content_and_says_so() -> None:
    text = f"<tool_call>{PARIS}</tool_call>"
    [choice] = ask(host_with(reply=text), tools=[WEATHER], max_tokens=30).choices
    assert choice.message.content == text[:30]
    assert choice.finish_reason == "length"


def test_without_parallel_calls_there_is_one() -> None:
    message = ask(host_with(), tools=[WEATHER, TIME], parallel_tool_calls=False).choices[0].message
    assert message.tool_calls is not None and len(message.tool_calls) == 1


def prompt(template: str = HERMES, **arguments: Any) -> str:
    host = host_with(template)
    ask(host, **arguments)
    [request] = host.engine.requests  # type: ignore[attr-defined]
    return str(host.lm.tokenizer.decode(request.prompt_ids))


def test_the_template_renders_tools_calls_and_results() -> None:
    turns = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": "12 degrees"},
    ]
    text = prompt(tools=[WEATHER], messages=turns)
    assert '"description": "The weather in a city."' in text
    assert f"<tool_call>\n{PARIS}\n</tool_call>" in text
    assert "<tool_response>\n12 degrees\n</tool_response>" in text
    assert "get_weather" not in prompt(tools=[WEATHER], tool_choice="none")
    assert '"parameters": {"city": "Paris"}' in prompt(LLAMA3, tools=[WEATHER], messages=turns)


@pytest.mark.parametrize(
    ("host", "changes", "param", "says"),
    [
        (make_host(), {"tools": [WEATHER]}, "tools", "cannot tell it of tools"),
        (
            make_host(),
            {"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}]},
            "messages[1].tool_calls",
            "cannot render",
        ),
        (host_with(MISTRAL), {"tools": [WEATHER]}, "tools", "--tool-parser"),
        (
            host_with(tool_parser="none"),
            {"tools": [WEATHER], "tool_choice": "required"},
            "tool_choice",
            "--tool-parser none",
        ),
        (
            host_with(LLAMA3),
            {"messages": [USER, {"role": "assistant", "tool_calls": [CALL, CALL]}]},
            "messages",
            "single tool-calls",
        ),
        (
            host_with(),
            {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice",
            "not among",
        ),
        (host_with(), {"tool_choice": "required"}, "tool_choice", "needs 'tools'"),
        (host_with(), {"tool_choice": "any"}, "tool_choice", "'required'"),
        (host_with(), {"tools": [WEATHER, WEATHER]}, "tools", "same name"),
        (host_with(), {"tools": [TIME] * 129}, "tools", "at most 128"),
        (host_with(), {"tools": [{"type": "function"}]}, "tools[0].function", "required"),
        (
            host_with(),
            {"tools": [{"type": "function", "function": {"name": "a b"}}]},
            "tools[0].function.name",
            "match",
        ),
        (
            host_with(),
            {"tools": [{"type": "function", "function": {"name": "f", "paramters": {}}}]},
            "tools[0].function.paramters",
            "not a key",
        ),
        (
            host_with(),
            {"tools": [{"type": "function", "function": {"name": "f", "description": "\ud83d"}}]},
            "messages",
            "surrogate",
        ),
        (
            host_with(),
            {"messages": [{"role": "tool", "content": "x"}]},
            "messages[0].tool_call_id",
            "required",
        ),
        (host_with(), {"messages": [{**USER, "tool_calls": [CALL]}]}, "messages[0].tool_calls",
         "'assistant'"),
        (host_with(), {"messages": [{**USER, "tool_call_id": "x"}]}, "messages[0].tool_call_id",
         "'tool'"),
        (
            host_with(),
            {"messages": [{"role": "assistant", "tool_calls": [
                {**CALL, "function": {"name": "f", "arguments": "[1]"}}]}]},
            "messages[0].tool_calls[0].function.arguments",
            "JSON object",
        ),
    ],
)  # fmt: skip
def test_a_wrong_use_of_tools_is_a_400_that_says_why(
    host: Host, changes: dict[str, Any], param: str, says: str
) -> None:
    response = post(host=host, **changes)
    assert response.status_code == 400, response.text
    assert error_of(response)["param"] == param
    assert says in error_of(response)["message"]


def test_with_the_parser_off_calls_stay_in_the_text() -> None:
    [choice] = ask(host_with(tool_parser="none"), tools=[WEATHER]).choices
    assert choice.message.content == TWO
    assert choice.finish_reason == "stop"


def test_tags_that_are_special_tokens_are_seen() -> None:
    from server.detokenize import Detokenizer

    tokenizer = with_template(HERMES).tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool_call>", "</tool_call>"]})
    ids = tokenizer(f"é<tool_call>{PARIS}</tool_call><|user|>")["input_ids"]
    for keep, text in (
        (("<tool_call>", "</tool_call>"), f"é<tool_call>{PARIS}</tool_call>"),
        ((), f"é{PARIS}"),
    ):
        shown = Detokenizer(tokenizer, keep=keep)
        assert "".join(map(shown.push, ids)) + shown.flush() == text
    plain = make_model("llama").tokenizer
    shown = Detokenizer(plain, keep=("<tool_call>",))
    assert "".join(map(shown.push, plain("a<|user|>b")["input_ids"])) == "ab"
