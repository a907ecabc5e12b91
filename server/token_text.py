"""The text of single tokens, for log-probabilities: exactly the bytes each stands for.

A token may be part of a character, so its text alone cannot be decoded; its bytes can always be
told. Covered are byte-level BPE (GPT-2's alphabet: Llama 3, Qwen, Phi-4), SentencePiece's blanks
with byte fallback (Llama 2, Gemma, Mistral), and, through the tokenizer's own decoding and so only
where tokens are whole characters, all else.
"""

from __future__ import annotations

import json
import re
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_BLANK = "\u2581"


class TokenTexts:
    """Looks up the bytes and the text of a tokenizer's tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._added = {
            int(i): (str(token.content), bool(token.special))
            for i, token in tokenizer.added_tokens_decoder.items()
        }
        self._kinds = _decoder_kinds(tokenizer)
        self._alphabet = _byte_alphabet()

    def bytes_of(self, token_id: int) -> bytes | None:
        """The bytes that the token adds to a text; None for special ones, which add none."""
        if token_id in self._added:
            content, special = self._added[token_id]
            return None if special else content.encode()
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        if token is None:  # a column of the model beyond its tokenizer
            return None
        if "ByteLevel" in self._kinds:
            return bytes(self._alphabet[c] for c in token if c in self._alphabet)
        if self._kinds & {"ByteFallback", "Metaspace"}:
            if match := _BYTE.fullmatch(token):
                return bytes([int(match[1], 16)])
            return str(token).replace(_BLANK, " ").encode()
        return str(self._tokenizer.decode([token_id])).encode()

    def text_of(self, token_id: int) -> str:
        """The token in print: its text, `bytes:\\xe2\\x80` where that is not whole characters (as
        OpenAI writes it), or a special token's name."""
        if token_id in self._added:
            return self._added[token_id][0]
        value = self.bytes_of(token_id) or b""
        try:
            return value.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in value)


def _decoder_kinds(tokenizer: Any) -> set[str]:
    """The steps of a fast tokenizer's decoder, by name."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if decoder is None:
        return set()
    state = json.loads(decoder.__getstate__())
    return {step["type"] for step in (state, *state.get("decoders", ()))}


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable character for each byte, the other way round."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}
