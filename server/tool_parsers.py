"""Find tool calls in a reply's text, as it comes.

    push(text) -> parts    as often as there is text
    finish()   -> parts    once, at the end

However the text is cut into pieces, the parts put together are the same. A call is held back until
it is complete and valid: JSON, of a tool that was offered, with an object of arguments. What is
not comes out as text, markup and all, and a reply without calls comes out as it was. Blanks at the
ends of the text around calls are markup.

    hermes    <tool_call>{"name": ..., "arguments": {...}}</tool_call>, anywhere (Hermes, Qwen)
    llama3    {"name": ..., "parameters": {...}}, at the start, after an optional <|python_tag|>,
              several separated by semicolons (Llama 3.1 and later)
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from server.stops import overlap

ToolFormat = Literal["hermes", "llama3"]
ToolParserSetting = Literal["auto", "hermes", "llama3", "none"]
"""What an operator can say; auto asks the chat template (`server.tools`)."""

OPEN, CLOSE = "<tool_call>", "</tool_call>"
PYTHON_TAG = "<|python_tag|>"

# A string, which may go on beyond what has come; there, nothing else counts.
_STRING = r'"(?:[^"\\]|\\.)*(?:"|\\?\Z)'
_CLOSE_OR_STRING = re.compile(f"{_STRING}|{CLOSE}", re.DOTALL)
_BRACE_OR_STRING = re.compile(f"{_STRING}|[{{}}]", re.DOTALL)
_SEPARATOR = re.compile(r"\s*(;\s*)?")
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Text:
    """A piece of the reply's content."""

    text: str


@dataclass(frozen=True)
class Call:
    """A tool call.

    Args:
        index: its place among the reply's calls.
        arguments: a JSON object, as text.
    """

    index: int
    name: str
    arguments: str


Part = Text | Call


class ToolParser(ABC):
    """Text in, parts out.

    Args:
        names: of the tools that may be called.
        parallel: whether a reply may hold several calls; if not, those after the first are lost.
    """

    def __init__(self, names: Collection[str] = (), *, parallel: bool = True) -> None:
        self._names = frozenset(names)
        self._parallel = parallel
        self._calls = 0
        self._said = False
        self._blank = ""
        """Blanks that are content only if more of it follows."""

    @abstractmethod
    def push(self, text: str) -> list[Part]:
        """What this text completes."""

    def finish(self) -> list[Part]:
        """What is still held back, at the end of the reply."""
        return [] if self._calls or not self._blank else [Text(self._blank)]

    def _say(self, text: str) -> Iterator[Part]:
        whole = self._blank + text
        shown = whole.rstrip()
        self._blank = whole[len(shown) :]
        if shown:
            yield Text(shown.lstrip() if self._calls and not self._said else shown)
            self._said = True

    def _call(self, name: str, arguments: str) -> Iterator[Part]:
        if self._parallel or not self._calls:
            yield Call(self._calls, name, arguments)
            self._calls += 1


class PlainParser(ToolParser):
    """For replies without tools: all of it is text."""

    def push(self, text: str) -> list[Part]:
        return [Text(text)] if text else []


class HermesParser(ToolParser):
    """Calls in tags, with or without text around them."""

    def __init__(self, names: Collection[str] = (), *, parallel: bool = True) -> None:
        super().__init__(names, parallel=parallel)
        self._buffer = ""
        self._inside = False
        """Whether the buffer begins after an opening tag."""
        self._at = 0
        """How much of a call's body was looked at."""

    def push(self, text: str) -> list[Part]:
        self._buffer += text
        return list(self._parts())

    def finish(self) -> list[Part]:
        parts: list[Part] = []
        while self._inside:
            body, close, rest = self._buffer.partition(CLOSE)
            if (call := read_call(self._buffer, self._names)) is not None:
                parts += self._call(*call)  # only the closing tag is missing
                rest = ""
            else:  # a string that never ends hid the closing tag, if there is one
                parts += self._say(OPEN + body + close)
            self._buffer, self._inside = rest, False
            parts += self._parts()
        parts += self._say(self._buffer)
        self._buffer = ""
        return parts + super().finish()

    def _parts(self) -> Iterator[Part]:
        while True:
            if not self._inside:
                before, tag, rest = self._buffer.partition(OPEN)
                if not tag:
                    keep = overlap(self._buffer, OPEN)
                    cut = len(self._buffer) - keep
                    yield from self._say(self._buffer[:cut])
                    self._buffer = self._buffer[cut:]
                    return
                yield from self._say(before)
                self._buffer, self._inside, self._at = rest, True, 0
            elif (end := self._end_of_body()) is not None:
                body, self._buffer = self._buffer[:end], self._buffer[end + len(CLOSE) :]
                self._inside = False
                if (call := read_call(body, self._names)) is not None:
                    yield from self._call(*call)
                else:
                    yield from self._say(OPEN + body + CLOSE)
            else:
                return

    def _end_of_body(self) -> int | None:
        """Where the closing tag begins; a tag inside a string of the JSON does not count."""
        while (match := _CLOSE_OR_STRING.search(self._buffer, self._at)) is not None:
            if match[0] == CLOSE:
                return match.start()
            if match.end() == len(self._buffer):  # the string may go on
                self._at = match.start()
                return None
            self._at = match.end()
        self._at = max(self._at, len(self._buffer) - len(CLOSE))
        return None


class Llama3Parser(ToolParser):
    """A reply that is one call, or several and nothing before them."""

    def __init__(self, names: Collection[str] = (), *, parallel: bool = True) -> None:
        super().__init__(names, parallel=parallel)
        self._buffer = ""
        """All that has neither been said nor been a call."""
        self._plain = False
        self._object: int | None = None
        """Where in the buffer a call's JSON begins, if it does."""
        self._at = 0
        self._depth = 0

    def push(self, text: str) -> list[Part]:
        self._buffer += text
        return list(self._parts())

    def finish(self) -> list[Part]:
        parts: list[Part] = []
        if not (self._calls and _SEPARATOR.fullmatch(self._buffer)):
            parts += self._say(self._buffer)
        self._buffer = ""
        return parts + super().finish()

    def _parts(self) -> Iterator[Part]:
        while not self._plain:
            if self._object is None and not self._find_object():
                break
            end = self._end_of_object()
            if end is None:
                return
            call = read_call(self._buffer[self._object : end], self._names)
            if call is None:
                self._plain = True
            else:
                yield from self._call(*call)
                self._buffer, self._object = self._buffer[end:], None
        if self._plain:
            yield from self._say(self._buffer)
            self._buffer = ""

    def _find_object(self) -> bool:
        """Look for the next call's beginning; what can be none is plain text from here on."""
        if self._calls:
            start = _end_of(_SEPARATOR, self._buffer)
        else:
            start = len(self._buffer) - len(self._buffer.lstrip())
            rest = self._buffer[start:]
            if rest.startswith(PYTHON_TAG):
                start += len(PYTHON_TAG)
                start += len(self._buffer[start:]) - len(self._buffer[start:].lstrip())
            elif PYTHON_TAG.startswith(rest):
                return False  # its beginning, perhaps
        if start == len(self._buffer):
            return False
        if self._buffer[start] != "{":
            self._plain = True
            return False
        self._object, self._at, self._depth = start, start, 0
        return True

    def _end_of_object(self) -> int | None:
        while (match := _BRACE_OR_STRING.search(self._buffer, self._at)) is not None:
            if match[0] not in "{}" and match.end() == len(self._buffer):
                self._at = match.start()
                return None
            self._at = match.end()
            self._depth += {"{": 1, "}": -1}.get(match[0], 0)
            if self._depth == 0 and match[0] == "}":
                return self._at
        self._at = len(self._buffer)
        return None


PARSERS: dict[ToolFormat, type[ToolParser]] = {"hermes": HermesParser, "llama3": Llama3Parser}


def read_call(text: str, names: Collection[str]) -> tuple[str, str] | None:
    """Name and arguments of a call, None if the text is none of one of these tools."""
    value = _load(text)
    if not isinstance(value, dict):
        return None
    name, arguments = value.get("name"), value.get("arguments", value.get("parameters"))
    if isinstance(arguments, str):  # some models quote them once more
        arguments = _load(arguments)
    if not (isinstance(name, str) and name in names and isinstance(arguments, dict)):
        return None
    try:
        told = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        # Half of a surrogate pair can be written in JSON, and not be sent in UTF-8.
        return name, json.dumps(arguments) if _SURROGATE.search(told) else told
    except (ValueError, RecursionError):
        return None


def _load(text: str) -> Any:
    try:
        # Models put line breaks into strings as they are.
        return json.loads(text, strict=False, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _end_of(pattern: re.Pattern[str], text: str) -> int:
    match = pattern.match(text)
    assert match is not None
    return match.end()
