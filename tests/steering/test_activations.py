from __future__ import annotations

import torch

from steering.activations import (
    LastTokens,
    gather_activations,
    prompt_mean,
    read_activations,
)
from steering.edit import AppliedEdit, Site
from steering.generate import generate
from steering.models import LanguageModel
from tests.reference import greedy
from tests.steering.edits import mixture, random_edit

SITES = [Site(0, "attn_add"), Site(2, "resid_pre"), Site(3, "resid_post")]


def prompts(lm: LanguageModel) -> list[list[int]]:
    texts = ("hello", "a", "how do I do this all day long, please", "goodbye", "hi")
    return [lm.encode_prompt(text) for text in texts]


def test_a_batch_reads_what_each_prompt_shows_alone(any_model: LanguageModel) -> None:
    ids = prompts(any_model)
    edits = [AppliedEdit(random_edit("1.attn_out"))]
    together = gather_activations(any_model, ids, SITES, edits=edits, batch_tokens=200)
    for i, prompt in enumerate(ids):
        alone = gather_activations(any_model, [prompt], SITES, edits=edits)
        for site in SITES:
            torch.testing.assert_close(together[site][i], alone[site][0], atol=1e-4, rtol=1e-4)


def test_logits_are_those_of_each_prompts_own_end(any_model: LanguageModel) -> None:
    ids = prompts(any_model)
    for batch in read_activations(any_model, ids, SITES[:1], logits=True):
        assert batch.logits is not None
        for row, i in enumerate(batch.indices):
            expected = any_model.model(torch.tensor([ids[i]])).logits[0, -1]
            torch.testing.assert_close(batch.logits[row], expected, atol=1e-4, rtol=1e-4)


def test_batches_stay_within_their_tokens_and_cover_every_prompt(tiny_llama: LanguageModel) -> None:
    ids = prompts(tiny_llama) * 3
    batches = list(read_activations(tiny_llama, ids, SITES[:1], batch_tokens=64))
    assert sorted(i for batch in batches for i in batch.indices) == list(range(len(ids)))
    for batch in batches:
        padded = len(batch.indices) * max(len(ids[i]) for i in batch.indices)
        assert len(batch.indices) == 1 or padded <= 64


def test_greedy_replies_equal_the_models_own(any_model: LanguageModel) -> None:
    ids = prompts(any_model)
    replies = generate(any_model, ids * 2, max_tokens=20, batch_size=3)
    for prompt, reply in zip(ids * 2, replies, strict=True):
        whole = any_model.model.generate(
            torch.tensor([prompt]), max_new_tokens=20, do_sample=False
        )[0].tolist()
        expected = [t for t in whole[len(prompt) :] if t not in any_model.eos_token_ids]
        assert reply == expected


def test_edited_replies_equal_the_reference(any_model: LanguageModel) -> None:
    ids = prompts(any_model)[:3]
    for name, edits in mixture().items():
        replies = generate(any_model, ids, edits=edits, max_tokens=6)
        assert replies == [greedy(any_model, p, edits, 6) for p in ids], name


def test_a_pool_of_the_LastTokens_reads_what_truncated_prompts_end_in(
    any_model: LanguageModel,
) -> None:
    # Causal: the state at a token is the last state of the prompt that stops there.
    prompts = [any_model.encode_prompt(text) for text in ("one", "some more words", "ab")]
    site = Site(2, "resid_post")
    for batch in read_activations(any_model, prompts, [site], pool=LastTokens(3)):
        for row, i in enumerate(batch.indices):
            for back in range(3):
                ids = prompts[i][: len(prompts[i]) - back]
                alone = gather_activations(any_model, [ids], [site])[site][0]
                torch.testing.assert_close(
                    batch.states[site][row, 2 - back], alone, rtol=1e-4, atol=1e-4
                )


def test_the_prompt_mean_is_over_every_token_of_a_row_and_no_padding(
    tiny_llama: LanguageModel,
) -> None:
    prompts = [tiny_llama.encode_prompt(text) for text in ("one", "some more words")]
    site = Site(1, "resid_pre")
    (batch,) = read_activations(tiny_llama, prompts, [site], pool=prompt_mean)
    for row, i in enumerate(batch.indices):
        states = [
            gather_activations(tiny_llama, [prompts[i][:n]], [site])[site][0].double()
            for n in range(1, len(prompts[i]) + 1)
        ]
        expected = torch.stack(states).mean(0).float()
        torch.testing.assert_close(batch.states[site][row], expected, rtol=1e-4, atol=1e-4)


def test_padding_that_is_not_finite_does_not_reach_the_prompt_mean() -> None:
    x = torch.tensor([[[1.0], [3.0], [torch.nan]]])
    assert prompt_mean(x, torch.tensor([2])).tolist() == [[2.0]]
