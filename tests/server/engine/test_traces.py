"""What the engine reads for each token of a request that asks for a trace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from server.engine.base import EngineRequest, EngineToken, TokenTrace
from server.engine.runner import Runner
from steering.edit import AppliedEdit
from steering.models import LanguageModel
from tests.conftest import make_model
from tests.reference import edited_states
from tests.server.engine.running import ask, ids, prompt_of, running, stream_all
from tests.server.engine.test_scores import make_monitor
from tests.steering.edits import mixture, random_edit

BENIGN = ("0.resid_post", "2.resid_post")


def traced(
    prompt: Sequence[int], edits: Sequence[AppliedEdit] = (), **options: Any
) -> EngineRequest:
    return replace(ask(prompt, edits, answer_probe="edited", **options), trace=True)


def values(tokens: Sequence[EngineToken], name: str) -> list[float]:
    traces = [token.trace for token in tokens]
    assert all(trace is not None for trace in traces)
    return [getattr(trace, name) for trace in traces]


def test_the_trace_of_the_unedited_model_is_that_of_a_plain_forward_pass(
    endless_llama: LanguageModel,
) -> None:
    monitor, prompt = make_monitor(endless_llama, *BENIGN), prompt_of(9)
    with running(endless_llama, monitor=monitor) as engine:
        [reply] = stream_all(engine, [traced(prompt)])
    sequence = torch.tensor([[*prompt, *ids(reply)[:-1]]])
    decoder, states = endless_llama.model.model, []
    with torch.inference_mode():
        state = decoder.embed_tokens(sequence)
        rotary = decoder.rotary_emb(state, torch.arange(sequence.shape[1])[None])
        for block in decoder.layers:
            state = block(state, position_embeddings=rotary)
            states.append(state[0, len(prompt) - 1 :])
    benign = monitor.benign_probe.probability(states[2])
    answer = monitor.answer["edited"].probability(states[3])
    assert values(reply, "benign_probability") == pytest.approx(benign.tolist(), abs=1e-4)
    assert values(reply, "answer_probability") == pytest.approx(answer.tolist(), abs=1e-4)
    assert values(reply, "edit_norm") == [0.0] * len(reply)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_trace_of_edited_rows_is_that_of_the_edited_model_position_by_position(
    family: str,
) -> None:
    lm = make_model(family)
    monitor = make_monitor(lm, *BENIGN)
    cases = [(edits, prompt_of(n)) for edits in mixture().values() for n in (1, 7, 30)]
    requests = [traced(prompt, edits, max_tokens=5) for edits, prompt in cases]
    with running(lm, max_num_seqs=5, prefill_chunk=8, monitor=monitor) as engine:
        replies = stream_all(engine, requests)
    answer, benign = monitor.answer["edited"], monitor.benign_probe
    for (edits, prompt), reply in zip(cases, replies, strict=True):
        sites = {answer.site, benign.site}
        sequence = [*prompt, *ids(reply)[:-1]]
        states, norms = edited_states(lm, sequence, len(prompt), edits, sites)
        at = slice(len(prompt) - 1, None)
        for name, probe in (("answer_probability", answer), ("benign_probability", benign)):
            expected = probe.probability(states[probe.site][at]).tolist()
            assert values(reply, name) == pytest.approx(expected, abs=1e-3), name
        expected = norms.expand(len(sequence))[at].tolist()
        assert values(reply, "edit_norm") == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_the_first_token_is_read_where_the_prompt_is(tiny_llama: LanguageModel) -> None:
    late = [AppliedEdit(random_edit("3.attn_out"))]
    with running(tiny_llama, monitor=make_monitor(tiny_llama, *BENIGN)) as engine:
        replies = stream_all(engine, [traced(prompt_of(12), edits) for edits in ((), late)])
    for first, *_ in replies:
        assert first.scores is not None
        assert first.trace == TokenTrace(
            first.scores.answer_probability,
            first.scores.benign_probability,
            first.scores.edit_norm,
        )


def test_the_benign_probability_of_a_trace_is_the_requests_own_and_not_the_unedited_models(
    tiny_llama: LanguageModel,
) -> None:
    early = [AppliedEdit(random_edit("0.attn_out", scale=2.0))]
    with running(tiny_llama, monitor=make_monitor(tiny_llama, "2.resid_post")) as engine:
        [[edited, *_], [raw, *_]] = stream_all(
            engine, [traced(prompt_of(12), edits) for edits in (early, ())]
        )
    assert edited.scores is not None and raw.scores is not None
    assert edited.scores.benign_probability == pytest.approx(
        raw.scores.benign_probability, abs=1e-5
    )
    [[own], [unedited]] = (values([token], "benign_probability") for token in (edited, raw))
    assert abs(own - unedited) > 1e-3


def test_a_trace_changes_no_token_and_is_the_same_in_any_company(
    any_model: LanguageModel,
) -> None:
    monitor = make_monitor(any_model, *BENIGN)
    requests = [traced(prompt_of(7 + i), edits) for i, edits in enumerate(mixture().values())]
    plain = [replace(request, trace=False) for request in requests]
    mixed = [r if i % 2 else p for i, (r, p) in enumerate(zip(requests, plain, strict=True))]
    with running(any_model, max_num_seqs=len(requests), monitor=monitor) as engine:
        every, none, some = (stream_all(engine, batch) for batch in (requests, plain, mixed))
    for i, (full, bare, either) in enumerate(zip(every, none, some, strict=True)):
        assert ids(full) == ids(bare) == ids(either)
        assert [t.logprob for t in full] == pytest.approx([t.logprob for t in bare], abs=1e-3)
        assert full[0].scores is not None and bare[0].scores is not None
        assert full[0].scores.edit_norm == pytest.approx(bare[0].scores.edit_norm, rel=1e-4)
        assert all(token.trace is None for token in bare)
        assert all((token.trace is not None) == bool(i % 2) for token in either)
        if i % 2:
            for name in ("answer_probability", "benign_probability", "edit_norm"):
                assert values(either, name) == pytest.approx(values(full, name), abs=1e-3)


def test_without_traced_rows_a_step_reads_nothing(
    tiny_llama: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[bool, bool]] = []
    run = Runner.run

    def spy(self: Runner, *args: Any, **options: Any) -> Any:
        if options.get("decoding"):
            seen.append((bool(options["capture"]), options["measure"]))
        return run(self, *args, **options)

    request = traced(prompt_of(5), mixture()["sublayers"], max_tokens=4)
    with running(tiny_llama, monitor=make_monitor(tiny_llama, *BENIGN)) as engine:
        monkeypatch.setattr(Runner, "run", spy)
        stream_all(engine, [replace(request, trace=False)])
        assert seen and set(seen) == {(False, False)}
        seen.clear()
        stream_all(engine, [request])
        assert seen and set(seen) == {(True, True)}


def test_a_prompt_from_the_prefix_cache_has_the_same_trace(tiny_llama: LanguageModel) -> None:
    prompt, edits = prompt_of(40), mixture()["sublayers"]
    settings: dict[str, Any] = {"prefix_cache_mib": 4, "prefill_chunk": 16}
    with running(tiny_llama, monitor=make_monitor(tiny_llama, *BENIGN), **settings) as engine:
        [fresh] = stream_all(engine, [traced(prompt, edits)])
        [cached] = stream_all(engine, [traced(prompt, edits)])
    assert fresh[0].cached_tokens == 0 and cached[0].cached_tokens
    assert ids(fresh) == ids(cached)
    for name in ("answer_probability", "benign_probability", "edit_norm"):
        assert values(cached, name) == pytest.approx(values(fresh, name), abs=1e-4)


def test_what_there_is_nothing_to_read_with_is_null(tiny_llama: LanguageModel) -> None:
    prompt, edits = prompt_of(5), mixture()["sublayers"]
    request = traced(prompt, edits)
    with running(tiny_llama) as engine:
        [unmonitored, plain] = stream_all(engine, [request, replace(request, trace=False)])
    assert {v for name in ("answer_probability", "benign_probability")
            for v in values(unmonitored, name)} == {None}  # fmt: skip
    assert all(norm > 0 for norm in values(unmonitored, "edit_norm"))
    for reply in (unmonitored, plain):  # a receipt does not depend on who asks for a trace
        assert reply[0].scores is not None and reply[0].scores.edit_norm is None
    off = replace(request, answer_probe=None, benign_read="off")
    free = replace(request, answer_probe=None, benign_read="when-free")
    with running(tiny_llama, monitor=make_monitor(tiny_llama, "2.resid_post")) as engine:
        [unread, freely] = stream_all(engine, [off, free])
    assert set(values(unread, "benign_probability")) == {None}
    assert None not in values(freely, "benign_probability")  # this pass's own is always free
    assert freely[0].scores is not None and freely[0].scores.benign_probability is None
    assert set(values(freely, "answer_probability")) == {None}
