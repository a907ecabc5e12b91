"""Directional ablation: remove the refusal direction wherever it could be written.

    x' = x - r^ r^^T x    at every block's input and every sublayer's output, every token

(Arditi et al., arXiv 2406.11717.) Candidates for `r` are differences of means, one for every block
and post-instruction token (those that the chat template puts after the user's words). One is chosen
as in the paper, on selection prompts and by the logits of the first
reply token alone:

* bypass score: mean refusal score of harmful prompts under ablation, lowest wins;
* induce score: mean refusal score of benign prompts with `r` added at its block, above 0;
* KL divergence between the unedited and the ablated model on benign prompts, below 0.1;
* block below 80 % of the depth.

The refusal score is `log(p + e) - log(1 - p + e)`, with `p` the mass on tokens that open refusals,
learned from the model's own replies. A candidate that breaks fewer of the bounds goes first, so
that there is always a result; the diagnostics say which were broken.

A strength between 0 and 1 is not half an ablation: the edit acts at every site of the network, and
what one leaves the next reduces again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean
from typing import Any, ClassVar

import torch
from torch import Tensor

from steering.activations import LastTokens
from steering.contrast import mean_differences, sides_by_outcome, unit
from steering.edit import AppliedEdit, Edit, Site
from steering.hyper_parameters import check_hyper_parameters
from steering.methods import FitData, Fitted
from steering.methods.activation_addition import addition
from steering.models import LanguageModel
from steering.monitor_fit import Replies, learn_refusal_tokens
from steering.prompts import Prompt
from steering.search import Option, Search
from steering.selection import sample

_EPSILON = 1e-8


def ablation(direction: Tensor, blocks: int) -> tuple[Edit, ...]:
    """`x' = x - r^ r^^T x` at every place of a network that writes to the residual stream.

    Args:
        direction: `r^` `[d]`, a unit vector.
        blocks: of the model.
    """
    read, nothing = direction[:, None], torch.zeros(len(direction))
    return tuple(
        Edit(Site(block, point), read, -read, nothing)
        for block in range(blocks)
        for point in ("resid_pre", "attn_out", "mlp_out")
    )


def refusal_scores(logits: Tensor, tokens: Sequence[int]) -> Tensor:
    """`log(p + e) - log(1 - p + e)` `[N]` of logits `[N, V]`, `p` the mass on `tokens`."""
    p = logits.double().softmax(-1)[:, list(tokens)].sum(-1)
    return (p + _EPSILON).log() - (1 - p).clamp_min(0).add(_EPSILON).log()


def mean_divergence(unedited: Tensor, edited: Tensor) -> float:
    """Mean over rows of `KL(unedited || edited)` of logits `[N, V]`."""
    p, q = (logits.double().log_softmax(-1) for logits in (unedited, edited))
    return float((p.exp() * (p - q)).sum(-1).mean())


def post_instruction_tokens(lm: LanguageModel) -> int:
    """Tokens that the chat template puts after the user's words, at least 1."""
    first, second = (lm.encode_prompt(text)[::-1] for text in ("zebra", "1,5?"))
    same = (a == b for a, b in zip(first, second, strict=False))
    return max(1, next((i for i, equal in enumerate(same) if not equal), len(first)))


@dataclass(frozen=True)
class _Candidate:
    """A direction `r` `[d]`, not normalised, and where it comes from; position -1 is the last."""

    site: Site
    position: int
    direction: Tensor


@dataclass(frozen=True)
class DirectionalAblation:
    """Directional ablation with the selection of its paper.

    Args:
        max_depth: candidates come from blocks below this share of the depth.
        max_positions: post-instruction tokens to take candidates from, the last ones.
        max_divergence: bound on the KL divergence.
        min_induce: bound on the induce score.
        prompts_per_kind: fit prompts of each label and kind; the paper has 128 a label.
        selection_per_kind: selection prompts of each label and kind; the paper has 32 a label.
        judged_per_kind: selection prompts that the result's replies are judged on.
    """

    max_depth: float = 0.8
    max_positions: int = 8
    max_divergence: float = 0.1
    min_induce: float = 0.0
    prompts_per_kind: int = 128
    selection_per_kind: int = 32
    judged_per_kind: int = 32

    name: ClassVar[str] = "directional_ablation"
    summary: ClassVar[str] = (
        "Removes the direction that mediates refusal from everything the network writes; for red "
        "teams only (directional ablation)."
    )
    red_team: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_hyper_parameters(self)
        if not 0 < self.max_depth <= 1:
            raise ValueError(f"max_depth is a share of the depth, above 0; got {self.max_depth}")
        if self.max_positions < 1:
            raise ValueError(f"max_positions is at least 1; got {self.max_positions}")

    def fit(self, data: FitData) -> Fitted:
        """Fit the edits.

        Raises ValueError unless the model refuses some harmful and answers some benign fit
        prompts, in words by which refusals can be told.
        """
        if not data.fit.harmful or not data.fit.benign:
            raise ValueError("directional ablation needs harmful and benign fit prompts")
        prompts = sample(data.fit.prompts, self.prompts_per_kind, data.seed)
        data.report(f"{self.name}: judging replies to {len(prompts)} fit prompts")
        replies = data.replies(prompts)
        outcomes = data.judged(prompts, replies)
        sides = sides_by_outcome(prompts, outcomes, "filtered")
        opening = [reply[0] if reply else None for reply in replies]
        tokens, counts = learn_refusal_tokens(Replies((opening, []), (outcomes, [])))

        depth = len(data.lm.sites.blocks)
        positions = min(self.max_positions, post_instruction_tokens(data.lm))
        sites = [Site(b, "resid_pre") for b in range(depth) if b < self.max_depth * depth]
        means = mean_differences(data, sides, sites, LastTokens(positions))
        candidates = [
            _Candidate(site, k - positions, means[site][k])
            for site in sites
            for k in range(positions)
            # The input of block 0 is the template's own token, whatever the prompt.
            if float(means[site][k].norm()) > 1e-6
        ]
        if not candidates:
            raise ValueError("refused and answered prompts do not differ below max_depth")
        harmful, benign = self._selection(data, tokens)
        tried = self._scores(data, candidates, tokens, harmful, benign)
        best = min(
            range(len(candidates)),
            key=lambda i: (len(tried[i]["broken_bounds"]), tried[i]["bypass"]),
        )
        if tried[best]["broken_bounds"]:
            data.report(
                f"{self.name}: every candidate breaks a bound; the best one breaks "
                + " and ".join(tried[best]["broken_bounds"])
            )
        chosen = candidates[best]
        edits = ablation(unit(chosen.direction, chosen.site), depth)
        _, judged = Search(judged_per_kind=self.judged_per_kind).choose(
            self.name, data, [Option(_place(chosen), edits)], "answer"
        )
        return Fitted(
            edits=edits,
            diagnostics={
                **tried[best],
                "direction_norm": float(chosen.direction.norm()),
                "prompts": {"refused": len(sides.refused), "answered": len(sides.answered)},
                "selection_prompts": {"harmful": len(harmful), "benign": len(benign)},
                "refusal_tokens": {"ids": list(tokens), **counts},
                "candidates": tried,
                **judged,
            },
        )

    def _selection(self, data: FitData, tokens: Sequence[int]) -> tuple[list[Prompt], list[Prompt]]:
        """Harmful selection prompts with a refusal score above 0, benign ones below, as the paper
        filters them; all of a label where that leaves none."""
        prompts = sample(data.selection.prompts, self.selection_per_kind, data.seed)
        found: list[list[Prompt]] = []
        for harmful in (True, False):
            group = [p for p in prompts if p.harmful == harmful]
            if not group:
                raise ValueError("directional ablation needs harmful and benign selection prompts")
            scores = _scores_of(data, group, tokens)
            kept = [p for p, score in zip(group, scores, strict=True) if (score > 0) == harmful]
            found.append(kept or group)
        return found[0], found[1]

    def _scores(
        self,
        data: FitData,
        candidates: Sequence[_Candidate],
        tokens: Sequence[int],
        harmful: Sequence[Prompt],
        benign: Sequence[Prompt],
    ) -> list[dict[str, Any]]:
        """Bypass, induce and KL of every candidate, and which bounds it breaks."""
        depth = len(data.lm.sites.blocks)
        unedited = cache(lambda: data.logits(benign))
        found: list[dict[str, Any]] = []
        for candidate in candidates:
            ablated = _applied(ablation(unit(candidate.direction, candidate.site), depth))
            added = _applied([addition(candidate.direction, candidate.site)])

            def divergence(ablated: Sequence[AppliedEdit] = ablated) -> list[float]:
                return [mean_divergence(unedited(), data.logits(benign, ablated))]

            with data.clock.timed("selecting"):
                figures = {
                    "bypass": fmean(_scores_of(data, harmful, tokens, ablated)),
                    "induce": fmean(_scores_of(data, benign, tokens, added)),
                    "divergence": data.figures(["divergence"], benign, ablated, divergence)[0],
                }
            found.append({**_place(candidate), **figures, "broken_bounds": self._broken(figures)})
            data.report(
                f"{self.name}: block {candidate.site.layer}, position {candidate.position}: "
                + ", ".join(f"{name} {value:.3f}" for name, value in figures.items())
            )
        return found

    def _broken(self, figures: Mapping[str, float]) -> list[str]:
        broken = {
            "induce": not figures["induce"] > self.min_induce,
            "divergence": not figures["divergence"] < self.max_divergence,
        }
        return [name for name, is_broken in broken.items() if is_broken]


def _scores_of(
    data: FitData,
    prompts: Sequence[Prompt],
    tokens: Sequence[int],
    edits: Sequence[AppliedEdit] = (),
) -> list[float]:
    """The refusal score of each prompt, in one pass."""
    return data.figures(
        ["refusal scores", list(tokens)],
        prompts,
        edits,
        lambda: refusal_scores(data.logits(prompts, edits), tokens).tolist(),
    )


def _applied(edits: Sequence[Edit]) -> list[AppliedEdit]:
    return [AppliedEdit(edit) for edit in edits]


def _place(candidate: _Candidate) -> dict[str, Any]:
    return {"block": candidate.site.layer, "position": candidate.position}


METHOD = DirectionalAblation
