"""Token ids to text, a token at a time, without ever showing half a character."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

_REPLACEMENT = "\ufffd"
_LONGEST_WAIT = 16
"""Tokens without a whole character among them after which bytes are garbage and shown as such. A
character has at most four bytes, so it ends long before."""
_BEFORE = 8
"""Tokens of a text that goes on which are decoded with what is new; one would do, were it whole."""


class Detokenizer:
    """Text that tokens add, one by one.

    A token's text depends on the tokens before it (a leading space, the rest of a character), so
    each is decoded together with the ones that made the last piece, and the difference is new.
    The pieces put together are the whole reply, streamed or not.

    Args:
        keep: special tokens to show; all others are left out.
        after: tokens of the text that this one continues, if it does: SentencePiece drops the blank
            before the first word of a text, and this is not its first then.
    """

    def __init__(
        self, tokenizer: Any, *, keep: Collection[str] = (), after: Sequence[int] = ()
    ) -> None:
        self._decode = _decoder(tokenizer)
        special = special_tokens(tokenizer) if keep else {}
        if not special.keys().isdisjoint(keep):
            hidden = {token_id for name, token_id in special.items() if name not in keep}
            self._decode = _decoder_that_hides(tokenizer, hidden)
        self._context = list(after[-_BEFORE:])
        self._shown = self._decode(self._context)
        """The context's text, all of which was handed out."""
        if self._shown.endswith(_REPLACEMENT):  # half a character, which nobody could tell from new
            self._context, self._shown = [], ""
        self._held: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that can be shown now that this token is known; often `""`."""
        self._held.append(token_id)
        text = self._decode(self._context + self._held)
        if text.endswith(_REPLACEMENT) and len(self._held) < _LONGEST_WAIT:
            return ""
        return self._show(text)

    def flush(self) -> str:
        """What is still held back, at the end of the reply."""
        return self._show(self._decode(self._context + self._held)) if self._held else ""

    def _show(self, text: str) -> str:
        new = text[len(self._shown) :]
        if new:
            self._context, self._held = self._held, []
            self._shown = self._decode(self._context)
        return new


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """Ids of the tokens that are no part of the text, by name."""
    added = tokenizer.added_tokens_decoder.items()
    return {token.content: token_id for token_id, token in added if token.special}


def _decoder(tokenizer: Any) -> Callable[[Sequence[int]], str]:
    """The quickest way to decode: transformers' own adds many times the work to each call."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and not tokenizer.clean_up_tokenization_spaces:
        return lambda ids: str(backend.decode(list(ids), skip_special_tokens=True))
    return lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=True))


def _decoder_that_hides(tokenizer: Any, hidden: Collection[int]) -> Callable[[Sequence[int]], str]:
    return lambda ids: str(
        tokenizer.decode([i for i in ids if i not in hidden], skip_special_tokens=False)
    )
