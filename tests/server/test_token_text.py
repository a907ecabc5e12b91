"""The bytes of single tokens are exactly those of the text."""

from __future__ import annotations

from typing import ClassVar

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from server.hosting import DEMO
from server.token_text import TokenTexts
from steering.models import LanguageModel, load_model
from tests.conftest import make_tokenizer

TEXTS = ["Hello there", "naïve café", "日本語", "👩‍👩‍👧‍👦 and 🏳️‍🌈", "a\n\n b\t\x00"]


@pytest.fixture(scope="module")
def demo() -> LanguageModel:
    return load_model(str(DEMO / "model"))


@pytest.mark.parametrize("text", TEXTS)
def test_the_bytes_of_a_texts_tokens_are_its_bytes(text: str, demo: LanguageModel) -> None:
    for tokenizer in (make_tokenizer(), demo.tokenizer):
        texts = TokenTexts(tokenizer)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert b"".join(texts.bytes_of(i) or b"" for i in ids) == text.encode()


def test_a_part_of_a_character_and_a_special_token_have_names() -> None:
    tokenizer = make_tokenizer()
    texts = TokenTexts(tokenizer)
    first, second = tokenizer("é")["input_ids"]
    assert (texts.text_of(first), texts.bytes_of(first)) == ("bytes:\\xc3", b"\xc3")
    assert texts.text_of(second) == "bytes:\\xa9"
    assert (texts.text_of(257), texts.bytes_of(257)) == ("<|end|>", None)


def test_a_column_beyond_the_tokenizer_has_no_text() -> None:
    texts = TokenTexts(make_tokenizer())
    assert (texts.text_of(5000), texts.bytes_of(5000)) == ("", None)


def test_sentencepieces_blanks_and_bytes_are_read() -> None:
    vocabulary = {"<0xC3>": 0, "<0xA9>": 1, "\u2581caf": 2, "x": 3}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    inner.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    tokenizer.add_tokens([AddedToken("<think> it", special=False)])
    texts = TokenTexts(tokenizer)
    assert b"".join(texts.bytes_of(i) or b"" for i in (2, 0, 1, 4)) == " café<think> it".encode()


def test_another_kind_of_tokenizer_is_asked_itself() -> None:
    class Words:
        """What transformers' tokenizers without a Rust backend offer."""

        added_tokens_decoder: ClassVar[dict[int, object]] = {}

        def convert_ids_to_tokens(self, token_id: int) -> str:
            return f"w{token_id}"

        def decode(self, ids: list[int]) -> str:
            return f"word{ids[0]}"

    assert TokenTexts(Words()).bytes_of(3) == b"word3"
