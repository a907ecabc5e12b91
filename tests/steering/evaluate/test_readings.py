from __future__ import annotations

import pytest
import torch

from steering.activations import gather_activations
from steering.edit import Site
from steering.evaluate.arms import Arm
from steering.evaluate.readings import read_arm, read_scatters
from steering.models import LanguageModel
from steering.plan import BatchPlan, RowEdits, Steering, sites_of
from steering.profile import Profile
from steering.prompts import Prompt
from tests.steering.edits import random_edit, random_gate
from tests.steering.evaluate.evaluations import profiles

PROMPTS = ["one", "two and two", "a third, which is longer", "four"]


def arm_of(lm: LanguageModel, *edits: object) -> Arm:
    return Arm(Profile("p", "llm_va", edits, lm.fingerprint), 1.0)  # type: ignore[arg-type]


def test_gates_read_what_the_real_ones_read_before_any_threshold(
    tiny_llama: LanguageModel,
) -> None:
    """A gate that sees activations which an earlier edit has changed, and its own site's edits."""
    gate = random_gate("2.resid_pre", reduce="last_prompt_token", comparator=">", threshold=0.1)
    mean = random_gate("1.resid_pre", seed=3, reduce="prompt_mean")
    edits = [
        random_edit("1.resid_post", 1),
        random_edit("2.resid_pre", 1, seed=2, gate=gate),
        random_edit("2.resid_pre", 0, seed=3, gate=mean),
    ]
    arm = arm_of(tiny_llama, *edits)
    ids = [tiny_llama.encode_prompt(text) for text in PROMPTS]
    readings = read_arm(tiny_llama, ids, arm, sites=[Site(3, "resid_post")])
    expected = gather_activations(tiny_llama, ids, [Site(3, "resid_post")], edits=arm.edits)
    torch.testing.assert_close(readings.states, expected, atol=1e-5, rtol=1e-4)
    with Steering(tiny_llama.sites) as steering:
        steering.attach(sites_of(arm.profile.edits))
        for i, prompt in enumerate(ids):
            row = RowEdits(arm.edits, len(prompt))
            plan = BatchPlan([row], hidden_size=tiny_llama.sites.hidden_size)
            with steering.step(plan, [0], [len(prompt)]), torch.inference_mode():
                tiny_llama.model(torch.tensor([prompt]))
            (_, above), (_, linear) = readings.gates
            assert float(row.latched[1]) == float(above[i] > 0.1)
            assert float(row.latched[2]) == pytest.approx(float(linear[i]), rel=1e-4)


def test_the_edit_norm_is_the_change_over_the_state(tiny_llama: LanguageModel) -> None:
    edit = random_edit("1.resid_pre", 2)
    ids = [tiny_llama.encode_prompt(text) for text in PROMPTS]
    site = Site(0, "resid_post")
    states = gather_activations(tiny_llama, ids, [site])[site]
    expected = edit.change(states).norm(dim=1) / states.norm(dim=1)
    found = read_arm(tiny_llama, ids, arm_of(tiny_llama, edit)).edit_norm
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_a_scatter_shows_source_target_and_mapped_states(tiny_llama: LanguageModel) -> None:
    mapped = profiles(tiny_llama)[2]
    prompts = [Prompt(text, i % 2 == 0) for i, text in enumerate(PROMPTS)]
    (found,) = read_scatters(tiny_llama, Arm(mapped, 1.0), prompts)
    assert found.source.shape == found.target.shape == found.mapped.shape == (2, 2)
    both = torch.cat([found.source, found.target])
    assert 0 < float(found.explained[1]) <= float(found.explained[0]) <= 1
    # Their ratio is that of the variances that are drawn.
    variances = both.var(dim=0)
    torch.testing.assert_close(
        found.explained[1] / found.explained[0], variances[1] / variances[0], check_dtype=False
    )
    ids = [tiny_llama.encode_prompt(p.text) for p in prompts if p.harmful]
    site = mapped.edits[0].site
    states = gather_activations(tiny_llama, ids, [site])[site]
    moved = mapped.edits[0].change(states)
    # Distances in the plane are at most those in the whole space.
    assert ((found.mapped - found.source).norm(dim=1) <= moved.norm(dim=1) + 1e-4).all()
    assert not torch.equal(found.source, found.mapped)
