"""Columns on a terminal, side by side while they grow; and the same as plain text or JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from server.terminal.columns import Column, Conversation, Reply

Tint = Literal["answer", "benign", "edit", "none"]
TINTS: tuple[Tint, ...] = get_args(Tint)

_LEAST_WIDTH = 26
"""Of a column; what does not fit beside the others goes below them."""
_SCORES = {"answer": "answer_probability", "benign": "benign_probability", "edit": "edit_norm"}

# Two ends that also those tell apart who see no red and green, pale enough for black text.
_LOW, _MIDDLE, _HIGH = (255, 176, 128), (238, 238, 238), (140, 195, 255)
_EDITED = (205, 160, 255)

# A model's text must not steer the terminal: control characters are shown, one for one.
_SHOWN = {code: 0x2400 + code for code in range(32) if code not in (9, 10)}
_SHOWN |= {0x7F: 0x2421, **dict.fromkeys(range(0x80, 0xA0), 0xFFFD)}
_SHOWN |= dict.fromkeys([*range(0x202A, 0x202F), *range(0x2066, 0x206A)], 0xFFFD)


def safe(text: str) -> str:
    """Text without control characters and changes of direction, as long as before."""
    return text.translate(_SHOWN)


def colour(tint: Tint, entry: dict[str, Any] | None) -> str:
    """Style of a token; empty where there is nothing to show."""
    value = None if entry is None or tint == "none" else entry[_SCORES[tint]]
    if value is None:
        return ""
    if tint == "edit":  # a change as large as the state is as much as there is to show
        mixed = _mix(_MIDDLE, _EDITED, min(value, 1.0) ** 0.5)
    elif value < 0.5:
        mixed = _mix(_LOW, _MIDDLE, 2 * value)
    else:
        mixed = _mix(_MIDDLE, _HIGH, 2 * value - 1)
    return f"black on #{mixed}"


def _mix(one: tuple[int, ...], other: tuple[int, ...], share: float) -> str:
    return "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(one, other, strict=True))


def reply_text(reply: Reply, tint: Tint) -> Text:
    """A reply with its tokens tinted, and its error, if it failed."""
    text = Text()
    for piece, entry in reply.tokens():
        text.append(safe(piece), colour(tint, entry))
    if reply.error is not None:
        text.append(("\n" if text else "") + safe(reply.error["message"]), "bold red")
    return text


def scores(reply: Reply) -> str:
    """What was read of the prompt."""
    return " \u00b7 ".join(
        f"{label} {value:{form}}"
        for label, name, form in (
            ("refusal", "refusal_score", "+.1f"),
            ("answer", "answer_probability", ".2f"),
            ("benign", "benign_probability", ".2f"),
        )
        if (value := reply.prompt.get(name)) is not None
    )


def ending(reply: Reply) -> str:
    """What became of the reply; empty while it grows."""
    if reply.error is not None:
        return "error"
    cut = {"length": "cut off", "stopped": "stopped"}.get(reply.finish_reason or "")
    return ", ".join(filter(None, (reply.steering.get("outcome"), cut)))


_COLOURS = {"answer": "green", "refusal": "yellow", "error": "red"}


def _footer(reply: Reply) -> Text:
    ended = ending(reply)
    style = f"bold {_COLOURS.get(ended.partition(',')[0], '')}".strip()
    return Text.assemble((scores(reply), "dim"), "\n", (ended, style))


def table(
    columns: Sequence[Column], tint: Tint, console: Console, rows: int | None = None
) -> RenderableType:
    """The columns side by side, as many as fit.

    Args:
        rows: of each reply, its last ones; all by default.
    """
    most = max(1, console.width // _LEAST_WIDTH)
    count = -(-len(columns) // -(-len(columns) // most))  # as even as can be
    groups = [columns[i : i + count] for i in range(0, len(columns), count)]
    each = None if rows is None else max(1, rows // len(groups) - 4)
    return Group(*(_beside(group, count, tint, console, each) for group in groups))


def _beside(
    columns: Sequence[Column], count: int, tint: Tint, console: Console, rows: int | None
) -> Table:
    width = console.width // count - 2
    grid = Table.grid(padding=(0, 2, 0, 0), expand=True)
    for _ in range(count):
        grid.add_column(ratio=1, overflow="fold")
    grid.add_row(*(Text(safe(column.title), "bold") for column in columns))
    replies = []
    for column in columns:
        lines = reply_text(column.reply, tint).wrap(console, width)
        replies.append(Text("\n").join(lines if rows is None else lines[-rows:]))
    grid.add_row(*replies)
    grid.add_row(*(_footer(column.reply) for column in columns))
    return grid


def plain(conversation: Conversation) -> Iterator[str]:
    """A turn's replies one after the other, line by line."""
    for column in conversation.columns:
        reply = column.reply
        yield f"== {safe(column.title)}"
        if reply.text:
            yield safe(reply.text)
        if reply.error is not None:
            yield safe(f"error: {reply.error['message']}")
        yield "   " + " \u00b7 ".join(filter(None, (scores(reply), ending(reply))))


def as_json(conversation: Conversation) -> str:
    """A turn in one line, a choice per column as a whole comparison has it."""
    choices = []
    for index, column in enumerate(conversation.columns):
        reply = column.reply
        choice: dict[str, Any] = {
            "index": index,
            "message": {"role": "assistant", "content": reply.text},
            "finish_reason": reply.finish_reason,
            "steering": {**reply.steering, "prompt": reply.prompt, "trace": reply.trace},
            "usage": reply.usage,
        }
        choices.append(choice | ({} if reply.error is None else {"error": reply.error}))
    return json.dumps({"prompt": conversation.prompt, "choices": choices})
