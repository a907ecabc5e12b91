"""Tools in a request: what clients send, what the model's template can render, what is asked of it.

A chat template decides whether a model can use tools. `find_tool_support` renders a conversation
that holds a tool, a call and a result, looks for each of them in the prompt, and takes the parser
that reads the rendered call back. Nothing is sent to a template that would leave it out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from server.errors import InvalidRequestError
from server.tool_parsers import (
    CLOSE,
    OPEN,
    PARSERS,
    Call,
    PlainParser,
    ToolFormat,
    ToolParser,
    ToolParserSetting,
)
from server.validation import Strict
from steering.models import LanguageModel

Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
MAX_TOOLS = 128


class FunctionDefinition(Strict):
    """A function that the model may call."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = Field(
        None, description="JSON schema of an object. Without it, there are no parameters."
    )
    strict: bool | None = Field(
        None, description="Arguments must satisfy the schema; needs the extra `structured`."
    )

    @property
    def schema_of_arguments(self) -> dict[str, Any]:
        if not self.parameters:
            return {"type": "object", "properties": {}, "additionalProperties": False}
        return {"type": "object", **self.parameters}


class Tool(Strict):
    type: Literal["function"]
    function: FunctionDefinition

    def rendered(self) -> dict[str, Any]:
        """As chat templates want it."""
        function: dict[str, Any] = {"name": self.function.name}
        if self.function.description is not None:
            function["description"] = self.function.description
        function["parameters"] = self.function.parameters or {"type": "object", "properties": {}}
        return {"type": "function", "function": function}


class FunctionName(Strict):
    name: Name


class NamedTool(Strict):
    """The one function that must be called."""

    type: Literal["function"]
    function: FunctionName


def _choice_kind(value: object) -> str:
    return "<word>" if isinstance(value, str) else "<function>"


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<word>")]
    | Annotated[NamedTool, Tag("<function>")],
    Discriminator(_choice_kind),
]


class CalledFunction(Strict):
    name: str
    arguments: str = Field(description="A JSON object, as text.")


class ToolCallTurn(Strict):
    """A call that the assistant made in an earlier turn."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction

    def rendered(self, param: str) -> dict[str, Any]:
        """As chat templates want it, with the arguments as an object."""
        try:
            arguments = json.loads(self.function.arguments or "{}")
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            raise InvalidRequestError(
                f"'{param}.function.arguments' must be a JSON object, as text.",
                param=f"{param}.function.arguments",
            )
        function = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id, "type": "function", "function": function}


@dataclass(frozen=True)
class ToolSupport:
    """What a model's chat template can do with tools.

    Args:
        definitions: it tells the model which tools there are.
        calls: it renders the assistant's calls.
        results: it renders tool messages.
        format: how the model writes calls; None if nobody knows.
    """

    definitions: bool = False
    calls: bool = False
    results: bool = False
    format: ToolFormat | None = None


@dataclass(frozen=True)
class ToolUse:
    """What a request's tools come to.

    Args:
        offered: to the model, by its template.
        forced: those of which one must be called; empty if none must.
        format: how the model writes calls; None where none are looked for.
        parallel: whether a reply may hold several calls.
    """

    offered: tuple[Tool, ...] = ()
    forced: tuple[Tool, ...] = ()
    format: ToolFormat | None = None
    parallel: bool = True

    @property
    def markup(self) -> tuple[str, ...]:
        """Tokens to look for in the text, even where the tokenizer calls them special."""
        return (OPEN, CLOSE) if self.format == "hermes" else ()

    def parser(self) -> ToolParser:
        """A parser for one reply."""
        if self.format is None:
            return PlainParser()
        names = [tool.function.name for tool in self.offered]
        return PARSERS[self.format](names, parallel=self.parallel)


def plan_tools(
    support: ToolSupport,
    setting: ToolParserSetting,
    tools: Sequence[Tool],
    choice: ToolChoice | None,
    parallel: bool | None,
) -> ToolUse:
    """What the fields of a request ask for. Raises InvalidRequestError."""
    names = [tool.function.name for tool in tools]
    wanted = choice.function.name if isinstance(choice, NamedTool) else None
    if wanted is not None and wanted not in names:
        raise InvalidRequestError(
            f"'tool_choice' names {wanted!r}, which is not among 'tools'.", param="tool_choice"
        )
    if choice == "required" and not tools:
        raise InvalidRequestError(
            "'tool_choice' needs 'tools' to choose from.", param="tool_choice"
        )
    if len(set(names)) < len(names):
        raise InvalidRequestError("Two of the 'tools' have the same name.", param="tools")
    if not tools or choice == "none":
        return ToolUse()
    if not support.definitions:
        raise InvalidRequestError(
            "This model's chat template cannot tell it of tools; leave 'tools' out.",
            param="tools",
            code="unsupported_parameter",
        )
    if support.format is None and setting == "auto":
        raise InvalidRequestError(
            "This server does not know how this model writes tool calls; its operator can say so "
            "with --tool-parser.",
            param="tools",
            code="unsupported_parameter",
        )
    forced = tuple(t for t in tools if choice == "required" or t.function.name == wanted)
    if forced and support.format is None:
        raise InvalidRequestError(
            "'tool_choice' cannot force a call: this server parses none (--tool-parser none).",
            param="tool_choice",
        )
    # A named function is called once.
    several = parallel is not False and wanted is None
    return ToolUse(tuple(tools), forced, support.format, several)


_TOOL, _KEY, _VALUE = "probe_tool", "probe_key", "probe value"
_QUESTION, _CONTENT, _RESULT = "probe question", "probe content", "probe result"


def find_tool_support(lm: LanguageModel, setting: ToolParserSetting = "auto") -> ToolSupport:
    """What the model's template does with a tool, a call and a result."""
    parameters = {"type": "object", "properties": {_KEY: {"type": "string"}}}
    function = {"name": _TOOL, "description": "A probe.", "parameters": parameters}
    tools = [{"type": "function", "function": function}]
    call = {
        "id": "probe0001",  # Mistral's templates want nine letters or digits
        "type": "function",
        "function": {"name": _TOOL, "arguments": {_KEY: _VALUE}},
    }
    asked = {"role": "user", "content": _QUESTION}
    called = {"role": "assistant", "content": "", "tool_calls": [call]}
    told = {"role": "tool", "tool_call_id": "probe0001", "name": _TOOL, "content": _RESULT}
    said = {"role": "assistant", "content": _CONTENT}

    offered = _render(lm, [asked], tools)
    with_call = _render(lm, [asked, called], tools)
    with_text = _render(lm, [asked, said], tools)
    with_result = _render(lm, [asked, called, told], tools)
    calls = with_call.count(_VALUE) > 0
    format: ToolFormat | None = None
    if setting == "auto" and calls:
        same = takewhile(lambda pair: pair[0] == pair[1], zip(with_call, with_text, strict=False))
        reply = with_call[len(list(same)) :]
        format = next((f for f in PARSERS if _reads(f, reply)), None)
    elif setting in ("hermes", "llama3"):
        format = setting
    return ToolSupport(_TOOL in offered, calls, _RESULT in with_result, format)


def _render(lm: LanguageModel, messages: list[dict[str, Any]], tools: list[Any]) -> str:
    """The text of a prompt; empty if the template cannot render it."""
    if not lm.tokenizer.chat_template:
        return ""
    try:
        return str(
            lm.tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, **lm.template_kwargs
            )
        )
    except Exception:  # jinja raises its own types; all mean "not renderable"
        return ""


def _reads(format: ToolFormat, reply: str) -> bool:
    """Whether the parser finds the probe's call in what the template made of it."""
    parser = PARSERS[format]([_TOOL])
    calls = [part for part in [*parser.push(reply), *parser.finish()] if isinstance(part, Call)]
    return [json.loads(call.arguments) for call in calls] == [{_KEY: _VALUE}]
