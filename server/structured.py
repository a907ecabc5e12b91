"""The grammar of a reply: from `response_format`, `tool_choice` and strict tools.

Whatever asks for a shape gets it exactly, `strict` or not: the reply is a prefix of a right one at
every token, and complete unless `max_tokens` cuts it.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from server.detokenize import special_tokens
from server.errors import InvalidRequestError
from server.grammar import (
    Grammar,
    GrammarCompiler,
    GrammarError,
    check_length,
    json_text,
    literal,
)
from server.tool_parsers import CLOSE, OPEN, ToolFormat
from server.tools import Name, Tool, ToolUse
from server.validation import Strict
from steering.models import LanguageModel


class JsonSchema(Strict):
    """A schema with a name, as OpenAI's clients send it."""

    name: Name
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema", description="JSON schema of the reply.")
    strict: bool | None = Field(None, description="The schema is always followed exactly.")


class ResponseFormat(Strict):
    """The shape that the reply must have."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = Field(None, description="With the type `json_schema` only.")

    @property
    def is_text(self) -> bool:
        return self.type == "text"

    def check(self) -> None:
        """Refuse a schema without its type, and the other way round."""
        if (self.type == "json_schema") != (self.json_schema is not None):
            needed = "only possible with" if self.json_schema else "required for"
            raise InvalidRequestError(
                f"'response_format.json_schema' is {needed} the type 'json_schema'.",
                param="response_format.json_schema",
            )


async def constrain(
    compiler: GrammarCompiler,
    lm: LanguageModel,
    response_format: ResponseFormat | None,
    use: ToolUse,
) -> Grammar | None:
    """The grammar that a reply must follow, None if it is free. Raises InvalidRequestError."""
    param = "response_format"
    try:
        answer = _answer(response_format)
        if use.forced:
            param = "tool_choice"
            grammar = f"start: calls\n{_calls(lm, use, use.forced)}"
        elif answer is not None and use.format is not None:
            grammar = f"start: answer | calls\nanswer: {answer}\n{_calls(lm, use, use.offered)}"
        elif answer is not None:
            grammar = f"start: {answer}\n"
        elif use.format is not None and any(tool.function.strict for tool in use.offered):
            param = "tools"
            grammar = _free_text_and_calls(lm, use)
        else:
            return None
        return await compiler.compile(grammar)
    except GrammarError as error:
        message = f"{param!r} cannot be honoured: {error}."
        raise InvalidRequestError(message, param=param) from error


def _answer(asked: ResponseFormat | None) -> str | None:
    if asked is None or asked.is_text:
        return None
    return json_text({"type": "object"} if asked.json_schema is None else asked.json_schema.schema_)


def _calls(lm: LanguageModel, use: ToolUse, tools: tuple[Tool, ...]) -> str:
    """Rules for `calls`: one call of these tools, or several."""
    assert use.format is not None
    separator = literal({"hermes": "\n", "llama3": "; "}[use.format])
    call = "call"
    if use.format == "hermes":
        call = f"{_tag(lm, OPEN)} {literal(chr(10))} call {literal(chr(10))} {_tag(lm, CLOSE)}"
    more = f" ({separator} {call})*" if use.parallel else ""
    return f"calls: {call}{more}\n{_call_of_any(use.format, tools)}"


def _free_text_and_calls(lm: LanguageModel, use: ToolUse) -> str:
    """Any text, but what looks like a call is one."""
    rules = _call_of_any(use.format, use.offered)
    if use.format == "llama3":  # calls stand at the beginning
        more = ' ("; " call)*' if use.parallel else ""
        return f"start: calls | TEXT\ncalls: call{more}\nTEXT: /([^{{\\s<](.|\\n)*)?/\n{rules}"
    opened = f"opened {literal(chr(10))} call {literal(chr(10))} {_tag(lm, CLOSE)}"
    tag = _tag(lm, OPEN)
    # A lazy lexeme ends where the tag does; a tag that is a token of its own needs none.
    head = f"opened{'' if tag.startswith('<') else '[lazy]'}: ANY {tag}"
    return (
        f"start: ({opened}){'*' if use.parallel else '?'} TEXT\n{head}\n"
        f"ANY: /(.|\\n)*/\nTEXT: /(.|\\n)*/ & ~/(.|\\n)*{OPEN}(.|\\n)*/\n{rules}"
    )


def _call_of_any(format: ToolFormat | None, tools: tuple[Tool, ...]) -> str:
    key = "arguments" if format == "hermes" else "parameters"
    rules = [f"call: {' | '.join(f'call_{i}' for i in range(len(tools)))}"]
    for i, tool in enumerate(tools):
        check_length(sum(map(len, rules)))
        head = literal(f'{{"name": "{tool.function.name}", "{key}": ')
        arguments = json_text(tool.function.schema_of_arguments)
        rules.append(f"call_{i}: {head} {arguments} {literal('}')}")
    return "\n".join(rules) + "\n"


def _tag(lm: LanguageModel, tag: str) -> str:
    """Lark for a tag: its token where it is a special one, which no text can spell."""
    token_id = special_tokens(lm.tokenizer).get(tag)
    return literal(tag) if token_id is None else f"<[{token_id}]>"
