"""Text from tokens, one at a time."""

from __future__ import annotations

import pytest

from server.detokenize import Detokenizer
from tests.conftest import make_sentencepiece, make_tokenizer

TEXTS = [
    "Hello there",
    "naïve café",
    "日本語のテキスト",
    "👩‍👩‍👧‍👦 and 🏳️‍🌈",
    " leading",
    "a\n\n b\t",
    "\ufffd ok",
]


@pytest.mark.parametrize("text", TEXTS)
def test_the_pieces_are_the_text_and_each_is_whole(text: str) -> None:
    tokenizer = make_tokenizer()
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(token) for token in tokenizer(text)["input_ids"]]
    pieces.append(detokenizer.flush())
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_special_tokens_are_no_text() -> None:
    tokenizer = make_tokenizer()
    detokenizer = Detokenizer(tokenizer)
    ids = tokenizer("a<|end|>b<|user|>")["input_ids"]
    assert "".join(map(detokenizer.push, ids)) + detokenizer.flush() == "ab"


def test_half_a_character_is_held_back_until_the_end() -> None:
    tokenizer = make_tokenizer()
    detokenizer = Detokenizer(tokenizer)
    first, *_ = tokenizer("🙂")["input_ids"]
    assert detokenizer.push(first) == ""
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""


def test_bytes_that_never_become_a_character_do_not_pile_up() -> None:
    tokenizer = make_tokenizer()
    detokenizer = Detokenizer(tokenizer)
    lead, *_ = tokenizer("é")["input_ids"]
    pieces = [detokenizer.push(lead) for _ in range(100)]
    assert len("".join(pieces)) > 80


def test_another_kind_of_tokenizer_is_decoded_through_transformers() -> None:
    class Slow:
        """What transformers' tokenizers without a Rust backend offer."""

        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            assert skip_special_tokens
            return bytes(ids).decode(errors="replace")

    detokenizer = Detokenizer(Slow())
    assert [detokenizer.push(b) for b in "aé".encode()] == ["a", "", "é"]


def test_the_blank_before_a_word_shows_where_a_text_goes_on() -> None:
    tokenizer = make_sentencepiece("Of", "course", "here")
    of, course, here = tokenizer.convert_tokens_to_ids(["\u2581Of", "\u2581course", "\u2581here"])
    assert list(map(Detokenizer(tokenizer).push, (of, course))) == ["Of", " course"]
    going_on = Detokenizer(tokenizer, after=[of, course])
    assert list(map(going_on.push, (here, of))) == [" here", " Of"]


def test_half_a_character_before_the_text_hides_nothing_of_it() -> None:
    tokenizer = make_tokenizer()
    half, a = tokenizer("é")["input_ids"][0], tokenizer("a")["input_ids"][0]
    detokenizer = Detokenizer(tokenizer, after=[a, half])
    assert detokenizer.push(a) == "a"
