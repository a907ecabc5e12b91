"""LEACE: erase what a linear classifier could tell harmful from benign prompts by.

    x' = x - W^+ P W (x - mu)

at one block (Belrose et al., arXiv 2306.03819; the map is in `steering.erasure`). Of all affine
maps that make the classes' means equal it changes the states least. A model that cannot tell
harmful prompts from benign ones treats both alike, which on most models means that it answers: a
red-team profile.

Not covered: the paper's concept scrubbing, which erases at every block, each fitted on states
already erased before. After one block, later ones may find the concept again in other tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import ClassVar

from steering.contrast import Contrast, contrast_sides, state_moments
from steering.edit import Phase, Site
from steering.erasure import fit_eraser
from steering.hyper_parameters import check_hyper_parameters
from steering.methods import FitData, Fitted
from steering.search import Option, Search, candidate_blocks


@dataclass(frozen=True)
class Leace:
    """LEACE with a search over block, phase and strength.

    Args:
        contrast: the classes that are erased; see `steering.contrast.Contrast`.
        blocks: to try, one at a time; if None, `candidates` of those in `depth`.
        depth: range to choose from, as shares of the depth.
        strengths: to try; 1 is full erasure.
        phases: tokens that are edited, to try.
        skip_first_token: leave the row's first token, the attention sink, alone.
        shrinkages: of the states' covariance, to try. The classes are erased whatever it is; the
            closer to 1, the less the map amplifies directions in which last prompt tokens hardly
            vary, but others may. 1 is the orthogonal projection along the difference of means.
        prompts_per_kind: fit prompts of each label and kind.
        screened_per_kind, judged_per_kind: selection prompts, see `Search`.
    """

    contrast: Contrast = "labels"
    blocks: tuple[int, ...] | None = None
    depth: tuple[float, float] = (0.3, 0.8)
    candidates: int = 4
    strengths: tuple[float, ...] = (1.0,)
    phases: tuple[Phase, ...] = ("all", "prompt")
    skip_first_token: bool = True
    shrinkages: tuple[float, ...] = (0.0, 0.1, 0.5)
    prompts_per_kind: int = 400
    screened_per_kind: int = 16
    judged_per_kind: int = 64

    name: ClassVar[str] = "leace"
    summary: ClassVar[str] = (
        "Erases, by the least change, what a linear classifier could tell harmful from benign "
        "prompts by (LEACE)."
    )
    red_team: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_hyper_parameters(self, "strengths", "phases", "shrinkages")
        if not all(0 <= shrinkage <= 1 for shrinkage in self.shrinkages):
            raise ValueError(f"shrinkages are shares from 0 to 1; got {self.shrinkages}")

    def fit(self, data: FitData) -> Fitted:
        """Fit the edit. Raises ValueError if a class has no prompts or the two do not differ."""
        blocks = candidate_blocks(
            len(data.lm.sites.blocks), self.blocks, *self.depth, self.candidates
        )
        sites = [Site(block, "resid_post") for block in blocks]
        sides = contrast_sides(data, self.contrast, self.prompts_per_kind)
        refused, answered = (
            state_moments(data, prompts, sites) for prompts in (sides.refused, sides.answered)
        )
        erasers = {
            (site, shrinkage): fit_eraser((refused[site], answered[site]), shrinkage)
            for site, shrinkage in product(sites, self.shrinkages)
        }
        options = [
            Option(
                {
                    "block": site.layer,
                    "phase": phase,
                    "shrinkage": shrinkage,
                    "strength": strength,
                },
                (erasers[site, shrinkage].edit(site, phase, self.skip_first_token),),
                strength,
            )
            for strength, shrinkage, phase, site in product(
                sorted(self.strengths), self.shrinkages, self.phases, sites
            )
        ]
        search = Search(self.screened_per_kind, self.judged_per_kind)
        best, tried = search.choose(self.name, data, options, "answer")
        return Fitted(
            edits=best.edits,
            strength=best.strength,
            diagnostics={
                **best.settings,
                "rank": best.edits[0].rank,
                "prompts": {"refused": len(sides.refused), "answered": len(sides.answered)},
                "search": tried,
            },
        )


METHOD = Leace
