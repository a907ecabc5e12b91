"""Admission, cancelling, failing and stopping."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import GPTNeoConfig, GPTNeoForCausalLM

from server.engine.base import (
    EngineStoppedError,
    PromptTooLongError,
    QueueFullError,
    Sampling,
    StepFailedError,
)
from server.engine.local import LocalEngine
from server.engine.masks import MaskBuilder
from steering.edit import AppliedEdit
from steering.models import LanguageModel
from steering.profile import RAW, Profile, ProfileError
from tests.conftest import make_model
from tests.server.engine.running import ask, collect, ids, prompt_of, running, stream_all
from tests.steering.edits import mixture, random_edit


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "waited 10 seconds in vain"
        await asyncio.sleep(0.002)


@contextmanager
def hooked(module: torch.nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def endless(length: int = 5) -> Any:
    return ask(prompt_of(length), max_tokens=100)


def test_a_reply_ends_at_the_end_token_or_at_its_length(
    endless_llama: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = ask(prompt_of(6), max_tokens=5)
    with running(endless_llama) as engine:
        [full] = stream_all(engine, [request])
    assert [t.finish_reason for t in full] == [None] * 4 + ["length"]
    end = full[2].token_id
    monkeypatch.setattr(endless_llama.model.generation_config, "eos_token_id", [end])
    with running(endless_llama) as engine:
        [cut] = stream_all(engine, [request])
    assert ids(cut) == ids(full)[: ids(full).index(end) + 1]
    assert [t.finish_reason for t in cut] == [None] * (len(cut) - 1) + ["stop"]


def test_only_the_first_token_tells_the_time_in_the_queue(tiny_llama: LanguageModel) -> None:
    with running(tiny_llama) as engine:
        [reply] = stream_all(engine, [ask(prompt_of(4))])
    assert reply[0].queue_seconds is not None and reply[0].queue_seconds >= 0
    assert all(t.queue_seconds is None and t.scores is None for t in reply[1:])


@pytest.mark.parametrize("how", ["close", "drop", "cancel"])
def test_a_cancelled_request_frees_its_slot(endless_llama: LanguageModel, how: str) -> None:
    async def run(engine: LocalEngine) -> None:
        if how == "cancel":
            task = asyncio.create_task(collect(engine, endless()))
            await until(lambda: engine.stats().running == 1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            stream = engine.generate(endless())
            await anext(stream)
            assert engine.stats().slots_used == 1
            if how == "close":
                await stream.aclose()
            del stream
        await until(lambda: engine.stats().slots_used == 0)

    with running(endless_llama) as engine:
        asyncio.run(run(engine))
        assert len(stream_all(engine, [ask(prompt_of(3))])[0]) == 8


def test_cancelling_one_leaves_the_others_alone(endless_llama: LanguageModel) -> None:
    requests = [ask(prompt_of(n), max_tokens=40) for n in (4, 9, 14, 30)]

    async def run(engine: LocalEngine) -> list[list[int]]:
        tasks = [asyncio.create_task(collect(engine, r)) for r in requests[1:]]
        async with aclosing(engine.generate(requests[0])) as doomed:
            await anext(doomed)
        return [ids(await task) for task in tasks]

    with running(endless_llama) as engine:
        alone = [ids(stream_all(engine, [r])[0]) for r in requests[1:]]
        assert asyncio.run(run(engine)) == alone


def test_a_full_queue_refuses_at_once_and_a_cancelled_wait_makes_room(
    endless_llama: LanguageModel,
) -> None:
    async def run(engine: LocalEngine) -> None:
        running_ = engine.generate(endless())
        await anext(running_)
        waiting = engine.generate(endless())
        with pytest.raises(QueueFullError):
            engine.generate(endless())
        assert engine.stats().waiting == 1
        await waiting.aclose()
        assert engine.stats().waiting == 0
        await engine.generate(endless()).aclose()
        await running_.aclose()

    with running(endless_llama, max_num_seqs=1, max_waiting=1) as engine:
        asyncio.run(run(engine))


def test_a_request_of_a_lower_class_is_computed_after_those_somebody_waits_for(
    endless_llama: LanguageModel,
) -> None:
    async def run(engine: LocalEngine) -> list[str]:
        order: list[str] = []

        async def answer(name: str, priority: int) -> None:
            request = replace(ask(prompt_of(5), max_tokens=3), priority=priority)
            assert len(await collect(engine, request)) == 3
            order.append(name)

        async with aclosing(engine.generate(endless())) as blocking:
            await anext(blocking)  # the only slot is taken
            tasks = [asyncio.create_task(answer("shadow", 1))]
            await until(lambda: len(engine._waiting) == 1)
            assert engine.stats().waiting == 0
            tasks.append(asyncio.create_task(answer("client", 0)))
            await until(lambda: engine.stats().waiting == 1)
        await asyncio.gather(*tasks)
        return order

    with running(endless_llama, max_num_seqs=1) as engine:
        assert asyncio.run(run(engine)) == ["client", "shadow"]


def test_requests_submitted_together_are_admitted_all_or_none(
    endless_llama: LanguageModel,
) -> None:
    async def run(engine: LocalEngine) -> None:
        running_ = engine.generate(endless())
        await anext(running_)
        with pytest.raises(QueueFullError):
            engine.generate_all([endless(), endless(), endless()])
        assert engine.stats().waiting == 0
        streams = engine.generate_all([endless(), endless()])
        assert engine.stats().waiting == 2
        for stream in (*streams, running_):
            await stream.aclose()

    with running(endless_llama, max_num_seqs=1, max_waiting=2) as engine:
        asyncio.run(run(engine))


def test_more_requests_than_slots_are_all_served(tiny_llama: LanguageModel) -> None:
    requests = [ask(prompt_of(n), max_tokens=3 + n % 5) for n in range(1, 20)]
    with running(tiny_llama, max_num_seqs=3, prefill_chunk=8) as engine:
        together = stream_all(engine, requests)
        assert [ids(r) for r in together] == [ids(stream_all(engine, [r])[0]) for r in requests]
        assert engine.stats().slots_used == 0


def test_what_cannot_fit_or_means_nothing_is_refused_before_admission(
    tiny_llama: LanguageModel,
) -> None:
    whole = mixture()["last-prompt-token gate"]
    with running(tiny_llama, max_unsplit_prompt=20) as engine:
        with pytest.raises(PromptTooLongError, match="--max-model-len"):
            engine.check(ask(prompt_of(125), max_tokens=8))
        engine.check(ask(prompt_of(120), max_tokens=8))
        with pytest.raises(PromptTooLongError, match="--max-unsplit-prompt"):
            engine.check(ask(prompt_of(21), whole))
        engine.check(ask(prompt_of(20), whole))
        engine.check(ask(prompt_of(21), [AppliedEdit(whole[0].edit, 0.0)]))
        with pytest.raises(ValueError, match="empty"):
            engine.check(ask([]))
        with pytest.raises(ValueError, match="token ids"):
            engine.check(ask([100000]))
        with pytest.raises(ValueError, match="blocks"):
            engine.check(ask([1], [AppliedEdit(random_edit("9.resid_pre"))]))
        for wrong in ({"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}, {"max_tokens": 0}):
            with pytest.raises(ValueError):
                engine.check(ask([1], **wrong))


def test_a_failing_step_fails_its_requests_and_the_engine_lives_on(
    tiny_llama: LanguageModel,
) -> None:
    request = ask(prompt_of(5), max_tokens=30)

    def fail(_module: Any, _args: Any, _out: Any) -> None:
        raise RuntimeError("a broken block")

    with running(tiny_llama) as engine:
        [before] = stream_all(engine, [request])
        with hooked(tiny_llama.sites.blocks[2].module, fail):
            results = asyncio.run(_gather(engine, [request] * 3))
        assert all(isinstance(r, StepFailedError) and "a broken block" in str(r) for r in results)
        assert engine.healthy() and engine.stats().slots_used == 0
        assert ids(stream_all(engine, [request])[0]) == ids(before)


async def _gather(engine: LocalEngine, requests: list[Any]) -> list[Any]:
    tasks = [collect(engine, request) for request in requests]
    return await asyncio.gather(*tasks, return_exceptions=True)


def test_a_row_with_nan_fails_alone_and_leaves_no_nan_behind(tiny_llama: LanguageModel) -> None:
    poison = 200

    def spoil(_module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        return out.masked_fill((args[0] == poison)[..., None], float("nan"))

    good = [ask([*prompt_of(n)[: n - 1], 7], max_tokens=12) for n in (3, 30, 11)]
    good = [replace(r, prompt_ids=tuple(t % poison for t in r.prompt_ids)) for r in good]
    bad = replace(good[1], prompt_ids=(*good[1].prompt_ids[:20], poison, 5))
    embedding = tiny_llama.model.get_input_embeddings()
    with running(tiny_llama) as engine:
        alone = [ids(stream_all(engine, [r])[0]) for r in good]
        assert not any(poison in reply for reply in alone)
        with hooked(embedding, spoil):
            results = asyncio.run(_gather(engine, [good[0], bad, *good[1:]]))
        assert isinstance(results[1], StepFailedError) and "finite" in str(results[1])
        assert [ids(r) for i, r in enumerate(results) if i != 1] == alone
        again = [ids(r) for r in stream_all(engine, good * 2)]
        assert again == alone * 2


def test_profiles_that_come_later_get_their_hooks(tiny_llama: LanguageModel) -> None:
    edits = mixture()["sublayers"]
    profile = Profile(
        "late", "llm_va", edits=tuple(a.edit for a in edits), base=tiny_llama.fingerprint
    )
    elsewhere = replace(profile, edits=(random_edit("99.resid_pre"),))
    with running(tiny_llama) as engine:
        engine.register(profile)
        with pytest.raises(ProfileError, match="blocks"):
            engine.register(elsewhere)
        [edited], [raw] = (
            stream_all(engine, [ask(prompt_of(9), edits)]),
            stream_all(engine, [ask(prompt_of(9))]),
        )
        assert ids(edited) != ids(raw)
    hooks = [m._forward_hooks or m._forward_pre_hooks for m in tiny_llama.model.modules()]
    assert not any(hooks), "closing removes every hook"


def test_closing_fails_what_is_under_way_and_may_be_done_twice(
    endless_llama: LanguageModel,
) -> None:
    async def run(engine: LocalEngine) -> None:
        tasks = [asyncio.create_task(collect(engine, endless())) for _ in range(3)]
        await until(lambda: engine.stats().running == 2)
        await asyncio.to_thread(engine.close)
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, EngineStoppedError)
        with pytest.raises(EngineStoppedError):
            engine.generate(endless())

    engine = LocalEngine(endless_llama, max_num_seqs=2, max_model_len=128)
    engine.start()
    assert engine.healthy()
    asyncio.run(run(engine))
    engine.close()
    assert not engine.healthy()
    with pytest.raises(EngineStoppedError):
        engine.register(RAW)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_thread_is_unhealthy_and_fails_everything(
    endless_llama: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(endless_llama) as engine:

        def die(*_args: Any) -> None:
            raise SystemError("the thread is hit")

        monkeypatch.setattr(engine, "_admit", die)
        [result] = asyncio.run(_gather(engine, [endless()]))
        assert isinstance(result, EngineStoppedError)
        assert not engine.healthy()


def test_a_cache_that_does_not_fit_names_the_flags_to_lower(tiny_llama: LanguageModel) -> None:
    engine = LocalEngine(tiny_llama, max_num_seqs=10**9)
    with pytest.raises(ValueError, match=r"GiB.*--max-num-seqs or --max-model-len"):
        engine.start()
    with pytest.raises(ValueError, match="--max-model-len"):
        LocalEngine(tiny_llama, max_model_len=10**6)


def test_models_without_a_mask_are_refused_at_start(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = make_model("qwen3")
    monkeypatch.setattr(lm.config, "layer_types", ["full_attention"] * 3 + ["linear_attention"])
    with pytest.raises(ValueError, match="linear_attention"):
        LocalEngine(lm)


def test_two_loops_can_use_one_engine(tiny_llama: LanguageModel) -> None:
    with running(tiny_llama) as engine:
        replies = [stream_all(engine, [ask(prompt_of(5))])[0] for _ in range(2)]
    assert ids(replies[0]) == ids(replies[1])


def test_sampling_defaults_work(tiny_llama: LanguageModel) -> None:
    request = replace(ask(prompt_of(5)), sampling=Sampling(max_tokens=4))
    with running(tiny_llama) as engine:
        assert stream_all(engine, [request])[0]


def test_a_family_that_is_wrong_on_the_slot_cache_is_refused_at_start(
    tiny_llama: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the model ignored the engine's masks, as GPT-Neo's local layers do."""
    monkeypatch.setattr(MaskBuilder, "__call__", lambda self, positions, end: None)
    engine = LocalEngine(tiny_llama, max_num_seqs=2, max_model_len=64)
    with pytest.raises(ValueError, match="not supported by the local engine"):
        engine.start()


def test_a_model_with_local_masks_of_its_own_is_refused() -> None:
    config = GPTNeoConfig(
        hidden_size=32, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]]
    )
    with pytest.raises(ValueError, match="local masks itself"):
        MaskBuilder(GPTNeoForCausalLM(config))
