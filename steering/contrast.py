"""Contrasts: which prompts' states a direction leads from and to, and their means.

The baselines differ in what they make of two sets of states, not in how the sets come about.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from steering.edit import Site
from steering.judge import Outcome
from steering.methods import FitData
from steering.moments import Moments
from steering.plan import Pool, last_token
from steering.prompts import Prompt
from steering.selection import sample

Contrast = Literal["labels", "filtered", "outcomes"]
"""`labels`: harmful against benign prompts. `filtered`: harmful ones that the model refuses against
benign ones that it answers (Arditi et al.). `outcomes`: harmful prompts that it refuses against
harmful prompts that it answers (AlphaSteer's `r`)."""

CONTRASTS: tuple[Contrast, ...] = get_args(Contrast)


@dataclass(frozen=True)
class Sides:
    """Fit prompts by side.

    Args:
        refused: what the direction leads to: harmful or refused prompts.
        answered: what it leads from.
    """

    refused: Sequence[Prompt]
    answered: Sequence[Prompt]


def contrast_sides(data: FitData, contrast: Contrast, per_kind: int) -> Sides:
    """At most `per_kind` fit prompts of each label and kind, sorted by a contrast.

    Only contrasts that need it let the model answer. Raises ValueError, naming the contrast to
    use instead, where a side would be empty.
    """
    if contrast not in CONTRASTS:
        raise ValueError(f"contrast is one of {', '.join(CONTRASTS)}; got {contrast!r}")
    if not data.fit.harmful or not data.fit.benign:
        raise ValueError("a contrast needs harmful and benign fit prompts; one kind is missing")
    prompts = sample(data.fit.prompts, per_kind, data.seed)
    if contrast == "labels":
        return Sides([p for p in prompts if p.harmful], [p for p in prompts if not p.harmful])
    if contrast == "outcomes":
        prompts = [p for p in prompts if p.harmful]
    data.report(f"judging replies to {len(prompts)} fit prompts")
    try:
        return sides_by_outcome(prompts, data.outcomes(prompts), contrast)
    except ValueError as error:
        raise ValueError(f"{error}, or use another contrast: labels needs no replies") from None


def sides_by_outcome(
    prompts: Sequence[Prompt], outcomes: Sequence[Outcome], contrast: Contrast
) -> Sides:
    """The sides of a contrast that needs outcomes, those of the unedited model's replies.

    Raises ValueError, saying what is missing, where a side would be empty.
    """
    judged = list(zip(prompts, outcomes, strict=True))

    def side(outcome: Outcome, harmful: bool, verb: str) -> list[Prompt]:
        found = [p for p, o in judged if p.harmful == harmful and o == outcome]
        if not found:
            raise ValueError(
                f"the contrast {contrast!r} needs {'harmful' if harmful else 'benign'} fit prompts "
                f"that the model {verb}, and there are none: add some"
            )
        return found

    return Sides(
        side("refusal", True, "refuses"), side("answer", contrast == "outcomes", "answers")
    )


def mean_states(
    data: FitData, prompts: Sequence[Prompt], sites: Collection[Site], pool: Pool = last_token
) -> dict[Site, Tensor]:
    """Mean of the pooled states over prompts, by site, `[...]` float64: only a sum is kept."""
    totals: dict[Site, Tensor] = {}
    for batch in data.states(prompts, sites, pool=pool):
        for site, rows in batch.states.items():
            total = rows.to("cpu", torch.float64).sum(0)
            totals[site] = totals[site] + total if site in totals else total
    means = {site: totals[site] / len(prompts) for site in sites}
    if not all(torch.isfinite(mean).all() for mean in means.values()):
        raise ValueError("the model's states are not finite; try a wider dtype")
    return means


def mean_differences(
    data: FitData, sides: Sides, sites: Collection[Site], pool: Pool = last_token
) -> dict[Site, Tensor]:
    """`r = mean(refused) - mean(answered)` of the pooled states, by site, float64."""
    refused, answered = (
        mean_states(data, prompts, sites, pool) for prompts in (sides.refused, sides.answered)
    )
    return {site: refused[site] - answered[site] for site in sites}


def state_moments(
    data: FitData, prompts: Sequence[Prompt], sites: Collection[Site], pool: Pool = last_token
) -> dict[Site, Moments]:
    """Count, sum and second moment of the pooled states `[d]`, by site."""
    found = {site: Moments(data.lm.sites.hidden_size) for site in sites}
    for batch in data.states(prompts, sites, pool=pool):
        for site, rows in batch.states.items():
            found[site].update(rows)
    return found


def unit(vector: Tensor, site: Site) -> Tensor:
    """`v / ||v||`. Raises ValueError where the sides do not differ."""
    check_apart(vector, site)
    return vector / float(vector.norm())


def check_apart(difference: Tensor, site: Site) -> None:
    """Raise ValueError where the sides do not differ: there is no direction between them."""
    if not float(difference.norm()) > 1e-12:
        raise ValueError(
            f"the two sides of the contrast do not differ at {site}: edit later blocks, and see "
            "that the prompts of the two labels differ"
        )
