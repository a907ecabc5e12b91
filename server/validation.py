"""What requests are checked by, and pydantic's complaints in words that say what to do."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

TemplateValue = str | int | float | bool
"""What may be passed to a chat template."""
MOST_MESSAGES = 10_000
"""Of one request, whatever the settings say. More are not even looked at."""

MOST_MISTAKES = 1000
"""Of one request that are told apart."""

MAX_ECHOED = 200
"""Characters of what was given that a message repeats."""


class Strict(BaseModel):
    """A part of a request: nothing is converted, and no key is unknown.

    Fields that are absent and fields that are null mean the same thing.
    """

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


def field_path(location: Iterable[str | int]) -> str:
    """`("body", "messages", 0, "content", "<parts>")` as `messages[0].content`."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not part.startswith("<"):  # tags of our unions
            path += f".{part}" if path else part
    return path


def telling(errors: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """pydantic's errors without those that follow from others: a list is too short for it where its
    items are wrong."""
    places = [tuple(error["loc"]) for error in errors]
    around = {place[:n] for place in places for n in range(len(place))}
    return [
        error
        for error, place in zip(errors, places, strict=True)
        if not (error["type"] == "too_short" and place in around)
    ]


def describe(error: Mapping[str, Any], path: str) -> str:
    """One error of pydantic's in words that say what to do."""
    kind, message, given = error["type"], str(error["msg"]), error.get("input")
    if kind == "missing":
        return f"{path!r} is required"
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{path!r} is not a key that is known here; remove it or check its spelling"
    if kind == "too_short":
        least = error["ctx"]["min_length"]
        need = "not be empty" if least == 1 else f"have at least {least} items"
        return f"{path!r} must {need}"
    if kind == "too_long":
        return f"{path!r} must have at most {error['ctx']['max_length']} items"
    if kind in ("value_error", "assertion_error"):
        return message.partition(", ")[2]
    echoed = (
        json.dumps(given, ensure_ascii=False)
        if given is None or isinstance(given, str | int | float | bool)
        else f"{'an array' if isinstance(given, list) else 'an object'}"
    )
    if len(echoed) > MAX_ECHOED:
        echoed = echoed[:MAX_ECHOED] + "..."
    for subject in ("Input", "String"):
        message = message.replace(f"{subject} should", f"{path!r} should", 1)
    return f"{message} (got {echoed})"


def parse_template_kwargs(text: str) -> dict[str, TemplateValue]:
    """A flag's JSON object of scalars, for a chat template. Raises ValueError for anything else."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        found = None
    if not isinstance(found, dict) or not all(
        isinstance(value, TemplateValue) for value in found.values()
    ):
        raise ValueError(f'write a JSON object of scalars, {{"enable_thinking": true}}; got {text}')
    return found
