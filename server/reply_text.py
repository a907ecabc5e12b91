"""A reply's tokens as text, piece by piece."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from server.detokenize import Detokenizer
from server.engine.base import EngineToken
from server.stops import StopStrings
from server.tool_parsers import Call


@dataclass(frozen=True)
class TextToken:
    """A token of a reply's text.

    Args:
        offset: characters of the reply before it.
    """

    token: EngineToken
    offset: int


@dataclass(frozen=True)
class Piece:
    """A part of a reply: text, the tokens that begin in it, and tool calls. Any may be empty.

    The first one comes with the first token, whatever it shows: the prompt's scores are known then.
    Where a reply may hold calls, its tokens are those of the calls' text, too.
    """

    text: str
    tokens: tuple[TextToken, ...] = ()
    calls: tuple[Call, ...] = ()


class ReplyText:
    """Tokens to text, without half characters, stop strings or what may become one.

    A token is handed out with the first piece of text that goes beyond its beginning, so that the
    tokens of what was shown are those of the text, whatever was held back or cut off.

    Args:
        markup: special tokens that are text here.
        after: tokens of the text that this one continues.
    """

    def __init__(
        self,
        tokenizer: Any,
        stops: tuple[str, ...],
        markup: tuple[str, ...] = (),
        after: tuple[int, ...] = (),
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer, keep=markup, after=after)
        self._stops = StopStrings(stops)
        self._decoded = 0
        self._shown = 0
        self._tokens: list[TextToken] = []

    @property
    def stopped(self) -> bool:
        """True once a stop string has appeared."""
        return self._stops.stopped

    def push(self, token: EngineToken) -> Piece:
        """What the token lets be shown."""
        # A token that ends the sequence is not part of the text, special or not.
        if token.finish_reason == "stop":
            return self._finish("")
        self._tokens.append(TextToken(token, self._decoded))
        text = self._detokenizer.push(token.token_id)
        if token.finish_reason is not None:
            return self._finish(text)
        self._decoded += len(text)
        return self._release(self._stops.push(text), end=self.stopped)

    def _finish(self, text: str) -> Piece:
        shown = self._stops.push(text + self._detokenizer.flush())
        return self._release(shown + self._stops.flush(), end=True)

    def _release(self, text: str, *, end: bool) -> Piece:
        self._shown += len(text)
        whole = end and not self.stopped
        count = sum(whole or t.offset < self._shown for t in self._tokens)
        tokens, self._tokens = self._tokens[:count], self._tokens[count:]
        return Piece(text, tuple(tokens))
