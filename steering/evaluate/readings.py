"""What the edits do inside: how much they change, what their gates read, where they move states.

Read at the last prompt token, in one pass over the prompts for each profile.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from steering.activations import batches_by_length, gather_activations
from steering.edit import AppliedEdit, Edit, Gate, Site
from steering.evaluate.arms import Arm
from steering.linalg import principal_components
from steering.models import LanguageModel
from steering.moments import Moments
from steering.plan import BatchPlan, RowEdits, Steering, sites_of
from steering.prompts import Prompt

BATCH_TOKENS = 4096
BINS = 40
"""Of a gate's histogram."""
POINTS = 250
"""Of each cloud of a scatter, at most: the first ones."""


@dataclass(frozen=True)
class Readings:
    """Of one arm on N prompts.

    Args:
        edit_norm: `[N]`, the change over the state's norm, the largest over the sites.
        gates: `[N]` by gate, in the order of the edits: the projections before any threshold.
        states: `[N, d]` by site, after the edits there.
    """

    edit_norm: Tensor
    gates: tuple[tuple[Gate, Tensor], ...]
    states: dict[Site, Tensor]


@torch.inference_mode()
def read_arm(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    arm: Arm,
    *,
    sites: Collection[Site] = (),
    on_done: Callable[[int], object] | None = None,
) -> Readings:
    """Run prompts (token ids) through the edited model.

    Args:
        sites: whose states are wanted.
    """
    gates = [applied.edit.gate for applied in arm.edits if applied.edit.gate is not None]
    edits = [*arm.edits, *(_probe(gate) for gate in gates)]
    norms = torch.zeros(len(prompts))
    values = torch.zeros(len(gates), len(prompts))
    states = {site: torch.empty(len(prompts), lm.sites.hidden_size) for site in sites}
    lengths = [len(ids) for ids in prompts]
    with Steering(lm.sites) as steering:
        steering.attach({*sites, *sites_of(applied.edit for applied in edits)})
        for indices in batches_by_length(lengths, BATCH_TOKENS):
            ids = torch.zeros(len(indices), max(lengths[i] for i in indices), dtype=torch.long)
            for row, i in enumerate(indices):
                ids[row, : lengths[i]] = torch.tensor(prompts[i])
            rows = [RowEdits(edits, lengths[i]) for i in indices]
            plan = BatchPlan(rows, hidden_size=lm.sites.hidden_size, device=lm.device)
            starts, ends = [0] * len(rows), [lengths[i] for i in indices]
            with steering.step(plan, starts, ends, capture=sites, measure=True) as step:
                lm.model(ids.to(lm.device), use_cache=False, logits_to_keep=1)
            assert step.edit_norm is not None
            norms[indices] = step.edit_norm.cpu()
            for site, found in step.captured.items():
                states[site][indices] = found.cpu()
            for i, latched in zip(indices, (row.latched for row in rows), strict=True):
                for k in range(len(gates)):
                    values[k, i] = latched[len(arm.edits) + k].cpu()
            if on_done is not None:
                on_done(len(indices))
    return Readings(norms, tuple(zip(gates, values, strict=True)), states)


def _probe(gate: Gate) -> AppliedEdit:
    """An edit that changes nothing, whose gate latches what `gate` reads at the prompt's end.

    Gates are read before the edits of their site, so it sees exactly what the real one sees.
    """
    d = len(gate.direction)
    reduce = "last_prompt_token" if gate.reduce == "token" else gate.reduce
    linear = replace(gate, reduce=reduce, comparator="linear")
    nothing = torch.zeros(d, 1)
    return AppliedEdit(Edit(gate.site, nothing, nothing, torch.zeros(d), gate=linear))


@dataclass(frozen=True)
class Scatter:
    """States at a site in the plane of their two first principal components.

    Args:
        source, target: `[N, 2]`, harmful and benign prompts, unedited.
        mapped: `[N, 2]`, the harmful ones under the profile.
        explained: `[2]`, the components' shares of the variance of source and target together.
    """

    site: Site
    source: Tensor
    target: Tensor
    mapped: Tensor
    explained: Tensor


def read_scatters(
    lm: LanguageModel,
    arm: Arm,
    prompts: Sequence[Prompt],
    on_done: Callable[[int], object] | None = None,
) -> list[Scatter]:
    """Where a profile of optimal transport takes states, at each site that it edits.

    Only prompts of the kinds it was fitted on are shown, if there are any of both labels.
    """
    kinds = (arm.profile.provenance.get("hyper_parameters") or {}).get("kinds") or ()
    fitted_on = [p for p in prompts if (p.kind or ("harmful" if p.harmful else "benign")) in kinds]
    if {prompt.harmful for prompt in fitted_on} == {True, False}:
        prompts = fitted_on
    sites = sorted({applied.edit.site for applied in arm.edits}, key=lambda site: site.order)
    ids = {h: [lm.encode_prompt(p.text) for p in prompts if p.harmful == h] for h in (True, False)}
    if not (ids[True] and ids[False]):
        return []
    source, target = (gather_activations(lm, ids[h], sites, on_done=on_done) for h in (True, False))
    mapped = read_arm(lm, ids[True], arm, sites=sites, on_done=on_done).states
    found = []
    for site in sites:
        moments = Moments(lm.sites.hidden_size)
        for states in (source[site], target[site]):
            moments.update(states)
        covariance, mean = moments.covariance(), moments.mean
        basis = principal_components(covariance, 2)
        a, b, c = ((x[site].double() - mean) @ basis for x in (source, target, mapped))
        explained = (basis.T @ covariance @ basis).diagonal() / covariance.trace()
        found.append(Scatter(site, a, b, c, explained))
    return found


def figures_inside(
    lm: LanguageModel,
    arm: Arm,
    prompts: Sequence[Prompt],
    on_done: Callable[[int], object] | None = None,
) -> dict[str, Any]:
    """What the arm's edits do to the states of these prompts."""
    ids = [lm.encode_prompt(prompt.text) for prompt in prompts]
    readings = read_arm(lm, ids, arm, on_done=on_done)
    harmful = torch.tensor([prompt.harmful for prompt in prompts])
    scatters = []
    if arm.profile.method == "optimal_transport":
        scatters = read_scatters(lm, arm, prompts, on_done)
    return {
        "edit_norm": {
            "mean": float(readings.edit_norm.mean()),
            **{
                label: float(readings.edit_norm[chosen].mean())
                for label, chosen in (("harmful", harmful), ("benign", ~harmful))
                if chosen.any()
            },
        },
        "gates": [_gate(gate, values, harmful) for gate, values in readings.gates],
        "scatters": [_scatter(scatter) for scatter in scatters],
    }


def _gate(gate: Gate, values: Tensor, harmful: Tensor) -> dict[str, Any]:
    """Histogram of what a gate reads, and how well that tells the labels apart."""
    edges = torch.histogram(values, BINS).bin_edges
    by_label = {"harmful": values[harmful], "benign": values[~harmful]}
    return {
        "site": str(gate.site),
        "reduce": gate.reduce,
        "comparator": gate.comparator,
        "threshold": None if gate.comparator == "linear" else gate.threshold,
        "edges": [round(edge, 6) for edge in edges.tolist()],
        "counts": {
            label: torch.histogram(found, edges).hist.int().tolist()
            for label, found in by_label.items()
        },
        "mean": {label: float(found.mean()) for label, found in by_label.items() if len(found)},
        "auc": float(roc_auc_score(harmful.numpy(), values.numpy()))
        if all(len(found) for found in by_label.values())
        else None,
    }


def _scatter(scatter: Scatter) -> dict[str, Any]:
    def points(cloud: Tensor) -> list[list[float]]:
        return [[round(x, 4) for x in row] for row in cloud[:POINTS].tolist()]

    return {
        "site": str(scatter.site),
        "source": points(scatter.source),
        "target": points(scatter.target),
        "mapped": points(scatter.mapped),
        "explained": [round(share, 4) for share in scatter.explained.tolist()],
    }
