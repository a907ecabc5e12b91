"""What the engine reads of a prompt for the monitor."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from server.engine.base import MonitorRead, PromptScores
from steering.activations import gather_activations
from steering.edit import AppliedEdit, Site
from steering.models import LanguageModel
from steering.monitor import Monitor, Probe
from tests.conftest import make_model
from tests.reference import edited_logits
from tests.server.engine.running import ask, ids, prompt_of, running, stream_all
from tests.steering.edits import mixture, random_edit

LENGTHS = (1, 7, 30)


def make_monitor(lm: LanguageModel, *benign: str) -> Monitor:
    def probe(site: str, seed: int) -> Probe:
        direction = torch.randn(64, generator=torch.Generator().manual_seed(seed)) * 0.05
        return Probe(
            Site.parse(site),
            direction,
            0.1,
            auroc=0.9 + seed / 100,
            **{"expected_calibration_error": 0.0},
        )

    return Monitor(
        base=lm.fingerprint,
        benign=tuple(probe(site, seed) for seed, site in enumerate(benign)),
        answer={"edited": probe("3.resid_post", 7)},
        refusal_token_ids=(10, 20, 30),
    )


@pytest.mark.parametrize("sites", [("0.resid_post", "3.resid_pre"), ("3.resid_post",)], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_benign_probability_is_that_of_the_unedited_model(
    family: str, sites: tuple[str, ...]
) -> None:
    lm = make_model(family)
    monitor = make_monitor(lm, *sites)
    cases = [(edits, prompt_of(n)) for edits in mixture().values() for n in LENGTHS]
    with running(lm, max_num_seqs=5, prefill_chunk=8, monitor=monitor) as engine:
        requests = [ask(prompt, edits, max_tokens=3) for edits, prompt in cases]
        replies = stream_all(engine, requests)
    with running(lm, max_num_seqs=5, prefill_chunk=8) as engine:
        unmonitored = stream_all(engine, requests)
    for (edits, prompt), reply, bare in zip(cases, replies, unmonitored, strict=True):
        probe = monitor.benign_probe_for(edits) or monitor.benign_probe
        hidden = gather_activations(lm, [prompt], [probe.site])[probe.site][0]
        scores = reply[0].scores
        assert scores is not None
        assert scores.benign_probability == pytest.approx(
            float(probe.probability(hidden)), abs=1e-4
        )
        assert ids(reply) == ids(bare)


@pytest.mark.parametrize(
    ("benign_read", "passes", "read"), [("always", 2, True), ("when-free", 1, False)]
)
def test_a_second_pass_over_the_prompt_is_the_price_of_always_reading_it(
    tiny_llama: LanguageModel, benign_read: MonitorRead, passes: int, read: bool
) -> None:
    monitor = make_monitor(tiny_llama, "3.resid_post")
    prompt, edits = prompt_of(12), [AppliedEdit(random_edit("1.attn_out"))]
    asked = replace(ask(prompt, edits, max_tokens=1), benign_read=benign_read)
    unedited = replace(asked, edits=())
    with running(tiny_llama, monitor=monitor) as engine:
        tokens: list[int] = []
        hook = tiny_llama.model.get_input_embeddings().register_forward_hook(
            lambda module, arguments, output: tokens.append(arguments[0].numel())
        )
        try:
            [reply], [free] = (stream_all(engine, [request]) for request in (asked, unedited))
        finally:
            hook.remove()
    assert sum(tokens) == (passes + 1) * len(prompt)
    assert reply[0].scores is not None and free[0].scores is not None
    assert (reply[0].scores.benign_probability is not None) == read
    assert free[0].scores.benign_probability is not None


def test_what_a_request_does_not_want_is_not_read(tiny_llama: LanguageModel) -> None:
    request = replace(
        ask(prompt_of(12), answer_probe="edited"), benign_read="off", refusal_score=False
    )
    with running(tiny_llama, monitor=make_monitor(tiny_llama, "0.resid_post")) as engine:
        [[first, *_]] = stream_all(engine, [request])
    assert first.scores is not None
    assert first.scores.benign_probability is None and first.scores.refusal_score is None
    assert first.scores.answer_probability is not None


def test_the_other_scores_are_those_of_the_edited_model(any_model: LanguageModel) -> None:
    monitor = make_monitor(any_model, "0.resid_pre")
    cases = [(edits, prompt_of(n)) for edits in mixture().values() for n in LENGTHS]
    with running(any_model, max_num_seqs=5, prefill_chunk=8, monitor=monitor) as engine:
        replies = stream_all(
            engine, [ask(p, e, max_tokens=1, answer_probe="edited") for e, p in cases]
        )
    probe = monitor.answer["edited"]
    for (edits, prompt), reply in zip(cases, replies, strict=True):
        scores = reply[0].scores
        assert scores is not None and scores.edit_norm is not None
        logits = edited_logits(any_model, prompt, len(prompt), edits)[-1]
        assert scores.refusal_score == pytest.approx(float(monitor.refusal_score(logits)), abs=1e-2)
        hidden = gather_activations(any_model, [prompt], [probe.site], edits=edits)[probe.site][0]
        assert scores.answer_probability == pytest.approx(
            float(probe.probability(hidden)), abs=1e-3
        )
        acts_on_prompt = any(a.strength and a.edit.phase != "generation" for a in edits)
        assert scores.edit_norm >= 0 and (acts_on_prompt or scores.edit_norm == 0)


def test_gate_values_are_those_that_latched(tiny_llama: LanguageModel) -> None:
    prompt, edits = prompt_of(12), mixture()["last-prompt-token gate"]
    gate = edits[0].edit.gate
    assert gate is not None
    with running(tiny_llama, monitor=make_monitor(tiny_llama, "0.resid_pre")) as engine:
        [reply] = stream_all(engine, [ask(prompt, edits)])
    hidden = gather_activations(tiny_llama, [prompt], [gate.site])[gate.site][0]
    assert reply[0].scores is not None
    assert reply[0].scores.gate_values == pytest.approx((float(hidden @ gate.direction),), abs=1e-4)


def test_edit_norm_is_change_over_state_at_the_last_prompt_token(tiny_llama: LanguageModel) -> None:
    edit = random_edit("2.resid_post", 2)
    prompt = prompt_of(12)
    with running(tiny_llama, monitor=make_monitor(tiny_llama, "0.resid_pre")) as engine:
        [reply] = stream_all(engine, [ask(prompt, [AppliedEdit(edit, 0.5)])])
    state = gather_activations(tiny_llama, [prompt], [edit.site])[edit.site][0]
    expected = float(0.5 * edit.change(state).norm() / state.norm())
    assert reply[0].scores is not None
    assert reply[0].scores.edit_norm == pytest.approx(expected, rel=1e-3)


def test_without_a_monitor_or_a_probe_nothing_is_read(tiny_llama: LanguageModel) -> None:
    with running(tiny_llama) as engine:
        [reply] = stream_all(engine, [ask(prompt_of(4))])
    assert reply[0].scores == PromptScores()
    with running(tiny_llama, monitor=make_monitor(tiny_llama)) as engine:
        [reply] = stream_all(engine, [ask(prompt_of(4))])
    assert reply[0].scores is not None
    assert reply[0].scores.benign_probability is None
    assert reply[0].scores.answer_probability is None
    assert reply[0].scores.refusal_score is not None
