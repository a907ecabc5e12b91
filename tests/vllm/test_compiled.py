"""One compiled engine: what it answers, alone and in company, is what the local engine does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from server.engine.base import (
    DeadlineExceededError,
    Engine,
    ProfileRemovedError,
    QueueFullError,
    RankLimitError,
)
from server.engine.vllm.engine import VllmEngine
from server.engine.vllm.options import VllmOptions
from server.engine.vllm.wire import RequestEdits
from server.grammar import GrammarCompiler
from steering.edit import AppliedEdit, Edit, Site
from steering.models import LanguageModel
from steering.monitor import Monitor
from steering.profile import IMPORTED, Profile, ProfileError
from tests.server.engine.running import ask, collect, ids, prompt_of, stream_all
from tests.server.engine.test_scores import make_monitor
from tests.steering.edits import random_edit, random_gate
from tests.vllm.serving import MIXTURE, alone, locally, never_ends, profiles_of, save, serving

SPARE = Site.parse("3.attn_out")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models") / "llama"


@pytest.fixture(scope="module")
def lm(folder: Path) -> LanguageModel:
    return save("llama", folder)


@pytest.fixture(scope="module")
def monitor(lm: LanguageModel) -> Monitor:
    return make_monitor(lm, "0.resid_post", "3.resid_post")


@pytest.fixture(scope="module")
def engine(lm: LanguageModel, folder: Path, monitor: Monitor) -> Iterator[VllmEngine]:
    with serving(
        lm, folder, profiles_of(lm), monitor, sites=(SPARE,), max_waiting=32, max_num_seqs=12
    ) as engine:
        yield engine


REQUESTS = [
    ask(prompt_of(9 + 4 * i, i), edits, max_tokens=10, answer_probe="edited")
    for i, edits in enumerate(MIXTURE.values())
]


def test_every_profile_answers_as_on_the_local_engine_in_one_batch(
    engine: VllmEngine, lm: LanguageModel, monitor: Monitor
) -> None:
    here, there = stream_all(engine, REQUESTS), locally(lm, REQUESTS, monitor)
    for name, mine, theirs in zip(MIXTURE, here, there, strict=True):
        assert ids(mine) == ids(theirs), name
        assert mine[-1].finish_reason == theirs[-1].finish_reason
        for a, b in zip(mine, theirs, strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=1e-3)
    assert len({tuple(ids(reply)) for reply in here}) > 5


def test_scores_are_the_local_engines(
    engine: VllmEngine, lm: LanguageModel, monitor: Monitor
) -> None:
    requests = [
        *REQUESTS,
        # Edited before the best probe: read where nothing is edited yet, in a pass of its own, or
        # not at all.
        replace(REQUESTS[2], benign_read="when-free"),
        replace(REQUESTS[2], benign_read="off", refusal_score=False, answer_probe=None),
    ]
    here, there = stream_all(engine, requests), locally(lm, requests, monitor)
    for mine, theirs in zip(here, there, strict=True):
        a, b = mine[0].scores, theirs[0].scores
        assert a is not None and b is not None
        for field in ("refusal_score", "answer_probability", "benign_probability", "edit_norm"):
            assert getattr(a, field) == pytest.approx(getattr(b, field), abs=1e-3), field
        assert a.gate_values == pytest.approx(b.gate_values, abs=1e-3)
        assert all(token.scores is None for token in mine[1:])
    assert [len(reply[0].scores.gate_values) for reply in here].count(1) == 2


def test_a_request_answers_alone_as_in_company(engine: VllmEngine) -> None:
    together = stream_all(engine, REQUESTS)
    assert [ids(reply) for reply in alone(engine, REQUESTS)] == [ids(reply) for reply in together]


def test_strength_zero_is_the_unedited_model_bit_for_bit(engine: VllmEngine) -> None:
    prompt = prompt_of(20)
    off = [AppliedEdit(a.edit, 0.0) for edits in MIXTURE.values() for a in edits]
    [raw], [zero] = (stream_all(engine, [ask(prompt, edits)]) for edits in ((), off))
    assert [(t.token_id, t.logprob) for t in raw] == [(t.token_id, t.logprob) for t in zero]


def test_strengths_differ_by_request_and_may_be_negative(
    engine: VllmEngine, lm: LanguageModel
) -> None:
    edits = MIXTURE["sublayers"]
    requests = [
        ask(prompt_of(12), [AppliedEdit(a.edit, s) for a in edits]) for s in (-1.0, 0.3, 0.6, 1.5)
    ]
    here = stream_all(engine, requests)
    assert [ids(r) for r in here] == [ids(r) for r in locally(lm, requests)]
    assert len({tuple(ids(r)) for r in here}) == 4


def test_profiles_compose_and_take_another_phase(engine: VllmEngine, lm: LanguageModel) -> None:
    composed = [*MIXTURE["sublayers"], *MIXTURE["map while generating"]]
    moved = [AppliedEdit(a.edit.in_phase("generation"), 0.5) for a in MIXTURE["sublayers"]]
    twice = [*MIXTURE["sublayers"], *MIXTURE["sublayers"]]
    requests = [ask(prompt_of(15), edits) for edits in (composed, moved, twice)]
    here = stream_all(engine, requests)
    assert [ids(r) for r in here] == [ids(r) for r in locally(lm, requests)]


def test_a_traced_request_tells_of_every_token_what_the_local_engine_does(
    engine: VllmEngine, lm: LanguageModel, monitor: Monitor
) -> None:
    requests = [replace(request, trace=i != 3) for i, request in enumerate(REQUESTS)]
    here, there = stream_all(engine, requests), locally(lm, requests, monitor)
    for mine, theirs in zip(here, there, strict=True):
        assert ids(mine) == ids(theirs)
        for a, b in zip([t.trace for t in mine], [t.trace for t in theirs], strict=True):
            assert (a is None) == (b is None)
            if a is None or b is None:
                continue
            for field in ("answer_probability", "benign_probability", "edit_norm"):
                assert getattr(a, field) == pytest.approx(getattr(b, field), abs=1e-3), field
    assert all(token.trace is None for token in here[3])
    norms = [token.trace.edit_norm for token in here[2] if token.trace is not None]
    assert len(set(norms)) == len(here[2])


def test_the_prefix_cache_keeps_profiles_apart(engine: VllmEngine, lm: LanguageModel) -> None:
    prompt = prompt_of(150)
    requests = [ask(prompt, edits, max_tokens=6) for edits in MIXTURE.values()]
    expected = [ids(reply) for reply in locally(lm, requests)]
    cold, warm = alone(engine, requests), alone(engine, requests)
    assert [ids(r) for r in cold] == expected
    assert [ids(r) for r in warm] == expected
    cached = {name: reply[0].cached_tokens for name, reply in zip(MIXTURE, warm, strict=True)}
    assert cached["raw"] and cached["sublayers"] and cached["several at one site"] == 0
    assert cached["last-prompt-token gate"] == cached["shift on the prompt"] == 0


def test_without_salt_the_prefix_cache_would_mix_them_up(
    engine: VllmEngine, lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why there is one."""
    requests = [ask(prompt_of(160), edits, max_tokens=6) for edits in MIXTURE.values()]
    monkeypatch.setattr(RequestEdits, "cache_salt", lambda self, check: "the same")
    salted = [ids(reply) for reply in alone(engine, requests[:1] + requests[2:6])]
    assert salted != [ids(reply) for reply in locally(lm, requests[:1] + requests[2:6])]


def test_a_seed_means_the_same_tokens_in_any_company(engine: VllmEngine) -> None:
    seeded = [
        ask(prompt_of(12), MIXTURE["sublayers"], temperature=1.0, seed=s, max_tokens=12)
        for s in (1, 2, 3)
    ]
    together = stream_all(engine, [*seeded, *REQUESTS[:6]])[:3]
    assert [ids(r) for r in alone(engine, seeded)] == [ids(r) for r in together]
    assert len({tuple(ids(r)) for r in together}) == 3


def test_sampling_means_what_it_does_on_the_local_engine(
    engine: VllmEngine, lm: LanguageModel
) -> None:
    prompt, edits = prompt_of(12), MIXTURE["sublayers"]
    [plain] = locally(lm, [ask(prompt, edits, max_tokens=12)])
    often = max(set(ids(plain)), key=ids(plain).count)
    requests = [
        ask(prompt, edits, max_tokens=12, **extra)
        for extra in (
            {"logit_bias": {often: -100.0, 7: 3.0}},
            {"presence_penalty": 2.0, "frequency_penalty": 1.0},
            {"repetition_penalty": 1.8},
            {"top_logprobs": 5},
        )
    ]
    here, there = stream_all(engine, requests), locally(lm, requests)
    assert [ids(r) for r in here] == [ids(r) for r in there]
    for mine, theirs in zip(here[-1], there[-1], strict=True):
        assert [t for t, _ in mine.top_logprobs] == [t for t, _ in theirs.top_logprobs]
        assert [p for _, p in mine.top_logprobs] == pytest.approx(
            [p for _, p in theirs.top_logprobs], abs=1e-3
        )


def test_a_grammar_is_followed_by_edited_replies_too(engine: VllmEngine, lm: LanguageModel) -> None:
    grammar = asyncio.run(GrammarCompiler(lm).compile('start: "yes" | "no" | /[0-9]{3}/\n'))
    requests = [
        replace(ask(prompt_of(10), edits), constraint=grammar)
        for edits in ((), MIXTURE["sublayers"], MIXTURE["per-token gate"])
    ]
    here, there = stream_all(engine, requests), locally(lm, requests)
    assert [ids(r) for r in here] == [ids(r) for r in there]
    for reply in here:
        text = lm.tokenizer.decode(ids(reply)[:-1])
        assert text in ("yes", "no") or (text.isdigit() and len(text) == 3)
        assert reply[-1].finish_reason == "stop"


def test_leaving_a_stream_frees_its_place_and_disturbs_nobody(engine: VllmEngine) -> None:
    endless = replace(REQUESTS[2], sampling=replace(REQUESTS[2].sampling, max_tokens=150))
    bias = never_ends(engine.lm)
    endless = replace(endless, sampling=replace(endless.sampling, logit_bias=bias))
    expected = [ids(reply) for reply in alone(engine, REQUESTS[:4])]

    async def run() -> list[list[int]]:
        leaving = [engine.generate(endless) for _ in range(5)]
        for stream in leaving:
            await anext(stream)
        others = [asyncio.create_task(collect(engine, request)) for request in REQUESTS[:4]]
        for stream in leaving[:4]:
            await stream.aclose()
        del leaving[4], stream  # dropping it will do
        return [ids(reply) for reply in await asyncio.gather(*others)]

    assert asyncio.run(run()) == expected
    until = time.monotonic() + 10
    while engine.stats().running and time.monotonic() < until:
        time.sleep(0.05)
    assert engine.stats().running == 0


def test_a_deadline_ends_requests_running_and_waiting(engine: VllmEngine) -> None:
    long = ask(prompt_of(8), max_tokens=240, logit_bias=never_ends(engine.lm))

    async def run() -> list[object]:
        soon = replace(long, deadline=time.monotonic() + 0.3)
        tasks = [collect(engine, soon) for _ in range(engine.capacity + 3)]
        return await asyncio.gather(*tasks, return_exceptions=True)

    results = asyncio.run(run())
    assert all(isinstance(r, DeadlineExceededError) for r in results), results


def test_a_full_queue_turns_requests_away(engine: VllmEngine) -> None:
    async def run() -> None:
        requests = [REQUESTS[0]] * 33
        with pytest.raises(QueueFullError):
            engine.generate_all(requests)
        assert len(await collect(engine, REQUESTS[0])) > 0

    asyncio.run(run())
    assert engine.stats().slots == 12


def reply(engine: Engine, edits: list[AppliedEdit]) -> list[int]:
    [tokens] = stream_all(engine, [ask(prompt_of(14), edits)])
    return ids(tokens)


def test_profiles_come_and_go_without_a_new_compilation(
    engine: VllmEngine, lm: LanguageModel
) -> None:
    for seed in range(4):  # each in the place of the one before
        new = random_edit(str(SPARE), 8, seed=40 + seed, gate=random_gate(str(SPARE), seed=seed))
        profile = Profile(f"new{seed}", IMPORTED, (new,), lm.fingerprint)
        before = time.monotonic()
        engine.register(profile)
        took = time.monotonic() - before
        edits = [AppliedEdit(new, 0.8)]
        assert reply(engine, edits) == local_reply(lm, edits)
        assert took < 10
        engine.retain(profiles_of(lm))
        with pytest.raises(ProfileRemovedError, match="not registered"):
            reply(engine, edits)
    assert ids(stream_all(engine, [REQUESTS[2]])[0]) == ids(locally(lm, [REQUESTS[2]])[0])


def local_reply(lm: LanguageModel, edits: list[AppliedEdit]) -> list[int]:
    [tokens] = locally(lm, [ask(prompt_of(14), edits)])
    return ids(tokens)


def test_registering_stays_within_the_columns_there_are(
    engine: VllmEngine, lm: LanguageModel
) -> None:
    wide = random_edit(str(SPARE), 40)
    elsewhere = random_edit("2.attn_out", 1)
    for edit, flag in ((wide, "--max-site-rank"), (elsewhere, "--steer-site 2.attn_out")):
        with pytest.raises(RankLimitError, match=flag):
            engine.register(Profile("new", IMPORTED, (edit,), lm.fingerprint))


def test_profiles_that_do_not_fit_are_refused_before_vllm_starts(lm: LanguageModel) -> None:
    profile = Profile("wide", IMPORTED, (random_edit("1.resid_post", 9),), lm.fingerprint)
    options = VllmOptions(lm.name, max_site_rank=8)
    with pytest.raises(ValueError, match=r"^profile wide: 10 more columns .*--max-site-rank"):
        VllmEngine(lm, options, profiles=[profile])


def test_a_profile_that_breaks_the_model_is_not_registered(
    engine: VllmEngine, lm: LanguageModel
) -> None:
    huge = torch.full((64, 1), 1e25)
    broken = Edit(SPARE, huge, huge, torch.zeros(64))
    with pytest.raises(ProfileError, match="fails its self-test"):
        engine.register(Profile("broken", IMPORTED, (broken,), lm.fingerprint))
    with pytest.raises(ProfileRemovedError, match="not registered"):
        reply(engine, [AppliedEdit(broken)])
    assert engine.healthy()


def test_a_deleted_profile_stays_for_those_it_is_answering(
    engine: VllmEngine, lm: LanguageModel
) -> None:
    edit = random_edit(str(SPARE), 4, seed=77)
    engine.register(Profile("short-lived", IMPORTED, (edit,), lm.fingerprint))
    request = ask(prompt_of(14), [AppliedEdit(edit)], max_tokens=60)
    expected = ids(alone(engine, [request])[0])

    async def run() -> list[int]:
        stream = engine.generate(request)
        first = await anext(stream)
        await asyncio.to_thread(engine.retain, profiles_of(lm))
        other = random_edit(str(SPARE), 31, seed=78)  # fits only when the first has gone
        if first.finish_reason is None:
            with pytest.raises(RankLimitError):
                await asyncio.to_thread(
                    engine.register, Profile("other", IMPORTED, (other,), lm.fingerprint)
                )
        return [first.token_id, *[token.token_id async for token in stream]]

    assert asyncio.run(run()) == expected


def test_an_unregistered_edit_is_refused(engine: VllmEngine) -> None:
    request = ask(prompt_of(2), [AppliedEdit(random_edit("0.attn_out"))])
    with pytest.raises(ProfileRemovedError, match="not registered"):
        engine.check(request)
