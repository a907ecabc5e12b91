from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from steering.activations import gather_activations
from steering.edit import Site
from steering.judge import Outcome
from steering.methods.alphasteer import AlphaSteer
from steering.null_space import Statistics
from steering.prompts import PromptSet
from tests.conftest import make_model
from tests.steering.methods.synthetic import Scripted, fit_data, right

SIZE = 40


def states(count: int, seed: int, shift: float = 0.0) -> Tensor:
    """Benign states span 24 of 40 directions; `shift` moves along one that they do not use."""
    g = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(
        torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    ).Q
    inside = torch.randn(count, 24, generator=g, dtype=torch.float64) * 3 + 1
    outside = torch.randn(count, 16, generator=g, dtype=torch.float64) * 0.05
    outside[:, 0] += shift
    if not shift:
        outside.zero_()
    return torch.cat([inside, outside], 1) @ basis.mT


def collected(benign: Tensor, malicious: Tensor, outcomes: Sequence[Outcome]) -> Statistics:
    statistics = Statistics(SIZE)
    for batch in benign.split(13):
        statistics.benign.update(batch)
    for start in range(0, len(malicious), 11):
        batch = malicious[start : start + 11]
        statistics.update_malicious(batch, outcomes[start : start + len(batch)])
    return statistics


def alternating(count: int) -> list[Outcome]:
    kinds: tuple[Outcome, ...] = ("refusal", "answer", "degenerate")
    return [kinds[i % 3] for i in range(count)]


def dense_closed_form(benign: Tensor, malicious: Tensor, r: Tensor, k: int, alpha: float) -> Tensor:
    """The paper's `D` `[d, d]`, as it stands: `D~ = R H_m^T P^T (P H_m H_m^T P^T + a P P^T)^+`.

    States are columns of `H`, as in the paper; `P` comes from an SVD of the benign states, not
    from an eigendecomposition of their second moment.
    """
    left = torch.linalg.svd(benign.mT, full_matrices=True).U[:, -k:]
    p = left @ left.mT
    h = malicious.mT
    targets = r[:, None].expand(-1, h.shape[1])
    inner = p @ h @ h.mT @ p.mT + alpha * p @ p.mT
    return targets @ h.mT @ p.mT @ torch.linalg.pinv(inner, rtol=1e-11, hermitian=True) @ p


@pytest.mark.parametrize("alpha", [10.0, None])
def test_the_rank_one_form_equals_the_papers_dense_closed_form(alpha: float | None) -> None:
    benign, malicious = states(200, 1), states(60, 2, shift=1.0)
    # Benign energy everywhere, so that which directions are smallest is well determined.
    benign = benign + 0.01 * torch.randn(
        200, SIZE, generator=torch.Generator().manual_seed(3), dtype=torch.float64
    )
    outcomes = alternating(60)
    found = collected(benign, malicious, outcomes).solve(0.4, penalty=alpha)
    assert found.dimensions == 16
    refused = malicious[[o == "refusal" for o in outcomes]].mean(0)
    answered = malicious[[o == "answer" for o in outcomes]].mean(0)
    torch.testing.assert_close(found.refusal, refused - answered, rtol=1e-12, atol=1e-12)
    dense = dense_closed_form(benign, malicious, found.refusal, 16, found.penalty)
    rank_one = torch.outer(found.refusal, found.gate)
    assert (rank_one - dense).abs().max() <= 1e-12 * max(1.0, float(dense.abs().max()))


def test_the_default_penalty_does_not_depend_on_the_scale_of_the_states() -> None:
    benign, malicious = states(200, 1), states(60, 2, shift=1.0)
    one = collected(benign, malicious, alternating(60)).solve(0.4)
    ten = collected(10 * benign, 10 * malicious, alternating(60)).solve(0.4)
    torch.testing.assert_close(ten.gate * 10, one.gate, rtol=1e-6, atol=1e-9)
    assert ten.penalty == pytest.approx(100 * one.penalty)


def test_the_benign_null_space_is_annihilated() -> None:
    benign, malicious = states(200, 1), states(60, 2, shift=1.0)
    found = collected(benign, malicious, alternating(60)).solve(0.4)
    moved = torch.outer(found.refusal, found.gate) @ benign.mT
    assert moved.abs().max() < 1e-10


def test_the_gate_is_about_one_on_malicious_and_zero_on_benign_prompts_it_has_not_seen() -> None:
    found = collected(states(200, 1), states(60, 2, shift=1.0), alternating(60)).solve(0.4)
    malicious = states(100, 4, shift=1.0) @ found.gate
    assert 0.8 < float(malicious.mean()) < 1.05
    assert float(malicious.min()) > 0.5
    assert (states(100, 5) @ found.gate).abs().max() < 1e-9


def test_the_papers_form_acts_on_every_token_and_the_released_one_on_the_prompt() -> None:
    found = collected(states(200, 1), states(60, 2, shift=1.0), alternating(60)).solve(0.4)
    site = Site(2, "resid_pre")
    paper, released = found.edit(site, "token"), found.edit(site, "last_prompt_token")
    assert (paper.rank, paper.phase, paper.gate, paper.has_shift) == (1, "all", None, False)
    assert released.gate is not None
    assert (released.rank, released.phase, released.gate.reduce) == (
        0,
        "prompt",
        "last_prompt_token",
    )
    assert released.gate.site == released.site == site
    # At the last prompt token of its prompt the two are the same change.
    h = states(5, 6, shift=1.0).float()
    gates = released.gate.value(h @ released.gate.direction)[:, None]
    torch.testing.assert_close(released.change(h, gates), paper.change(h), rtol=1e-4, atol=1e-5)


def test_refusals_are_where_positive_strengths_lead() -> None:
    data = fit_data(make_model("llama"), Scripted(right))
    found = AlphaSteer(blocks=(2,), strength=0.5).fit(data)
    outcomes = data.outcomes(data.fit.harmful)
    x = gather_activations(data.lm, data.encode(data.fit.harmful), [found.edits[0].site])
    rows = x[found.edits[0].site]
    difference = rows[[o == "refusal" for o in outcomes]].mean(0) - rows[
        [o == "answer" for o in outcomes]
    ].mean(0)
    torch.testing.assert_close(found.edits[0].shift, difference, rtol=1e-4, atol=1e-5)
    assert found.strength == 0.5


def test_fitting_gives_the_gate_of_the_statistics_of_the_models_states() -> None:
    data = fit_data(make_model("llama"), Scripted(right))
    found = AlphaSteer(blocks=(1,), rho=0.4, alpha=10.0, gate="token", strength=1.0).fit(data)
    site = Site(1, "resid_pre")
    benign, malicious = (
        gather_activations(data.lm, data.encode(prompts), [site])[site].double()
        for prompts in (data.fit.benign, data.fit.harmful)
    )
    dense = dense_closed_form(benign, malicious, found.edits[0].write[:, 0].double(), 25, 10.0)
    rank_one = found.edits[0].write.double() @ found.edits[0].read.double().mT
    assert (rank_one - dense).abs().max() < 1e-5 * float(dense.abs().max())


def test_blocks_are_chosen_by_held_out_auc_in_the_depth_range() -> None:
    data = fit_data(make_model("llama"), Scripted(right))
    found = AlphaSteer(depth=(0.0, 1.0), block_shares=(0.5,)).fit(data)
    aucs = {c["block"]: c["held_out"]["auc"] for c in found.diagnostics["candidates"]}
    assert set(aucs) == {1, 2, 3}  # the input of block 0 is the same for all prompts
    chosen = found.diagnostics["blocks"]
    assert [edit.site.layer for edit in found.edits] == chosen
    assert len(chosen) == 2
    left = max(v for b, v in aucs.items() if b not in chosen)
    assert min(aucs[b] for b in chosen) >= left - 0.005


def test_each_block_can_have_its_own_rho() -> None:
    data = fit_data(make_model("llama"), Scripted(right))
    found = AlphaSteer(blocks=(3, 1), rho=(0.25, 0.5), strength=1.0).fit(data)
    sizes = [(c["block"], c["null_space"]) for c in found.diagnostics["candidates"]]
    assert sizes == [(1, 32), (3, 16)]


def test_the_strength_refuses_most_without_costing_benign_answers() -> None:
    class Graded(Scripted):
        """Refuses more with strength; from 1.0 on benign prompts as well."""

        def __call__(self, lm, prompts, *, edits=(), max_tokens=128, on_done=None):  # type: ignore[no-untyped-def]
            strength = edits[0].strength if edits else 0.0
            self.edited = lambda harmful, loud, number: (
                "refusal"
                if (number % 4 < 8 * strength if harmful else strength >= 1.0)
                else "answer"
            )
            self.raw = lambda harmful, loud, number: (
                "refusal" if harmful and number % 4 == 0 else "answer"
            )
            return super().__call__(lm, prompts, edits=edits, max_tokens=max_tokens)

    data = fit_data(make_model("llama"), Graded())
    found = AlphaSteer(blocks=(2,), strengths=(1.0, 0.25, 0.5, 0.75)).fit(data)
    assert found.strength == 0.5  # 0.75 refuses no more, 1.0 costs benign answers
    tried = found.diagnostics["selection"]
    assert [t["strength"] for t in tried] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert tried[-1]["benign_loss"] == 1.0
    assert AlphaSteer(strengths=(1.0,)).fit(data).strength == 1.0  # the least loss there is


def test_fewer_blocks_are_chosen_where_more_refuse_less() -> None:
    class Crowded(Scripted):
        """Two blocks are worse than one."""

        def __call__(self, lm, prompts, *, edits=(), **kwargs):  # type: ignore[no-untyped-def]
            self.edited = lambda harmful, loud, number: (
                "refusal" if harmful and (len(edits) == 1 or number % 2) else "answer"
            )
            self.raw = lambda harmful, loud, number: (
                "refusal" if harmful and number % 4 == 0 else "answer"
            )
            return super().__call__(lm, prompts, edits=edits, **kwargs)

    data = fit_data(make_model("llama"), Crowded())
    found = AlphaSteer(block_shares=(0.5, 0.25), strengths=(0.5, 1.0)).fit(data)
    tried = [(len(t["blocks"]), t["strength"]) for t in found.diagnostics["selection"]]
    assert tried == [(0, 0.0), (2, 0.5), (1, 0.5), (2, 1.0), (1, 1.0)]
    assert len(found.edits) == 1
    assert found.strength == 0.5


@pytest.mark.parametrize(
    ("outcome", "verb"), [("answer", "refuses none"), ("refusal", "answers none")]
)
def test_a_model_that_always_does_the_same_is_refused(outcome: Outcome, verb: str) -> None:
    data = fit_data(make_model("llama"), Scripted(raw=lambda *_: outcome))
    with pytest.raises(ValueError, match=f"the model {verb} of the 48 harmful fit prompts"):
        AlphaSteer().fit(data)


def test_missing_labels_and_unsound_settings_are_refused() -> None:
    data = fit_data(make_model("llama"), Scripted(right))
    only = PromptSet(tuple(data.fit.harmful))
    with pytest.raises(ValueError, match="benign and harmful fit prompts"):
        AlphaSteer().fit(replace(data, fit=only))
    with pytest.raises(ValueError, match="benign and harmful selection prompts"):
        AlphaSteer().fit(replace(data, selection=only))
    with pytest.raises(ValueError, match="from 0 to 3"):
        AlphaSteer(blocks=(4,)).fit(data)
    with pytest.raises(ValueError, match="steer later blocks"):
        AlphaSteer(blocks=(0,)).fit(data)
    with pytest.raises(ValueError, match="gate is one of"):
        AlphaSteer(gate="sometimes")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="as many blocks"):
        AlphaSteer(rho=(0.3, 0.4), blocks=(1,))
    with pytest.raises(ValueError, match="above 0"):
        AlphaSteer(strengths=(-0.5,))


def test_a_null_space_that_rounding_chooses_is_warned_about() -> None:
    lines: list[str] = []
    data = replace(fit_data(make_model("llama"), Scripted(), per_kind=12), report=lines.append)
    AlphaSteer(blocks=(2,), strength=0.5, rho=0.4).fit(data)
    (warning,) = [line for line in lines if line.startswith("warning")]
    assert "24 benign prompts" in warning and "keeps 25 of the other 40 by chance" in warning
    assert "39 prompts or more" in warning and "rho of 0.62 or more" in warning
    lines.clear()
    AlphaSteer(blocks=(2,), strength=0.5, rho=0.63).fit(data)
    assert not [line for line in lines if line.startswith("warning")]
