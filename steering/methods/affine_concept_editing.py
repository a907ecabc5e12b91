"""Affine concept editing (ACE): set the refusal component of every state to a chosen value.

    x' = x - r^ r^^T x + r^ r^^T mu_ref + alpha r,    r = mu_refused - mu_ref,  r^ = r / ||r||

at one block, every token (Marshall et al., arXiv 2411.09003). Directional ablation is the
special case that takes 0 for the value that means "no refusal", which it is not where the states'
mean is far from 0; ACE takes the mean `mu_ref` of answered prompts. `alpha = 0` so gives states
that look answered along `r`, `alpha = 1` states that look refused, whatever the prompt was.

What it cannot do: tell prompts apart. Whatever it does to harmful ones it does to benign ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import ClassVar, get_args

from torch import Tensor

from steering.contrast import Contrast, contrast_sides, mean_states, unit
from steering.edit import Edit, Phase, Site
from steering.hyper_parameters import check_hyper_parameters
from steering.methods import FitData, Fitted
from steering.search import Aim, Option, Search, candidate_blocks


def affine_edit(
    refused: Tensor,
    reference: Tensor,
    alpha: float,
    site: Site,
    phase: Phase = "all",
    skip_first_token: bool = False,
) -> Edit:
    """`x' = x - r^ (r^^T x) + (r^^T mu_ref) r^ + alpha r` at strength 1.

    Afterwards `r^^T x' = r^^T mu_ref + alpha ||r||` for every `x`, and nothing orthogonal to `r`
    has changed.

    Args:
        refused, reference: mean states `[d]`, float64.
    """
    difference = refused - reference
    direction = unit(difference, site)
    return Edit(
        site,
        direction[:, None],
        -direction[:, None],
        (direction @ reference) * direction + alpha * difference,
        phase=phase,
        skip_first_token=skip_first_token,
    )


@dataclass(frozen=True)
class AffineConceptEditing:
    """ACE with a search over block and alpha.

    Args:
        towards: `answer` (alphas of 0 and below: a red-team profile) or `refusal`.
        alphas: to try; by default 0 and -0.5 towards answers, 0.5 and 1 towards refusal.
        contrast: what `r` is taken between; see `steering.contrast.Contrast`.
        blocks: to try, one at a time; if None, `candidates` of those in `depth`.
        depth: range to choose from, as shares of the depth.
        phases: tokens that are edited, to try.
        skip_first_token: leave the row's first token, the attention sink, alone.
        prompts_per_kind: fit prompts of each label and kind.
        screened_per_kind, judged_per_kind: selection prompts, see `Search`.
    """

    towards: Aim = "answer"
    alphas: tuple[float, ...] | None = None
    contrast: Contrast = "labels"
    blocks: tuple[int, ...] | None = None
    depth: tuple[float, float] = (0.3, 0.8)
    candidates: int = 4
    phases: tuple[Phase, ...] = ("all", "prompt")
    skip_first_token: bool = True
    prompts_per_kind: int = 128
    screened_per_kind: int = 16
    judged_per_kind: int = 64

    name: ClassVar[str] = "affine_concept_editing"
    summary: ClassVar[str] = (
        "Sets the refusal component of every state to that of answered prompts, or of refused "
        "ones, whatever the prompt (ACE)."
    )
    red_team: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.towards not in get_args(Aim):
            raise ValueError(f"towards is refusal or answer; got {self.towards!r}")
        if self.alphas is None:
            # Resolved here, so that the hyper-parameters in a profile say what was tried.
            default = (0.0, -0.5) if self.towards == "answer" else (0.5, 1.0)
            object.__setattr__(self, "alphas", default)
        check_hyper_parameters(self, "alphas", "phases")

    def fit(self, data: FitData) -> Fitted:
        """Fit the edit. Raises ValueError if a side of the contrast has no prompts."""
        assert self.alphas is not None
        blocks = candidate_blocks(
            len(data.lm.sites.blocks), self.blocks, *self.depth, self.candidates
        )
        sites = [Site(block, "resid_post") for block in blocks]
        sides = contrast_sides(data, self.contrast, self.prompts_per_kind)
        refused, reference = (
            mean_states(data, prompts, sites) for prompts in (sides.refused, sides.answered)
        )
        options = [
            Option(
                {"block": site.layer, "alpha": alpha, "phase": phase},
                (
                    affine_edit(
                        refused[site], reference[site], alpha, site, phase, self.skip_first_token
                    ),
                ),
            )
            # The smallest alpha first: a larger move is not taken for an equal score.
            for alpha, phase, site in product(sorted(self.alphas, key=abs), self.phases, sites)
        ]
        search = Search(self.screened_per_kind, self.judged_per_kind)
        best, tried = search.choose(self.name, data, options, self.towards)
        site = best.edits[0].site
        return Fitted(
            edits=best.edits,
            diagnostics={
                **best.settings,
                "towards": self.towards,
                "direction_norm": float((refused[site] - reference[site]).norm()),
                "prompts": {"refused": len(sides.refused), "answered": len(sides.answered)},
                "search": tried,
            },
            red_team=self.towards == "answer",
        )


METHOD = AffineConceptEditing
