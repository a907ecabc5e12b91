"""Activation addition: a fixed vector, the difference of two means, added to the residual stream.

    x' = x + s r,    r = mean(h | refused side) - mean(h | answered side)

at the output of one block, at every token or those of the prompt (Turner et al., arXiv 2308.10248;
Rimsky et al., arXiv 2312.06681; the sides are those of `steering.contrast`). With the sign turned
it leads away from refusal: `towards="answer"` gives a red-team profile.

The baseline of conditional methods: what is added does not depend on the prompt, so benign prompts
are moved as far as harmful ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor

from steering.contrast import CONTRASTS, Contrast, check_apart, contrast_sides, mean_differences
from steering.edit import Edit, Phase, Site
from steering.hyper_parameters import check_hyper_parameters
from steering.methods import FitData, Fitted
from steering.search import Aim, Option, Search, candidate_blocks


def addition(
    direction: Tensor, site: Site, phase: Phase = "all", skip_first_token: bool = False
) -> Edit:
    """`x' = x + s r` for a direction `r` `[d]`."""
    nothing = torch.zeros(len(direction), 0)
    return Edit(site, nothing, nothing, direction, phase=phase, skip_first_token=skip_first_token)


@dataclass(frozen=True)
class ActivationAddition:
    """Activation addition with a search over block, contrast and strength.

    Args:
        towards: `refusal`, or `answer`, which turns the sign.
        contrasts: what the difference is taken between; see `steering.contrast.Contrast`.
        blocks: to try, one at a time; if None, `candidates` of those in `depth`.
        depth: range to choose from, as shares of the depth.
        strengths: to try, above 0, multiples of the difference; `towards` turns its sign.
        phases: tokens that are moved, to try. What tells refused prompts apart at their last token
            may hold the reply's first word, which a small model then says again and again if every
            token is moved.
        skip_first_token: leave the row's first token, the attention sink, alone.
        prompts_per_kind: fit prompts of each label and kind.
        screened_per_kind, judged_per_kind: selection prompts, see `Search`.
    """

    towards: Aim = "refusal"
    contrasts: tuple[Contrast, ...] = ("labels",)
    blocks: tuple[int, ...] | None = None
    depth: tuple[float, float] = (0.3, 0.8)
    candidates: int = 4
    strengths: tuple[float, ...] = (0.25, 0.5, 1.0)
    phases: tuple[Phase, ...] = ("prompt", "all")
    skip_first_token: bool = True
    prompts_per_kind: int = 128
    screened_per_kind: int = 16
    judged_per_kind: int = 64

    name: ClassVar[str] = "activation_addition"
    summary: ClassVar[str] = (
        "Adds the difference between harmful and benign prompts' mean states to its tokens, "
        "whatever the prompt (activation addition)."
    )
    red_team: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_hyper_parameters(self, "contrasts", "strengths", "phases")
        if self.towards not in get_args(Aim):
            raise ValueError(f"towards is refusal or answer; got {self.towards!r}")
        if not set(self.contrasts) <= set(CONTRASTS):
            raise ValueError(f"contrasts are of {', '.join(CONTRASTS)}; got {self.contrasts}")

    def fit(self, data: FitData) -> Fitted:
        """Fit the edit. Raises ValueError if a side of a contrast has no prompts."""
        blocks = candidate_blocks(
            len(data.lm.sites.blocks), self.blocks, *self.depth, self.candidates
        )
        sites = [Site(block, "resid_post") for block in blocks]
        sign = 1.0 if self.towards == "refusal" else -1.0
        directions: dict[tuple[Contrast, Site], Tensor] = {}
        counts: dict[str, Any] = {}
        for contrast in self.contrasts:
            sides = contrast_sides(data, contrast, self.prompts_per_kind)
            counts[contrast] = {"refused": len(sides.refused), "answered": len(sides.answered)}
            for site, found in mean_differences(data, sides, sites).items():
                check_apart(found, site)
                directions[contrast, site] = sign * found
        options = [
            Option(
                {
                    "block": site.layer,
                    "contrast": contrast,
                    "phase": phase,
                    "strength": strength,
                },
                (addition(directions[contrast, site], site, phase, self.skip_first_token),),
                strength,
            )
            for strength, phase, contrast, site in product(
                sorted(self.strengths), self.phases, self.contrasts, sites
            )
        ]
        search = Search(self.screened_per_kind, self.judged_per_kind)
        best, tried = search.choose(self.name, data, options, self.towards)
        return Fitted(
            edits=best.edits,
            strength=best.strength,
            diagnostics={
                **best.settings,
                "towards": self.towards,
                "direction_norm": float(best.edits[0].shift.norm()),
                "prompts": counts,
                "search": tried,
            },
            red_team=self.towards == "answer",
        )


METHOD = ActivationAddition
