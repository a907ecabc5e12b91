"""Tiny random models of every supported family, made here: no network, no files beyond tmp."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import hypothesis
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from steering.models import LanguageModel, attention_of, find_sites, fingerprint_model

# The same cases in every run, and no test that depends on how busy the machine is.
hypothesis.settings.register_profile("same", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("same")

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Qwen3's way: without reasoning, the generation prompt holds an empty block of it.
REASONING_TEMPLATE = CHAT_TEMPLATE.removesuffix("{% endif %}") + (
    "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"
    "{% endif %}"
)
# Llama-3.1's way: a system message with today's date.
DATED_TEMPLATE = (
    '{% if not date_string is defined %}{% set date_string = strftime_now("%d %b %Y") %}{% endif %}'
    "{{ bos_token }}<|system|>Today: {{ date_string }}<|end|>"
) + CHAT_TEMPLATE.removeprefix("{{ bos_token }}")
SPECIAL_TOKENS = ["<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]

# Head size 32, so that other engines run the same models. Random weights of a wide enough spread
# that greedy replies differ from prompt to prompt.
_DIMENSIONS: dict[str, Any] = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    max_position_embeddings=256,
    initializer_range=0.2,
    bos_token_id=256,
    eos_token_id=257,
    pad_token_id=257,
)

FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**_DIMENSIONS),
    "llama3.1": lambda: LlamaConfig(
        **_DIMENSIONS,
        tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "qwen2": lambda: Qwen2Config(**_DIMENSIONS),
    "qwen3": lambda: Qwen3Config(**_DIMENSIONS),
    # A window shorter than the tests' prompts, on every other block.
    "gemma2": lambda: Gemma2Config(**_DIMENSIONS, query_pre_attn_scalar=32, sliding_window=16),
    "mistral": lambda: MistralConfig(**_DIMENSIONS, sliding_window=16),
    "phi3": lambda: Phi3Config(**_DIMENSIONS, sliding_window=None),
    "phi4": lambda: Phi3Config(
        **_DIMENSIONS, tie_word_embeddings=True, partial_rotary_factor=0.75, sliding_window=None
    ),
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte plus the special tokens; no training needed."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|end|>", pad_token="<|end|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_sentencepiece(*words: str) -> PreTrainedTokenizerFast:
    """Llama 2's way: a mark for the blank before each word, and bytes for all else; a text's first
    blank is no part of it."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *(f"\u2581{w}" for w in words)]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    inner = Tokenizer(
        models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>")
    )
    blanks, strip = decoders.Replace("\u2581", " "), decoders.Strip(" ", 1, 0)
    steps = [blanks, decoders.ByteFallback(), decoders.Fuse(), strip]
    inner.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=inner)


_made: list[LanguageModel] = []


@cache
def make_model(family: str, seed: int = 0) -> LanguageModel:
    """A tiny random float32 model. Shared: steer it, never change its weights."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    config = FAMILIES[family]()
    config.vocab_size = len(tokenizer)
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation=attention_of(config)
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # gains that differ, so that a forgotten one shows
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.generation_config.eos_token_id = 257
    model.generation_config.pad_token_id = 257
    lm = LanguageModel(
        name=f"tiny-{family}",
        model=model,
        tokenizer=tokenizer,
        sites=find_sites(model),
        fingerprint=fingerprint_model(model, tokenizer),
    )
    _made.append(lm)
    return lm


def with_template(lm: LanguageModel, template: str) -> LanguageModel:
    """The same model behind another chat template."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    fingerprint = fingerprint_model(lm.model, tokenizer)
    return replace(lm, tokenizer=tokenizer, fingerprint=fingerprint)


@pytest.fixture(params=sorted(FAMILIES))
def any_model(request: pytest.FixtureRequest) -> LanguageModel:
    """A tiny model of each family in turn."""
    return make_model(request.param)


@pytest.fixture
def tiny_llama() -> LanguageModel:
    return make_model("llama")


@pytest.fixture(scope="module", autouse=True)
def _models_are_left_as_they_were() -> Iterator[None]:
    """A hook left on a shared model would fail, or slow, the tests of other modules."""
    yield
    for lm in _made:
        for name, module in lm.model.named_modules():
            assert not module._forward_hooks, f"a hook was left on {lm.name}'s {name or 'root'}"
            assert not module._forward_pre_hooks, f"a hook was left on {lm.name}'s {name or 'root'}"


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Two threads on a busy machine stall at every barrier; tiny models need one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
