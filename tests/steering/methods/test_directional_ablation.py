from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from steering.activations import gather_activations
from steering.edit import AppliedEdit, Site
from steering.methods.directional_ablation import (
    DirectionalAblation,
    ablation,
    mean_divergence,
    post_instruction_tokens,
    refusal_scores,
)
from steering.models import LanguageModel
from tests.conftest import make_model
from tests.steering.methods.synthetic import Scripted, always_answers, fit_data, unedited


def random_unit(size: int, seed: int = 0) -> torch.Tensor:
    v = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return v / v.norm()


def test_ablation_removes_the_projection_everywhere(any_model: LanguageModel) -> None:
    direction = random_unit(any_model.sites.hidden_size)
    depth = len(any_model.sites.blocks)
    edits = [AppliedEdit(edit) for edit in ablation(direction, depth)]
    assert len(edits) == 3 * depth
    ids = [any_model.encode_prompt(text) for text in ("one", "two and more")]
    sites = [e.edit.site for e in edits]
    before = gather_activations(any_model, ids, sites)
    after = gather_activations(any_model, ids, sites, edits=edits)
    for site in sites:
        assert (before[site].double() @ direction).abs().max() > 1e-3
        assert (after[site].double() @ direction).abs().max() < 1e-4
    # Without a norm behind the sublayers nothing writes to it any more.
    final = [Site(depth - 1, "resid_post")]
    if any_model.sites.blocks[0].mlp_post_norm is None:
        last = gather_activations(any_model, ids, final, edits=edits)[final[0]]
        assert (last.double() @ direction).abs().max() < 1e-4


def test_ablation_leaves_what_is_orthogonal_alone_and_is_idempotent() -> None:
    direction = random_unit(64)
    edit = ablation(direction, 1)[0]
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    once = x + edit.change(x)
    expected = x - torch.outer(x @ direction, direction)
    torch.testing.assert_close(once, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(once + edit.change(once), once, rtol=1e-6, atol=1e-6)


def test_refusal_scores_are_log_odds_of_the_mass_on_refusal_tokens() -> None:
    logits = torch.randn(5, 11, generator=torch.Generator().manual_seed(0))
    probabilities = np.exp(logits.double().numpy())
    p = probabilities[:, [2, 7]].sum(1) / probabilities.sum(1)
    expected = torch.from_numpy(np.log(p / (1 - p)))
    torch.testing.assert_close(refusal_scores(logits, (2, 7)), expected, rtol=1e-6, atol=1e-6)
    certain = torch.full((1, 4), -1e4)
    certain[0, 1] = 0
    assert float(refusal_scores(certain, (1,))) == pytest.approx(-math.log(1e-8), abs=1e-6)


def test_the_divergence_is_kullback_leibler_s_from_the_unedited_model() -> None:
    g = torch.Generator().manual_seed(0)
    one, two = torch.randn(4, 9, generator=g), torch.randn(4, 9, generator=g)
    p, q = one.double().softmax(-1).numpy(), two.double().softmax(-1).numpy()
    assert mean_divergence(one, two) == pytest.approx((p * np.log(p / q)).sum(1).mean())
    assert mean_divergence(one, one) == 0


def test_post_instruction_tokens_are_what_the_template_ends_with(tiny_llama: LanguageModel) -> None:
    count = post_instruction_tokens(tiny_llama)
    ids = tiny_llama.encode_prompt("anything")[-count:]
    assert tiny_llama.tokenizer.convert_ids_to_tokens(ids) == ["<|end|>", "<|assistant|>"]


def test_candidates_are_differences_of_means_at_every_block_and_template_token() -> None:
    data = fit_data(make_model("llama"), Scripted(always_answers))
    fitted = DirectionalAblation().fit(data)
    tried = fitted.diagnostics["candidates"]
    # Block 0's input at a template token is the same for every prompt.
    assert [(t["block"], t["position"]) for t in tried] == [
        (block, position) for block in (1, 2, 3) for position in (-2, -1)
    ]
    block, position = fitted.diagnostics["block"], fitted.diagnostics["position"]
    means = []
    for harmful, outcome in ((True, "refusal"), (False, "answer")):
        ids = [
            data.lm.encode_prompt(p.text)
            for p in data.fit.prompts
            if p.harmful == harmful
            and unedited(harmful, "!" in p.text, int(p.text.split()[-1])) == outcome
        ]
        cut = [i[: len(i) + 1 + position] for i in ids]
        site = Site(block, "resid_pre")
        means.append(gather_activations(data.lm, cut, [site])[site].double().mean(0))
    expected = (means[0] - means[1]) / (means[0] - means[1]).norm()
    for edit in fitted.edits:
        torch.testing.assert_close(edit.read[:, 0].double(), expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(edit.write, -edit.read)
        assert not edit.has_shift and edit.phase == "all"


def test_the_choice_keeps_to_the_bounds_and_takes_the_lowest_bypass_score() -> None:
    data = fit_data(make_model("llama"), Scripted(always_answers))
    loose = DirectionalAblation(max_divergence=1e9, min_induce=-1e9).fit(data).diagnostics
    assert loose["broken_bounds"] == []
    assert loose["bypass"] == min(t["bypass"] for t in loose["candidates"])
    divergences = sorted(t["divergence"] for t in loose["candidates"])
    bound = (divergences[1] + divergences[2]) / 2
    found = DirectionalAblation(max_divergence=bound, min_induce=-1e9).fit(data).diagnostics
    assert found["divergence"] < bound and found["broken_bounds"] == []
    kept = [t for t in found["candidates"] if t["divergence"] < bound]
    assert len(kept) == 2 and found["bypass"] == min(t["bypass"] for t in kept)


def test_candidates_lie_below_the_layer_bound_and_broken_bounds_are_told() -> None:
    lines: list[str] = []
    data = fit_data(make_model("llama"), Scripted(always_answers))
    data = type(data)(**{**vars(data), "report": lines.append})
    found = DirectionalAblation(max_depth=0.5, max_divergence=0.0).fit(data).diagnostics
    assert {t["block"] for t in found["candidates"]} == {1}
    assert "divergence" in found["broken_bounds"]
    assert any("every candidate breaks a bound" in line for line in lines)


def test_a_model_that_never_refuses_has_no_direction_to_ablate() -> None:
    data = fit_data(make_model("llama"), Scripted(raw=always_answers))
    with pytest.raises(ValueError, match=r"harmful fit prompts that the model refuses.*add some$"):
        DirectionalAblation().fit(data)
