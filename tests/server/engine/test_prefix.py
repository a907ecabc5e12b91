"""The prefix cache changes when a reply starts, never what it says."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
import torch

from server.engine.base import EngineToken, StepFailedError
from server.engine.cache import LayerShape, SlotCache, check_memory
from server.engine.local import LocalEngine
from server.engine.prefix import BLOCK, PrefixCache, blocks_within
from steering.edit import AppliedEdit, effective_edits
from steering.models import LanguageModel
from tests.conftest import make_model
from tests.server.engine.running import ask, collect, ids, prompt_of, running, stream_all
from tests.server.engine.test_scores import make_monitor
from tests.steering.edits import mixture, random_edit

SYSTEM = prompt_of(40)
WHOLE = BLOCK * (len(SYSTEM) // BLOCK)
"""Tokens of it that whole blocks hold."""


def question(seed: int) -> list[int]:
    """Differs from all others in its first token, and ends within the block in which it begins."""
    return [seed, *prompt_of(5, seed)]


def cached(reply: list[EngineToken]) -> int:
    assert all(token.cached_tokens is None for token in reply[1:])
    assert reply[0].cached_tokens is not None
    return reply[0].cached_tokens


def needs_whole_prompt(edits: list[AppliedEdit]) -> bool:
    return any(a.edit.needs_whole_prompt for a in effective_edits(edits))


def has_phases(edits: list[AppliedEdit]) -> bool:
    return any(a.edit.phase != "all" for a in effective_edits(edits))


def test_a_prompt_that_hits_is_answered_as_without_the_cache(any_model: LanguageModel) -> None:
    check_answers(any_model, chunk=16)


@pytest.mark.parametrize("chunk", [7, 100])
def test_prompts_cut_otherwise_than_blocks_hit_too(tiny_llama: LanguageModel, chunk: int) -> None:
    check_answers(tiny_llama, chunk)


def check_answers(lm: LanguageModel, chunk: int) -> None:
    turns = [
        [ask([*SYSTEM, *question(turn)], edits, max_tokens=6) for edits in mixture().values()]
        for turn in range(2)
    ]
    settings: dict[str, Any] = {"max_num_seqs": 5, "prefill_chunk": chunk}
    with running(lm, **settings) as engine:
        expected = [stream_all(engine, requests) for requests in turns]
    with running(lm, **settings, prefix_cache_mib=8) as engine:
        found = [stream_all(engine, requests) for requests in turns]
    for turn in range(2):
        assert list(map(ids, found[turn])) == list(map(ids, expected[turn]))
    hits = dict(zip(mixture(), map(cached, found[1]), strict=True))
    assert hits == {
        name: 0 if needs_whole_prompt(edits) else WHOLE for name, edits in mixture().items()
    }
    assert not any(cached(reply) for replies in expected for reply in replies)


def test_the_next_turn_finds_the_reply_unless_an_edit_knows_phases(
    tiny_llama: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_llama.model.generation_config, "eos_token_id", [])
    first, more = prompt_of(20), prompt_of(4, 9)
    for name, edits in mixture().items():
        with running(tiny_llama, prefix_cache_mib=8) as engine:
            [reply] = stream_all(engine, [ask(first, edits, max_tokens=30)])
            second = ask([*first, *ids(reply), *more], edits)
            [again] = stream_all(engine, [second])
        with running(tiny_llama) as engine:
            [expected] = stream_all(engine, [second])
        assert ids(again) == ids(expected), name
        # Of 50 tokens 49 were fed to the model, three whole blocks; the prompt holds one.
        whole = needs_whole_prompt(edits)
        assert cached(again) == (0 if whole else BLOCK if has_phases(edits) else 3 * BLOCK), name


def test_no_profile_sees_what_another_one_left(tiny_llama: LanguageModel) -> None:
    """All profiles ask for one prompt, in turn, and what each left is spoiled before the next."""
    profiles = dict(mixture())
    assert profiles.pop("off") and not profiles["raw"]
    profiles["another strength"] = [
        AppliedEdit(a.edit, 0.5 * a.strength) for a in profiles["sublayers"]
    ]
    profiles["another phase"] = [
        AppliedEdit(
            random_edit("1.resid_pre", 0, phase="all"), 1.5
        )  # that of "shift on the prompt"
    ]
    profiles["another order"] = profiles["several at one site"][::-1]
    profiles["a part"] = profiles["sublayers"][:-1]
    request = {name: ask(SYSTEM, edits) for name, edits in profiles.items()}
    with running(tiny_llama) as engine:
        expected = {name: ids(stream_all(engine, [r])[0]) for name, r in request.items()}
    with running(tiny_llama, prefix_cache_mib=8) as engine:
        for name, r in request.items():
            [reply] = stream_all(engine, [r])
            assert cached(reply) == 0 and ids(reply) == expected[name], name
            engine.call(lambda: spoil(engine))
        [seen] = stream_all(engine, [request["raw"]])
        assert cached(seen) > 0 and ids(seen) != expected["raw"], "the spoiling has to show"


def spoil(engine: LocalEngine) -> None:
    assert engine._scheduler is not None
    for _, blocks in engine._scheduler.prefixes._stores:
        blocks.normal_()


def test_the_same_edits_share_whatever_the_profile_is_called(tiny_llama: LanguageModel) -> None:
    one, same = mixture()["sublayers"], mixture()["sublayers"]
    assert one[0].edit is not same[0].edit
    with running(tiny_llama, prefix_cache_mib=8) as engine:
        stream_all(engine, [ask(SYSTEM, one)])
        assert cached(stream_all(engine, [ask(SYSTEM, same)])[0]) == (len(SYSTEM) - 1) // 16 * 16
        stream_all(engine, [ask(SYSTEM)])
        assert cached(stream_all(engine, [ask(SYSTEM, mixture()["off"])])[0]) > 0


def test_the_last_token_is_always_computed(tiny_llama: LanguageModel) -> None:
    prompt = prompt_of(2 * BLOCK)
    with running(tiny_llama, prefix_cache_mib=8) as engine:
        replies = [stream_all(engine, [ask(prompt)])[0] for _ in range(2)]
    assert list(map(cached, replies)) == [0, BLOCK]
    assert ids(replies[0]) == ids(replies[1])


def test_requests_that_wait_take_over_what_those_before_them_compute(
    tiny_llama: LanguageModel,
) -> None:
    requests = [ask([*SYSTEM, *question(i)]) for i in range(6)]
    settings: dict[str, Any] = {"max_num_seqs": 6, "prefill_chunk": 16, "max_prefill_tokens": 16}
    with running(tiny_llama, **settings) as engine:
        expected = stream_all(engine, requests)
    with running(tiny_llama, **settings, prefix_cache_mib=8) as engine:
        found = stream_all(engine, requests)
    assert list(map(ids, found)) == list(map(ids, expected))
    # In turn, each computes a chunk at most that those before it have not.
    assert min(cached(reply) for reply in found[1:]) >= BLOCK
    assert [cached(reply) for reply in found[3:]] == [WHOLE] * 3


@pytest.mark.parametrize("sites", [("0.resid_post", "3.resid_pre"), ("3.resid_post",)], ids=str)
def test_scores_are_those_of_a_prompt_computed_whole(sites: tuple[str, ...]) -> None:
    lm = make_model("gemma2")
    monitor = make_monitor(lm, *sites)
    requests = [
        ask([*SYSTEM, *question(turn)], edits, max_tokens=3, answer_probe="edited")
        for turn in range(2)
        for edits in mixture().values()
    ]
    settings: dict[str, Any] = {"max_num_seqs": 5, "prefill_chunk": 16, "monitor": monitor}
    with running(lm, **settings) as engine:
        expected = [stream_all(engine, [r])[0] for r in requests]
    with running(lm, **settings, prefix_cache_mib=8) as engine:
        found = [stream_all(engine, [r])[0] for r in requests]
    half = len(requests) // 2
    hits = [cached(reply) for reply in found]
    assert hits[half:] == [0 if needs_whole_prompt(e) else WHOLE for e in mixture().values()]
    for one, other in zip(found, expected, strict=True):
        assert ids(one) == ids(other)
        a, b = one[0].scores, other[0].scores
        assert a is not None and b is not None
        for name in ("refusal_score", "answer_probability", "benign_probability", "edit_norm"):
            assert getattr(a, name) == pytest.approx(getattr(b, name), abs=1e-3), name
        assert a.gate_values == pytest.approx(b.gate_values, abs=1e-3)


def test_a_row_that_fails_leaves_nothing(tiny_llama: LanguageModel) -> None:
    poison = 200
    prompt = [token % poison for token in SYSTEM]
    prompt[20] = poison  # the second block; its first one is sound, and not kept either

    def spoil_token(_module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        return out.masked_fill((args[0] == poison)[..., None], float("nan"))

    with running(tiny_llama) as engine:
        [expected] = stream_all(engine, [ask(prompt)])
    with running(tiny_llama, prefix_cache_mib=8) as engine:
        handle = tiny_llama.model.get_input_embeddings().register_forward_hook(spoil_token)
        with pytest.raises(StepFailedError):
            asyncio.run(collect(engine, ask(prompt)))
        handle.remove()
        [again] = stream_all(engine, [ask(prompt)])
    assert ids(again) == ids(expected) and cached(again) == 0


SHAPES = [
    LayerShape(heads=2, key_size=3, value_size=4, dtype=torch.float32, device=torch.device("cpu")),
    LayerShape(heads=1, key_size=5, value_size=1, dtype=torch.bfloat16, device=torch.device("cpu")),
]


@pytest.mark.parametrize("capacity", [1, 3, 8, 100])
def test_what_is_loaded_is_what_was_saved_for_these_very_tokens(capacity: int) -> None:
    """Random saves and loads of related prompts, with a cache that is far too small and one that
    is not; a position's values are a function of digest and tokens up to it, as in a model."""
    cache = SlotCache(SHAPES, slots=2, max_len=6 * BLOCK)
    prefixes = PrefixCache(cache, capacity)
    rng, known = random.Random(capacity), dict[tuple[Any, ...], int]()

    def value(digest: str, tokens: list[int], position: int) -> int:
        return known.setdefault((digest, *tokens[: position + 1]), len(known) % 251)

    hits = 0
    for _ in range(300):
        digest = rng.choice(["", "a", "b"])
        tokens = [t for _ in range(rng.randrange(6)) for t in [rng.randrange(3)] * BLOCK]
        tokens += [7] * rng.randrange(BLOCK)
        if rng.random() < 0.5:
            for position in range(len(tokens)):
                for store in cache.stores():
                    store[0, :, position] = value(digest, tokens, position)
            prefixes.save(digest, tokens, 0)
            assert prefixes.load(digest, tokens, 1) == min(len(tokens) // BLOCK, capacity) * BLOCK
        else:
            for store in cache.stores():
                store[1] = -1
            start = rng.randrange(len(tokens) + 1)
            end = prefixes.load(digest, tokens, 1, start)
            assert start <= end <= len(tokens)
            hits += end > start
            for position in range(start, end):
                for store in cache.stores():
                    assert (store[1, :, position] == value(digest, tokens, position)).all()
            for store in cache.stores():
                assert (store[1, :, end:] == -1).all(), "nothing beyond what is known is touched"
        assert len(prefixes._used) + len(prefixes._free) == capacity
    assert hits


def test_what_was_not_used_for_the_longest_time_leaves_first() -> None:
    cache = SlotCache(SHAPES, slots=1, max_len=6 * BLOCK)
    prefixes = PrefixCache(cache, 4)
    old, used, new = ([token] * (2 * BLOCK) for token in (1, 2, 3))
    prefixes.save("", old, 0)
    prefixes.save("", used, 0)
    prefixes.load("", old, 0)
    prefixes.load("", used, 0)
    prefixes.save("", new, 0)
    assert [prefixes.load("", tokens, 0) for tokens in (old, used, new)] == [0, 32, 32]
    prefixes.save("", [*used, *[4] * BLOCK], 0)
    assert prefixes.load("", new, 0) == BLOCK, "a prompt loses its end first"
    assert prefixes.load("", used, 0) == 2 * BLOCK


def test_values_that_are_not_finite_are_not_kept() -> None:
    cache = SlotCache(SHAPES, slots=1, max_len=64)
    prefixes = PrefixCache(cache, 4)
    for bad in (float("nan"), float("inf"), -float("inf")):
        cache.stores()[-1][0, 0, 20, 0] = bad
        prefixes.save("", [1] * 40, 0)
        assert prefixes.load("", [1] * 40, 0) == 0
    cache.stores()[-1][0, 0, 20, 0] = 1.0
    prefixes.save("", [1] * 40, 0)
    assert prefixes.load("", [1] * 40, 0) == 32


def test_a_cache_that_failed_to_write_forgets_the_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = SlotCache(SHAPES, slots=1, max_len=64)
    prefixes = PrefixCache(cache, 2)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="no memory"):
        patch.setattr(torch.Tensor, "__setitem__", _no_memory)
        prefixes.save("", [1] * 40, 0)
    assert prefixes.load("", [1] * 40, 0) == 0
    prefixes.save("", [2] * 40, 0)
    assert prefixes.load("", [2] * 40, 0) == 32


def _no_memory(*_: Any) -> None:
    raise RuntimeError("no memory")


def test_memory_is_bounded_counted_and_named() -> None:
    tiny = make_model("llama")
    per_token = 4 * 1 * 64 * 4  # layers, heads, keys and values, bytes
    with running(tiny, prefix_cache_mib=1) as engine:
        assert engine._scheduler is not None
        assert engine._scheduler.prefixes.capacity == 2**20 // (per_token * BLOCK)
    assert blocks_within(SHAPES, 0) == 0
    large = [LayerShape(64, 1024, 1024, torch.float32, torch.device("cpu"))] * 4
    with pytest.raises(ValueError, match=r"--prefix-cache-mib 1 .*0"):
        blocks_within(large, 1)
    assert check_memory(SHAPES, 1, 1, 2**30, prefix_mebibytes=5) > 5 * 2**20
    engine = LocalEngine(tiny, max_num_seqs=1, prefix_cache_mib=10**9)
    with pytest.raises(ValueError, match=r"1000000000 MiB of prefixes.*or --prefix-cache-mib"):
        engine.start()
    with pytest.raises(ValueError, match="--prefix-cache-mib"):
        LocalEngine(tiny, prefix_cache_mib=-1)
