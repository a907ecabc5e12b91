"""Tool calls in text: what is found does not depend on how the text arrives."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.tool_parsers import PARSERS, Call, Part, PlainParser, Text, ToolFormat

NAMES = ("get_weather", "get_time")
PARIS = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
PARIS3 = '{"name": "get_weather", "parameters": {"city": "Paris"}}'
TIME3 = '{"name": "get_time", "parameters": {}}'
Found = tuple[str, list[tuple[str, object]]]


def parse(
    format: ToolFormat, text: str, cuts: Sequence[int] = (), *, parallel: bool = True
) -> Found:
    """Content and calls of a reply that arrives in pieces."""
    parser = PARSERS[format](NAMES, parallel=parallel)
    parts: list[Part] = []
    for start, end in pairwise([0, *sorted(cuts), len(text)]):
        parts += parser.push(text[start:end])
    parts += parser.finish()
    calls = [part for part in parts if isinstance(part, Call)]
    assert [call.index for call in calls] == list(range(len(calls)))
    content = "".join(part.text for part in parts if isinstance(part, Text))
    return content, [(call.name, json.loads(call.arguments)) for call in calls]


CALL = ("get_weather", {"city": "Paris"})
RECORDED: list[tuple[ToolFormat, str, Found]] = [
    ("hermes", f"<tool_call>\n{PARIS}\n</tool_call>", ("", [CALL])),
    (
        "hermes",
        f'I look.\n\n<tool_call>\n{PARIS}\n</tool_call>\n<tool_call>\n{{"name": "get_time", '
        '"arguments": {}}\n</tool_call>',
        ("I look.", [CALL, ("get_time", {})]),
    ),
    ("hermes", f"A <tool_call>{PARIS}</tool_call> B\n", ("A  B", [CALL])),
    ("hermes", f"<tool_call>{PARIS}", ("", [CALL])),  # the closing tag is missing
    (
        "hermes",
        r'<tool_call>{"name": "get_time", "arguments": {"x": "</tool_call>\" {"}}</tool_call>',
        ("", [("get_time", {"x": '</tool_call>" {'})]),
    ),
    (
        "hermes",
        '<tool_call>{"name": "get_time", "arguments": "{\\"x\\": 1}"}</tool_call>',
        ("", [("get_time", {"x": 1})]),
    ),
    (
        "hermes",
        f'<tool_call>{{"oh</tool_call> well <tool_call>{PARIS}</tool_call>',
        ('<tool_call>{"oh</tool_call> well', [CALL]),
    ),
    ("llama3", PARIS3, ("", [CALL])),
    ("llama3", f"\n<|python_tag|>{PARIS3}; {TIME3}", ("", [CALL, ("get_time", {})])),
    ("llama3", f"{PARIS3};", ("", [CALL])),
    ("llama3", f"{PARIS3}; then what?", ("; then what?", [CALL])),
    (
        "llama3",
        '{"type": "function", "name": "get_time", "parameters": {"x": "}\\"{"}}',
        ("", [("get_time", {"x": '}"{'})]),
    ),
]
PLAIN: list[tuple[ToolFormat, str]] = [
    ("hermes", "  Hello.\n\n"),
    ("hermes", "1 < 2, <tool, <tool_call"),
    ("hermes", "<tool_call>\nnonsense\n</tool_call> and on"),
    ("hermes", '<tool_call>{"name": "get_weather", "arguments": {"city": "Par'),
    ("hermes", '<tool_call>{"name": "rm", "arguments": {}}</tool_call>'),  # was not offered
    ("hermes", '<tool_call>{"name": "get_time", "arguments": [1]}</tool_call>'),
    ("hermes", '<tool_call>{"name": "get_time", "arguments": {"x": NaN}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "get_time", "arguments": {"x": 1e999}}</tool_call>'),
    ("hermes", f"<tool_call>{'[' * 50_000}</tool_call>"),
    ("llama3", "Hello."),
    ("llama3", f"Look: {PARIS3}"),  # only at the beginning
    ("llama3", '{"city": "Paris"}'),
    ("llama3", PARIS3[:-3]),
    ("llama3", '<|python_tag|>brave_search.call(query="x")'),
    ("llama3", "<|python"),
    ("llama3", '{"name": "rm", "parameters": {}}; ' + PARIS3),
]


@pytest.mark.parametrize(("format", "text", "found"), RECORDED)
def test_calls_are_found_wherever_the_text_is_cut(
    format: ToolFormat, text: str, found: Found
) -> None:
    assert parse(format, text) == found
    assert parse(format, text, range(1, len(text))) == found
    for cut in range(len(text)):
        assert parse(format, text, [cut]) == found, cut


@pytest.mark.parametrize(("format", "text"), PLAIN)
def test_what_is_no_call_comes_out_as_it_was(format: ToolFormat, text: str) -> None:
    assert parse(format, text) == (text, [])
    step = max(1, len(text) // 300)
    assert parse(format, text, range(1, len(text), step)) == (text, [])


PIECES = st.sampled_from(
    [
        "<tool_call>", "</tool_call>", "<tool", "_call>", "<|python_tag|>", PARIS, PARIS3, TIME3,
        "; ", ";", "{", "}", '"', "\\", "\n", " ", "a", "é", "🙂", "[", '{"name": ', "}}",
    ]
)  # fmt: skip


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(PARSERS)), st.lists(PIECES, max_size=12), st.data())
def test_cutting_never_changes_the_outcome(
    format: ToolFormat, pieces: list[str], data: st.DataObject
) -> None:
    text = "".join(pieces)
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=8))
    whole = parse(format, text)
    assert parse(format, text, cuts) == whole
    if not whole[1]:
        assert whole[0] == text
    assert parse(format, text, cuts, parallel=False)[1] == whole[1][:1]


def test_text_that_is_clearly_no_markup_is_not_held_back() -> None:
    for format in PARSERS:
        parser = PARSERS[format](NAMES)
        assert parser.push("Hello, ") == [Text("Hello,")]
        assert parser.push("you") == [Text(" you")]
    assert PlainParser().push("<tool_call> ") == [Text("<tool_call> ")]


def test_arguments_are_text_that_utf8_can_hold() -> None:
    parser = PARSERS["hermes"](NAMES)
    text = '<tool_call>{"name": "get_time", "arguments": {"a": "é", "b": "\\ud800"}}</tool_call>'
    [call] = parser.push(text)
    assert isinstance(call, Call)
    call.arguments.encode()
    assert json.loads(call.arguments) == {"a": "é", "b": "\ud800"}
