"""AlphaSteer: push towards refusal, but only what lies outside the benign prompts' space.

Per steered block, at its input, a change `D h` with `D = D~ P`: `P` projects onto the null space of
benign activations, and `D~` is fitted by ridge regression so that `D h` is the refusal direction
`r` for malicious ones (arXiv 2506.07022, ICLR 2026). Every regression target being the same `r`,
`D = r w^T` exactly: a linear gate `w . h`, about 1 on malicious and about 0 on benign prompts,
times a fixed vector. So the edit is of rank one, and only sums over the prompts are needed.

Two forms. The paper's acts on every activation. The released code takes the gate of the last
prompt token, applies it to all prompt positions, and leaves generated tokens alone.

Not covered: the released vectors themselves. They point away from refusal (hence negative
strengths there) and are taken one block off; here `r` is taken where `h` is, points to refusal, and
strengths are positive.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

import torch
from sklearn.metrics import roc_auc_score

from steering.edit import AppliedEdit, Edit, Site
from steering.hyper_parameters import as_tuple, check_hyper_parameters
from steering.linalg import null_space_size
from steering.methods import FitData, Fitted
from steering.null_space import GateForm, NullSpaceGate, Statistics
from steering.prompts import Prompt
from steering.selection import Judged, blocks_at_depth, check_blocks, sample

# Held-out AUCs closer than this count as equal.
_EQUAL_AUC = 0.005


@dataclass(frozen=True)
class AlphaSteer:
    """AlphaSteer in its rank-one form.

    Numbers of blocks and strengths are tried together on selection prompts: the changes of several
    blocks add up, and too much of them refuses less again.

    Args:
        blocks: to steer; if None, those with the best held-out gate AUC among `depth`.
        depth: range to choose blocks from, as shares of the depth.
        block_shares: numbers of blocks to try, as shares of all blocks.
        rho: share of the directions kept as null space; one, or one per block of `blocks`.
        alpha_scale: `c` of the ridge penalty `c * trace(Q^T S_m Q) / k`.
        alpha: the penalty itself (10 in the released code, for every model); overrides `c`.
        gate: `last_prompt_token` (released code) or `token` (paper).
        strength: if None, chosen from `strengths` on the selection prompts.
        max_benign_loss: how much of the unedited model's share of answers a benign class may lose.
        judged_per_kind: selection prompts of each label and kind that are judged.
    """

    blocks: tuple[int, ...] | None = None
    depth: tuple[float, float] = (0.25, 0.65)
    block_shares: tuple[float, ...] = (0.3, 0.2, 0.1)
    rho: float | tuple[float, ...] = 0.3
    alpha_scale: float = 0.1
    alpha: float | None = None
    gate: GateForm = "last_prompt_token"
    strength: float | None = None
    strengths: tuple[float, ...] = (0.25, 0.35, 0.5, 0.75, 1.0)
    max_benign_loss: float = 0.02
    judged_per_kind: int = 100

    name: ClassVar[str] = "alphasteer"
    summary: ClassVar[str] = (
        "Pushes malicious prompts towards refusal along a direction that benign prompts do not "
        "use, so that they stay as they are (AlphaSteer)."
    )
    red_team: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_hyper_parameters(self, "strengths", "block_shares")
        if self.gate not in get_args(GateForm):
            raise ValueError(f"gate is one of {', '.join(get_args(GateForm))}; got {self.gate!r}")
        if isinstance(self.rho, tuple) and len(self.rho) != len(self.blocks or ()):
            raise ValueError("several values of rho need as many blocks")
        if self.strength is not None and self.strength <= 0:
            raise ValueError(f"strength is above 0; got {self.strength}")
        if not all(0 < rho <= 1 for rho in as_tuple(self.rho)):
            raise ValueError(f"rho is a share above 0, to 1; got {self.rho}")
        if self.alpha_scale <= 0 or (self.alpha is not None and self.alpha <= 0):
            raise ValueError("the ridge penalty, alpha or alpha_scale, is above 0")
        if not all(0 < share <= 1 for share in self.block_shares):
            raise ValueError(f"block_shares are above 0, to 1; got {self.block_shares}")

    def fit(self, data: FitData) -> Fitted:
        """Fit the edits.

        Raises ValueError if there are no benign prompts, or unless the model refuses some of the
        malicious fit prompts and answers others.
        """
        statistics = self._statistics(data)
        rhos = self.rho if isinstance(self.rho, tuple) else (self.rho,) * len(statistics)
        if isinstance(self.rho, tuple) and self.blocks is not None:
            rhos = tuple(rho for _, rho in sorted(zip(self.blocks, self.rho, strict=True)))
        self._warn_of_chance(data, next(iter(statistics.values())), min(rhos))
        solved = {
            site: found.solve(rho, penalty=self.alpha, penalty_scale=self.alpha_scale)
            for (site, found), rho in zip(statistics.items(), rhos, strict=True)
        }
        held_out = held_out_gates(data, solved)
        aucs = {site: figures["auc"] for site, figures in held_out.items()}
        chosen, strength, selection = self._search(
            data,
            {site: found.edit(site, self.gate) for site, found in solved.items()},
            self._block_sets(aucs, len(data.lm.sites.blocks)),
        )
        any_counts = next(iter(statistics.values())).counts
        return Fitted(
            edits=tuple(solved[site].edit(site, self.gate) for site in chosen),
            strength=strength,
            diagnostics={
                "blocks": [site.layer for site in chosen],
                "malicious": {"refused": any_counts["refusal"], "answered": any_counts["answer"]},
                "candidates": [
                    {
                        "block": site.layer,
                        "rho": rho,
                        "alpha": found.penalty,
                        "null_space": found.dimensions,
                        "refusal_norm": float(found.refusal.norm()),
                        "held_out": {
                            **held_out[site],
                            "benign_drift": held_out[site]["benign_drift"] * strength,
                        },
                    }
                    for (site, found), rho in zip(solved.items(), rhos, strict=True)
                ],
                "strength": strength,
                "selection": selection,
            },
        )

    def _statistics(self, data: FitData) -> dict[Site, Statistics]:
        """One pass over the fit prompts, by candidate site in the order of the forward pass."""
        malicious = data.fit.harmful
        if not data.fit.benign or not malicious:
            raise ValueError("AlphaSteer needs benign and harmful fit prompts; one kind is missing")
        depth = len(data.lm.sites.blocks)
        blocks = (
            # Not block 0, whose input is the template's last token, whatever the prompt.
            [block for block in blocks_at_depth(depth, *self.depth) if block] or [1]
            if self.blocks is None
            else check_blocks(self.blocks, depth)
        )
        benign = self._benign_prompts(data)
        data.report(f"{self.name}: judging replies to {len(malicious)} harmful prompts")
        outcomes = data.outcomes(malicious)
        for outcome, verb in (("refusal", "refuses"), ("answer", "answers")):
            if outcome not in outcomes:
                raise ValueError(
                    "AlphaSteer's refusal direction is the difference between refused and "
                    f"answered harmful prompts, but the model {verb} none of the "
                    f"{len(malicious)} harmful fit prompts. Add some that it {verb} (jailbreaks "
                    "are often answered, plain requests refused)."
                )
        size = data.lm.sites.hidden_size
        found = {Site(block, "resid_pre"): Statistics(size) for block in blocks}
        for batch in data.states(benign, found):
            for site, rows in batch.states.items():
                found[site].benign.update(rows)
        for batch in data.states(malicious, found):
            for site, rows in batch.states.items():
                found[site].update_malicious(rows, [outcomes[i] for i in batch.indices])
        return found

    def _benign_prompts(self, data: FitData) -> Sequence[Prompt]:
        """The fit prompts whose states make the null space."""
        return data.fit.benign

    def _warn_of_chance(self, data: FitData, statistics: Statistics, rho: float) -> None:
        """Few prompts leave more directions empty than are kept: rounding then decides which."""
        size, count = data.lm.sites.hidden_size, statistics.benign.count
        empty, kept = size - count, null_space_size(size, rho)
        if empty > kept:
            data.report(
                f"warning: {count} benign prompts use at most {count} of {size} directions, and "
                f"rho keeps {kept} of the other {empty} by chance: give {size - kept} prompts or "
                f"more, or a rho of {empty / size:.2f} or more"
            )

    def _block_sets(self, aucs: Mapping[Site, float], depth: int) -> list[tuple[Site, ...]]:
        """The best sites, in the order of the forward pass, for each number of blocks to try.

        Among AUCs that a held-out set cannot tell apart the later block is better: the difference
        between refused and answered prompts holds more of the decision there and less of the words.
        """
        if self.blocks is not None:
            return [tuple(aucs)]
        best = max(aucs.values())
        ranked = sorted(aucs, key=lambda site: (int((best - aucs[site]) / _EQUAL_AUC), -site.layer))
        counts = {max(1, round(share * depth)) for share in self.block_shares}
        sets = {tuple(sorted(ranked[:count], key=lambda site: site.order)) for count in counts}
        return sorted(sets, key=len, reverse=True)

    def _search(
        self, data: FitData, edits: Mapping[Site, Edit], block_sets: Sequence[tuple[Site, ...]]
    ) -> tuple[tuple[Site, ...], float, list[dict[str, Any]]]:
        """The sites and strength with most refusals of harmful prompts that spare benign ones."""
        prompts = sample(data.selection.prompts, self.judged_per_kind, data.seed)
        unedited = Judged.of(data, prompts)
        tried = [{"blocks": [], "strength": 0.0, **_figures(unedited, unedited)}]
        strengths = sorted(self.strengths) if self.strength is None else (self.strength,)
        options = [(sites, strength) for strength in strengths for sites in block_sets]
        for sites, strength in options:
            judged = Judged.of(
                data, prompts, [AppliedEdit(edits[site], strength) for site in sites]
            )
            blocks = [site.layer for site in sites]
            figures = _figures(judged, unedited)
            tried.append({"blocks": blocks, "strength": strength, **figures})
            data.report(
                f"{self.name}: blocks {blocks} at strength {strength:g} refuse "
                f"{figures['harmful_refused']:.1%} of harmful prompts, benign classes lose at "
                f"most {figures['benign_loss']:.1%}"
            )
        found = list(zip(options, tried[1:], strict=True))
        allowed = [f for f in found if f[1]["benign_loss"] <= self.max_benign_loss + 1e-9]
        if allowed:  # the first, so the smallest strength, of equals
            best = max(allowed, key=lambda f: f[1]["harmful_refused"])
        else:
            best = min(found, key=lambda f: f[1]["benign_loss"])
        return *best[0], tried


def held_out_gates(
    data: FitData, solved: Mapping[Site, NullSpaceGate]
) -> dict[Site, dict[str, float]]:
    """Gates on the selection prompts' unedited states, by site.

    `auc` of telling harmful from benign; mean gates of both; `benign_drift`, the mean of
    `||D h|| / ||h||` (at strength 1). In-sample these mean nothing: the null space has more
    dimensions than there may be prompts.
    """
    prompts = data.selection.prompts
    gates = {site: torch.zeros(len(prompts)) for site in solved}
    norms = {site: torch.ones(len(prompts)) for site in solved}
    for batch in data.states(prompts, solved):
        for site, rows in batch.states.items():
            gates[site][batch.indices] = rows.cpu() @ solved[site].gate.float()
            norms[site][batch.indices] = rows.norm(dim=1).cpu()
    harmful = torch.tensor([prompt.harmful for prompt in prompts])
    if harmful.all() or not harmful.any():
        raise ValueError("AlphaSteer needs benign and harmful selection prompts")
    found = {}
    for site, gate in gates.items():
        drift = gate.abs() * float(solved[site].refusal.norm()) / norms[site]
        found[site] = {
            "auc": float(roc_auc_score(harmful.numpy(), gate.numpy())),
            "gate_harmful": float(gate[harmful].mean()),
            "gate_benign": float(gate[~harmful].mean()),
            "benign_drift": float(drift[~harmful].mean()),
        }
    return found


def _figures(judged: Judged, unedited: Judged) -> dict[str, Any]:
    return {
        "harmful_refused": judged.share("refusal", harmful=True),
        "benign_answered": judged.share("answer", harmful=False),
        "benign_loss": judged.benign_loss(unedited),
        "outcomes": judged.to_json(),
    }


METHOD = AlphaSteer
