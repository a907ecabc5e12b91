"""What is known of each profile's conversation, as the events of a comparison come."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

Message = dict[str, str]


@dataclass
class Reply:
    """One profile's answer so far, in the words of `POST /v1/steering/compare`.

    Args:
        steering: what answers, then the receipt.
        prompt: scores of the prompt, once they are known.
        finish_reason: the arm's, or `stopped` by whoever asked.
        error: why it broke off.
    """

    text: str = ""
    trace: list[dict[str, Any]] = field(default_factory=list)
    steering: dict[str, Any] = field(default_factory=dict)
    prompt: dict[str, Any] = field(default_factory=dict)
    usage: dict[str, Any] | None = None
    finish_reason: str | None = None
    error: dict[str, Any] | None = None

    def take(self, choice: Mapping[str, Any]) -> None:
        """Take in an event's choice."""
        self.text += choice["delta"].get("content", "")
        self.finish_reason = choice["finish_reason"]
        self.usage = choice.get("usage")
        self.error = choice.get("error")
        told = dict(choice.get("steering") or {})
        self.prompt |= told.pop("prompt", {})
        self.trace += told.pop("trace", [])
        self.steering |= told

    def tokens(self) -> Iterator[tuple[str, dict[str, Any] | None]]:
        """The text in pieces with the entry of the trace that each belongs to.

        Of several tokens that begin in one character, the last one's.
        """
        starts = {entry["offset"]: entry for entry in self.trace}
        cuts = [*sorted(start for start in starts if start < len(self.text)), len(self.text)]
        if cuts[0]:
            yield self.text[: cuts[0]], None
        for start, end in pairwise(cuts):
            yield self.text[start:end], starts[start]


@dataclass
class Column:
    """A profile, its strength (None: its own), and the conversation that it has had."""

    profile: str
    strength: float | None = None
    red_team: bool = False
    history: list[Message] = field(default_factory=list)
    reply: Reply = field(default_factory=Reply)

    @property
    def title(self) -> str:
        answered = self.reply.steering
        strength = answered.get("strength", self.strength)
        if answered.get("fingerprint") == "":  # no edits, so nothing that could be strong
            strength = None
        title = self.profile if strength is None else f"{self.profile} \u00d7 {strength:g}"
        return f"{title} (red-team)" if self.red_team else title


class Conversation:
    """The columns of a chat, whose histories part after the first turn.

    Args:
        options: further fields of the requests.
    """

    def __init__(self, columns: Sequence[Column], options: Mapping[str, Any]) -> None:
        self.columns = list(columns)
        self.options = dict(options)
        self.prompt = ""

    def ask(self, prompt: str) -> dict[str, Any]:
        """Begin a turn; the body of its request."""
        self.prompt = prompt
        turn = {"role": "user", "content": prompt}
        arms = []
        for column in self.columns:
            column.reply = Reply()
            arm: dict[str, Any] = {"profile": column.profile}
            if column.strength is not None:
                arm["strength"] = column.strength
            arms.append({**arm, "messages": [*column.history, turn]})
        return {**self.options, "messages": arms[0]["messages"], "arms": arms}

    def take(self, event: Mapping[str, Any]) -> None:
        for choice in event["choices"]:
            self.columns[choice["index"]].reply.take(choice)

    def end(self) -> None:
        """The turn is over: replies, even those cut short, are part of the histories."""
        for column in self.columns:
            column.reply.finish_reason = column.reply.finish_reason or "stopped"
            if column.reply.text and column.reply.error is None:
                column.history += [
                    {"role": "user", "content": self.prompt},
                    {"role": "assistant", "content": column.reply.text},
                ]

    def take_back(self) -> str | None:
        """Forget the last turn; what it asked, None if there was none."""
        prompt, self.prompt = self.prompt, ""
        for column in self.columns:
            if column.history[-2:-1] == [{"role": "user", "content": prompt}]:
                del column.history[-2:]
        return prompt or None

    def clear(self) -> None:
        """Begin anew."""
        self.prompt = ""
        for column in self.columns:
            column.history, column.reply = [], Reply()

    def set_strength(self, name: str, strength: float | None) -> None:
        """Of the columns of a profile, or of one by its number from 1 on. Raises ValueError."""
        by_number = {str(i): [column] for i, column in enumerate(self.columns, 1)}
        named = [column for column in self.columns if column.profile == name]
        found = named or by_number.get(name)
        if not found:
            there = ", ".join(dict.fromkeys(column.profile for column in self.columns))
            raise ValueError(f"there is no column {name}; there are {there}")
        for column in found:
            column.strength = strength
