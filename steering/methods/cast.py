"""CAST, conditional activation steering: add a refusal vector where a condition holds.

    x' = x + s g r,    g = 1 if c . mean_prompt(h) > t  (or <), else 0

(Lee et al., arXiv 2409.05907.) The condition direction `c`, its block, the threshold `t` and the
comparator are chosen by F1 of telling harmful prompts from benign ones; the behaviour vector `r` is
added at a later block, to the prompt's tokens and, as in the paper, the reply's or to the prompt's
alone.

Where this differs from the released code: the condition is the projection on `c`, not the cosine of
the state and its (squashed) projection, since a gate is linear in the state; `r` is the difference
between refused and answered prompts rather than between pairs of written completions; and the
threshold grid is every cut between two selection prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import ClassVar, get_args

import torch
from torch import Tensor

from steering.activations import prompt_mean
from steering.condition import Condition, ConditionForm, best_threshold, condition_direction
from steering.contrast import Contrast, contrast_sides, mean_differences, state_moments
from steering.edit import Phase, Site
from steering.hyper_parameters import check_hyper_parameters
from steering.methods import FitData, Fitted
from steering.methods.activation_addition import addition
from steering.search import Option, Search, candidate_blocks


@dataclass(frozen=True)
class Cast:
    """CAST with a search over the condition, then over behaviour block and strength.

    Args:
        condition_blocks: to read the condition at; if None, `candidates` of those in
            `condition_depth`.
        condition_depth: range to choose from, as shares of the depth.
        conditions: directions to try: `pca` (paper), `difference` of means.
        blocks: to add the vector at, one at a time, not before the condition; if None,
            `candidates` of those in `depth`.
        depth: range to choose from.
        candidates: blocks to try of each range.
        contrast: what `r` is taken between; see `steering.contrast.Contrast`.
        strengths: to try, multiples of the difference.
        phases: tokens that are moved, to try; see `ActivationAddition`.
        skip_first_token: leave the row's first token, the attention sink, alone.
        prompts_per_kind: fit prompts of each label and kind.
        screened_per_kind, judged_per_kind: selection prompts, see `Search`. The threshold is
            chosen on all selection prompts, which costs no generation.
    """

    condition_blocks: tuple[int, ...] | None = None
    condition_depth: tuple[float, float] = (0.1, 0.6)
    conditions: tuple[ConditionForm, ...] = ("pca", "difference")
    blocks: tuple[int, ...] | None = None
    depth: tuple[float, float] = (0.3, 0.8)
    candidates: int = 4
    contrast: Contrast = "outcomes"
    strengths: tuple[float, ...] = (0.25, 0.5, 1.0)
    phases: tuple[Phase, ...] = ("prompt", "all")
    skip_first_token: bool = True
    prompts_per_kind: int = 128
    screened_per_kind: int = 16
    judged_per_kind: int = 64

    name: ClassVar[str] = "cast"
    summary: ClassVar[str] = (
        "Adds a refusal vector to prompts whose mean state lies on the harmful side of a threshold "
        "(conditional activation steering)."
    )
    red_team: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_hyper_parameters(self, "conditions", "strengths", "phases")
        if not set(self.conditions) <= set(get_args(ConditionForm)):
            raise ValueError(f"conditions are of {', '.join(get_args(ConditionForm))}")

    def fit(self, data: FitData) -> Fitted:
        """Fit condition and vector.

        Raises ValueError if a side of the contrast has no prompts, or no block to add the vector
        at lies at or after the condition's.
        """
        tried = self._conditions(data)
        best_condition = max(tried, key=lambda condition: condition.f1)  # the first of equals
        data.report(
            f"{self.name}: condition {best_condition.form} at {best_condition.site}, "
            f"F1 {best_condition.f1:.3f}"
        )
        blocks = candidate_blocks(
            len(data.lm.sites.blocks), self.blocks, *self.depth, self.candidates
        )
        sites = [Site(b, "resid_post") for b in blocks if b >= best_condition.site.layer]
        if not sites:
            raise ValueError(
                f"no block of {blocks} lies at or after the condition's, "
                f"{best_condition.site.layer}; give later blocks or earlier condition_blocks"
            )
        sides = contrast_sides(data, self.contrast, self.prompts_per_kind)
        vectors = mean_differences(data, sides, sites)
        gate = best_condition.gate()
        options = [
            Option(
                {"block": site.layer, "phase": phase, "strength": strength},
                (replace(addition(vectors[site], site, phase, self.skip_first_token), gate=gate),),
                strength,
            )
            for strength, phase, site in product(sorted(self.strengths), self.phases, sites)
        ]
        search = Search(self.screened_per_kind, self.judged_per_kind)
        best, figures = search.choose(self.name, data, options, "refusal")
        return Fitted(
            edits=best.edits,
            strength=best.strength,
            diagnostics={
                **best.settings,
                "condition": _to_json(best_condition),
                "conditions": [_to_json(condition) for condition in tried],
                "prompts": {"refused": len(sides.refused), "answered": len(sides.answered)},
                "search": figures,
            },
        )

    def _conditions(self, data: FitData) -> Sequence[Condition]:
        """The best condition of every block and form: directions from the fit prompts, thresholds
        from the selection prompts, one pass over each."""
        blocks = candidate_blocks(
            len(data.lm.sites.blocks),
            self.condition_blocks,
            *self.condition_depth,
            self.candidates,
        )
        sites = [Site(block, "resid_post") for block in blocks]
        sides = contrast_sides(data, "labels", self.prompts_per_kind)
        harmful, benign = (
            state_moments(data, prompts, sites, prompt_mean)
            for prompts in (sides.refused, sides.answered)
        )
        directions = {
            (site, form): condition_direction(harmful[site], benign[site], form, site)
            for site, form in product(sites, self.conditions)
        }
        projections = _projections(data, directions)
        wanted = torch.tensor([prompt.harmful for prompt in data.selection.prompts])
        return [
            Condition(site, form, directions[site, form], *best_threshold(values, wanted))
            for (site, form), values in projections.items()
        ]


def _projections(
    data: FitData, directions: Mapping[tuple[Site, ConditionForm], Tensor]
) -> dict[tuple[Site, ConditionForm], Tensor]:
    """`c . mean_prompt(h)` of the selection prompts `[N]`, by site and form."""
    prompts = data.selection.prompts
    found = {key: torch.zeros(len(prompts), dtype=torch.float64) for key in directions}
    for batch in data.states(prompts, {site for site, _ in directions}, pool=prompt_mean):
        for (site, form), direction in directions.items():
            rows = batch.states[site].to("cpu", torch.float64)
            found[site, form][batch.indices] = rows @ direction
    return found


def _to_json(condition: Condition) -> dict[str, object]:
    return {
        "block": condition.site.layer,
        "form": condition.form,
        "threshold": condition.threshold,
        "comparator": condition.comparator,
        "f1": condition.f1,
    }


METHOD = Cast
