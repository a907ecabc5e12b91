from __future__ import annotations

import pytest
import torch
from torch import Tensor

from steering.edit import AppliedEdit, Edit
from steering.methods import FitData
from steering.methods.cast import Cast
from steering.models import LanguageModel
from steering.plan import BatchPlan, RowEdits, Steering, sites_of
from steering.prompts import Prompt, PromptSet
from tests.conftest import make_model
from tests.steering.methods.synthetic import Scripted, fit_data


@torch.inference_mode()
def gates(lm: LanguageModel, edit: Edit, prompts: list[Prompt]) -> list[float]:
    """Gate values as a serving plan latches them, all prompts in one padded call."""
    encoded = [lm.encode_prompt(prompt.text) for prompt in prompts]
    lengths = [len(ids) for ids in encoded]
    ids = torch.zeros(len(encoded), max(lengths), dtype=torch.long)
    for i, row in enumerate(encoded):
        ids[i, : len(row)] = torch.tensor(row)
    rows = [RowEdits([AppliedEdit(edit)], n) for n in lengths]
    with Steering(lm.sites) as steering:
        steering.attach(sites_of([edit]))
        plan = BatchPlan(rows, hidden_size=lm.sites.hidden_size)
        with steering.step(plan, [0] * len(rows), lengths):
            lm.model(ids)
    return [float(row.latched[0]) for row in rows]


@torch.inference_mode()
def prompt_means(lm: LanguageModel, layer: int, prompts: list[Prompt]) -> Tensor:
    """Oracle: mean over tokens of a block's output, by a hook of its own on one prompt a call.

    Not `output_hidden_states`: transformers leaves its hooks on the model.
    """
    seen: list[Tensor] = []
    block = lm.model.model.layers[layer]
    handle = block.register_forward_hook(lambda _module, _args, output: seen.append(output))
    for prompt in prompts:
        lm.model(torch.tensor([lm.encode_prompt(prompt.text)]))
    handle.remove()
    return torch.stack([states[0].double().mean(0) for states in seen])


def data() -> FitData:
    return fit_data(make_model("llama"), Scripted())


@pytest.mark.parametrize("form", ["pca", "difference"])
def test_the_gate_opens_exactly_for_prompts_on_the_condition_s_side(form: str) -> None:
    found = data()
    fitted = Cast(conditions=(form,), condition_blocks=(1,), blocks=(2,)).fit(found)  # type: ignore[arg-type]
    (edit,) = fitted.edits
    gate = edit.gate
    assert gate is not None and gate.reduce == "prompt_mean" and gate.site.layer == 1
    prompts = list(found.selection.prompts)
    projections = prompt_means(found.lm, 1, prompts) @ gate.direction.double()
    above = projections > gate.threshold
    opened = above if gate.comparator == ">" else ~above
    assert 0 < int(opened.sum()) < len(prompts)
    assert gates(found.lm, edit, prompts) == opened.double().tolist()


def test_the_condition_tells_the_labels_apart_and_its_f1_is_that_of_the_gate() -> None:
    found = data()
    fitted = Cast().fit(found)
    prompts = list(found.selection.prompts)
    opened = gates(found.lm, fitted.edits[0], prompts)
    hits = sum(o == 1 and p.harmful for o, p in zip(opened, prompts, strict=True))
    f1 = 2 * hits / (sum(opened) + sum(p.harmful for p in prompts))
    condition = fitted.diagnostics["condition"]
    assert condition["f1"] == pytest.approx(f1)
    assert f1 == max(c["f1"] for c in fitted.diagnostics["conditions"])
    assert {c["form"] for c in fitted.diagnostics["conditions"]} == {"pca", "difference"}


def test_the_vector_is_added_at_or_after_the_condition_s_block() -> None:
    (edit,) = Cast(condition_blocks=(2,), blocks=(1, 2, 3)).fit(data()).edits
    assert edit.gate is not None
    assert edit.site.layer >= 2 and edit.rank == 0 and edit.has_shift
    with pytest.raises(ValueError, match="lies at or after the condition's"):
        Cast(condition_blocks=(2,), blocks=(1,)).fit(data())


def test_thresholds_are_chosen_on_the_selection_prompts() -> None:
    found = data()
    other = FitData(
        found.lm,
        found.fit,
        PromptSet(found.selection.prompts[: len(found.selection.prompts) // 2]),
        generator=found.generator,
        judge=found.judge,
    )
    one, two = (Cast(condition_blocks=(1,)).fit(d).edits[0].gate for d in (found, other))
    assert one is not None and two is not None
    assert one.threshold != two.threshold


def test_settings_that_make_no_sense_are_refused() -> None:
    for settings, message in (
        ({"conditions": "cosine"}, "conditions are of pca, difference"),
        ({"strengths": ()}, "strengths needs at least one value"),
        ({"strengths": (-1.0,)}, "strengths are above 0"),
        ({"phases": "late"}, "phases are of prompt, generation, all"),
    ):
        with pytest.raises(ValueError, match=message):
            Cast(**settings)  # type: ignore[arg-type]
