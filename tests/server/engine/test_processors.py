"""What requests change in their logits, against transformers' own processors."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList, MinPLogitsWarper, TemperatureLogitsWarper
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from server.engine.base import (
    ConstraintError,
    EngineRequest,
    Sampling,
    SamplingError,
    StepFailedError,
)
from server.engine.processors import NOTHING_ALLOWED, Processor, make_processor, process
from server.engine.sampling import check_sampling, make_generator, sample
from steering.models import LanguageModel
from tests.server.engine.running import ask, collect, ids, prompt_of, running, stream_all

V = 400
PROMPT = (3, 5, 5, 9)
REPLY = (7, 5, 7, 7, 11)


class Only:
    """Allows the tokens of a list in turn, and says what it was told."""

    grammar = ""  # there is none

    def __init__(self, *turns: set[int], width: int = V, told: list[int] | None = None) -> None:
        self.turns = turns
        self.width = width
        self.told: list[int] = told if told is not None else []
        self.at = 0

    def allowed(self) -> Tensor:
        mask = torch.zeros(self.width, dtype=torch.bool)
        mask[list(self.turns[self.at])] = True
        return mask

    def accept(self, token_id: int) -> None:
        self.told.append(token_id)
        self.at += 1

    def copy(self) -> Only:
        return Only(*self.turns, width=self.width, told=self.told)


def logits_of(rows: int = 1, seed: int = 0) -> Tensor:
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed)) * 3


def processor(constraint: Any = None, **sampling: Any) -> Processor:
    """Of a request that has got as far as `REPLY`."""
    made = make_processor(EngineRequest("r", PROMPT, Sampling(**sampling), constraint=constraint))
    assert made is not None
    made.prepare(logits_of())
    for token in REPLY:
        if constraint is None:
            made.record(token)
    return made


def test_a_request_that_asks_for_nothing_has_no_processor_and_no_copy_is_made() -> None:
    assert make_processor(EngineRequest("r", PROMPT, Sampling(temperature=0.5, top_k=3))) is None
    logits = logits_of(2)
    assert process(logits, [None, None])[0] is logits


@pytest.mark.parametrize("penalty", [0.7, 1.3])
def test_the_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    logits = logits_of()
    expected = RepetitionPenaltyLogitsProcessor(penalty)(
        torch.tensor([[*PROMPT, *REPLY]]), logits.clone()
    )
    found, _ = process(logits, [processor(repetition_penalty=penalty)])
    torch.testing.assert_close(found, expected)


def test_the_logit_bias_is_that_of_transformers() -> None:
    logits = logits_of()
    bias = {3: -100.0, 7: 2.5, 399: 100.0}
    expected = SequenceBiasLogitsProcessor([[[i], b] for i, b in bias.items()])(
        torch.tensor([[1]]), logits.clone()
    )
    torch.testing.assert_close(process(logits, [processor(logit_bias=bias)])[0], expected)


def test_presence_and_frequency_penalties_are_openais_formula_over_the_reply() -> None:
    logits = logits_of()
    found, _ = process(logits, [processor(presence_penalty=0.5, frequency_penalty=-0.3)])
    expected = logits.clone()
    for token, count in Counter(REPLY).items():
        expected[0, token] -= -0.3 * count + 0.5
    torch.testing.assert_close(found, expected)


def test_bias_comes_before_the_penalties() -> None:
    logits = torch.full((1, V), -1.0)
    made = processor(logit_bias={7: 3.0}, repetition_penalty=2.0, presence_penalty=0.5)
    found, _ = process(logits, [made])
    assert float(found[0, 7]) == (-1.0 + 3.0) / 2.0 - 0.5


@pytest.mark.parametrize("top", [{}, {"top_k": 20}, {"top_p": 0.7}, {"top_k": 20, "top_p": 0.7}])
@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_min_p_and_the_other_cuts_leave_what_transformers_leaves(
    top: dict[str, Any], temperature: float
) -> None:
    logits = logits_of()
    warpers = LogitsProcessorList()  # in vLLM's order
    warpers.append(TemperatureLogitsWarper(temperature))
    warpers.append(MinPLogitsWarper(0.08))
    if "top_k" in top:
        warpers.append(TopKLogitsWarper(top["top_k"]))
    if "top_p" in top:
        warpers.append(TopPLogitsWarper(top["top_p"]))
    expected = warpers(torch.tensor([[1]]), logits.clone()).softmax(-1)[0]
    sampling = Sampling(temperature=temperature, min_p=0.08, seed=3, **top)
    n = 20000
    choice = sample(logits.expand(n, -1), [sampling] * n, [make_generator(sampling)] * n)
    found = torch.bincount(torch.tensor(choice.token_ids), minlength=V) / n
    assert set(choice.token_ids) <= set(expected.nonzero()[:, 0].tolist())
    torch.testing.assert_close(found, expected, atol=0.015, rtol=0)


def test_raw_logprobs_see_none_of_it_and_come_best_first() -> None:
    logits = logits_of(3)
    samplings = [
        Sampling(temperature=0.3, seed=1, top_logprobs=20, logit_bias={4: 50.0}),
        Sampling(temperature=0, top_logprobs=3),
        Sampling(temperature=0),
    ]
    processors = [processor(logit_bias={4: 50.0}, repetition_penalty=2.0), None, None]
    choice = sample(logits, samplings, [make_generator(s) for s in samplings], processors)
    raw = logits.log_softmax(-1)
    assert choice.token_ids[0] == 4
    assert choice.logprobs[0] == pytest.approx(float(raw[0, 4]), abs=1e-5)
    assert [len(row) for row in choice.top_logprobs] == [20, 3, 0]
    for i, row in enumerate(choice.top_logprobs[:2]):
        best, where = raw[i].topk(len(row))
        assert [token for token, _ in row] == where.tolist()
        assert [p for _, p in row] == pytest.approx(best.tolist(), abs=1e-5)


def test_a_constraint_is_obeyed_and_a_short_mask_forbids_the_rest() -> None:
    logits = logits_of()
    made = processor(Only({2, 8}, width=10), logit_bias={300: 100.0})
    found, failed = process(logits, [made])
    assert found[0].isfinite().nonzero()[:, 0].tolist() == [2, 8] and not failed
    assert sample(logits, [Sampling(temperature=0)], [None], [made]).token_ids[0] in (2, 8)


def test_a_constraint_that_allows_nothing_or_breaks_fails_its_row_only() -> None:
    class Broken(Only):
        def copy(self) -> Broken:
            return Broken()

        def allowed(self) -> Tensor:
            raise RuntimeError("broken grammar")

    greedy = Sampling(temperature=0)
    logits = logits_of(3)
    choice = sample(
        logits, [greedy] * 3, [None] * 3, [processor(Only(set())), processor(Broken()), None]
    )
    assert choice.errors[0] == NOTHING_ALLOWED
    assert "broken grammar" in (choice.errors[1] or "")
    assert choice.errors[2] is None and choice.token_ids[2] == int(logits[2].argmax())


MIXED: list[dict[str, Any]] = [
    {"temperature": 0.9, "seed": 1, "presence_penalty": 1.5},
    {"temperature": 0.0, "repetition_penalty": 1.8, "top_logprobs": 2},
    {"temperature": 0.8, "seed": 4, "min_p": 0.2, "frequency_penalty": 2.0},
    {"temperature": 1.0, "seed": 5, "logit_bias": {65: 6.0, 66: -100.0}},
    {"temperature": 0.0},
    {"temperature": 1.2, "seed": 6, "top_p": 0.9, "top_logprobs": 20},
]


def test_every_row_of_a_mixed_batch_gives_what_it_gives_alone(tiny_llama: LanguageModel) -> None:
    requests = [ask(prompt_of(6 + i), max_tokens=16, **s) for i, s in enumerate(MIXED)]
    with running(tiny_llama, max_num_seqs=len(requests)) as engine:
        together = stream_all(engine, requests, gap=0.002)
        alone = [stream_all(engine, [request])[0] for request in requests]
    assert [ids(t) for t in together] == [ids(t) for t in alone]
    assert [len(t[0].top_logprobs) for t in together] == [0, 2, 0, 0, 0, 20]
    for row in together:
        for token in row:
            known = dict(token.top_logprobs)
            assert known.get(token.token_id, token.logprob) == pytest.approx(token.logprob)


def test_the_engine_penalises_as_transformers_generates(tiny_llama: LanguageModel) -> None:
    prompt = prompt_of(12)
    expected = tiny_llama.model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        max_new_tokens=24,
        repetition_penalty=1.7,
    )[0, len(prompt) :].tolist()
    requests = [ask(prompt, max_tokens=24, repetition_penalty=p) for p in (1.7, 1.0)]
    with running(tiny_llama) as engine:
        penalised, plain = stream_all(engine, requests)
    assert ids(penalised) == expected != ids(plain)


def test_the_engine_obeys_a_constraint_and_leaves_the_requests_own_alone(
    tiny_llama: LanguageModel,
) -> None:
    only = Only({65, 66}, {67}, {68, 69}, {257}, width=261)
    request = replace(ask(prompt_of(5)), constraint=only)
    with running(tiny_llama) as engine:
        first, second, free = stream_all(engine, [request, request, ask(prompt_of(5))])
    assert ids(first) == ids(second) and len(first) == 4
    assert first[0].token_id in (65, 66) and first[1].token_id == 67
    assert first[-1].finish_reason == "stop"
    assert ids(free)[:4] != ids(first)
    # The end token is told too, and the request's own constraint has not moved.
    assert sorted(only.told) == sorted(ids(first) * 2) and only.at == 0
    # Raw: the probability the model gave, not 1 for what was forced.
    assert first[1].logprob < -0.01


def test_a_constraint_that_breaks_on_the_way_fails_its_request_only(
    tiny_llama: LanguageModel,
) -> None:
    doomed = replace(ask(prompt_of(5)), constraint=Only({65}, width=261))  # no second turn
    with running(tiny_llama) as engine:

        async def run() -> list[Any]:
            return await asyncio.gather(
                collect(engine, doomed), collect(engine, ask(prompt_of(7))), return_exceptions=True
            )

        failed, fine = asyncio.run(run())
        assert isinstance(failed, StepFailedError) and len(fine) == 8
        assert engine.stats().slots_used == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("min_p", 1.1), ("min_p", float("nan")), ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1), ("repetition_penalty", 0.0), ("repetition_penalty", 1e300),
        ("top_logprobs", 21), ("logit_bias", {V: 1.0}), ("logit_bias", {-1: 1.0}),
        ("logit_bias", {1: 101.0}), ("logit_bias", {1: float("nan")}), ("top_p", 0.0),
    ],
)  # fmt: skip
def test_a_parameter_without_a_meaning_is_named(field: str, value: Any) -> None:
    with pytest.raises(SamplingError, match=field) as raised:
        check_sampling(Sampling(**{field: value}), vocabulary=V)
    assert raised.value.field == field


def test_a_constraint_that_knows_why_it_cannot_go_on_says_so(tiny_llama: LanguageModel) -> None:
    class DeadEnd(Only):
        def copy(self) -> DeadEnd:
            return self

        def allowed(self) -> Tensor:
            raise ConstraintError("the grammar is too complex")

    with (
        running(tiny_llama) as engine,
        pytest.raises(ConstraintError, match="the grammar is too complex"),
    ):
        stream_all(engine, [replace(ask(prompt_of(5)), constraint=DeadEnd({65}))])
