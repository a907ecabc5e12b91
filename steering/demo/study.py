"""Do the papers' findings hold on the demo model? The tables of the README, from held-out prompts.

Every profile and baseline was fitted, and every setting of theirs chosen, on the fit and selection
splits. The test prompts here decide nothing. What is fitted here (PCA-OT at given depths) is fitted
on the fit split.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor
from tqdm import tqdm

from steering.activations import gather_activations
from steering.demo.corpus import KINDS, Kind, prompts
from steering.demo.fit import prompt_set
from steering.demo.table import benign_perplexity, caption, measure, rows_of
from steering.edit import Edit, Site
from steering.models import LanguageModel
from steering.moments import Moments
from steering.profile import Profile
from steering.transport import Transport, fit_transport

PLAIN: tuple[Kind, ...] = ("benign", "harmful")


def render(
    lm: LanguageModel,
    profiles: Mapping[str, Profile],
    *,
    per_kind: int = 400,
    progress: bool = True,
) -> Iterator[str]:
    """All tables in Markdown, line by line as they are measured."""
    yield caption(per_kind)
    yield "\n**Methods and baselines, held-out verb-thing combinations**\n"
    yield from rows_of(lm, list(profiles.values()), per_kind=per_kind, progress=progress)
    yield "\n**AlphaSteer: the gate and what benign prompts feel of it**\n"
    yield from alphasteer_rows(lm, profiles, per_kind=per_kind)
    yield "\n**PCA-OT by depth (plain harmful and benign prompts)**\n"
    yield from transport_rows(
        lm, profiles["optimal-transport"], per_kind=max(1, per_kind // 4), progress=progress
    )
    yield "\n**LLM-VA: F1 by iteration (selection prompts)**\n"
    yield from iteration_rows({name: profiles[name] for name in ("llm-va", "llm-va-paper")})


def alphasteer_rows(
    lm: LanguageModel, profiles: Mapping[str, Profile], *, per_kind: int
) -> Iterator[str]:
    """Per steered block: AUC of the gate (harmful or jailbroken against plain benign or
    borderline), its mean on both, and the benign drift `||s g r|| / ||h||`, at the last prompt
    token. States are those that the profile's own earlier blocks have edited, as in serving.
    """
    yield "| profile | block | gate AUC | gate, harmful | gate, benign | benign drift |"
    yield "|---|---|---|---|---|---|"
    found = prompts("test", KINDS, per_kind=per_kind)
    ids = [lm.encode_prompt(prompt.text) for prompt in found]
    harmful = torch.tensor([prompt.harmful for prompt in found])
    for name in ("alphasteer", "alphasteer-plus", "alphasteer-token"):
        profile = profiles[name]
        for edit in sorted(profile.edits, key=lambda e: e.site.order):
            earlier = [a for a in profile.applied() if a.edit.site.order < edit.site.order]
            h = gather_activations(lm, ids, [edit.site], edits=earlier)[edit.site].float()
            gate = _gate(edit, h)
            moved = profile.strength * edit.change(h, _column(edit, gate))
            drift = (moved.norm(dim=1) / h.norm(dim=1))[~harmful].mean()
            yield (
                f"| {name} | {edit.site.layer} | {roc_auc_score(harmful, gate):.4f} | "
                f"{gate[harmful].mean():.3f} | {gate[~harmful].mean():.3f} | {drift:.4f} |"
            )


def _gate(edit: Edit, h: Tensor) -> Tensor:
    """`w . h` `[N]`: the paper's form keeps `w` in the edit's read side, the released one in its
    gate."""
    return h @ (edit.read[:, 0] if edit.gate is None else edit.gate.direction)


def _column(edit: Edit, gate: Tensor) -> float | Tensor:
    return 1.0 if edit.gate is None else gate[:, None]


def transport_rows(
    lm: LanguageModel, profile: Profile, *, per_kind: int, progress: bool
) -> Iterator[str]:
    """The full map at one block, at two adjacent ones and in the whole network, with the profile's
    components and phase; last, the profile itself."""
    settings = profile.provenance["diagnostics"]
    depth = len(lm.sites.blocks)
    transports = _transports(lm, settings["components"])
    windows = [[b] for b in range(depth)] + [[b, b + 1] for b in range(depth - 1)]
    arms = [(w, 1.0) for w in [*windows, list(range(depth))]]
    arms.append((settings["blocks"], profile.strength))
    yield (
        "| blocks | strength | refuses harmful | on topic, harmful | on topic, benign | "
        "degenerate | perplexity, benign |"
    )
    yield "|---|---|---|---|---|---|---|"
    for blocks, strength in tqdm(arms, desc="PCA-OT by depth", disable=not progress, leave=False):
        arm = Profile(
            name="arm",
            method=profile.method,
            edits=tuple(
                transports[b].edit(Site(b, "resid_post"), settings["phase"], True) for b in blocks
            ),
            base=profile.base,
            strength=strength,
            red_team=True,
        )
        m = measure(lm, arm, kinds=PLAIN, per_kind=per_kind)
        broken = sum(j.outcome in ("degenerate", "empty") for j in m.judged) / len(m.judged)
        name = "all" if len(blocks) == depth else " and ".join(map(str, blocks))
        yield (
            f"| {name} | {strength:g} | {m.rate('harmful', 'refusal'):.2f} | "
            f"{m.on_topic('harmful'):.2f} | {m.on_topic('benign'):.2f} | {broken:.2f} | "
            f"{benign_perplexity(lm, arm, per_kind=per_kind):.3f} |"
        )


def _transports(lm: LanguageModel, components: int) -> list[Transport]:
    """The map at every block, from plain harmful fit prompts to plain benign ones."""
    sites = [Site(block, "resid_post") for block in range(len(lm.sites.blocks))]
    moments = {}
    for kind in PLAIN:
        found = [p for p in prompt_set("fit").prompts if p.kind == kind]
        states = gather_activations(lm, [lm.encode_prompt(p.text) for p in found], sites)
        for site in sites:
            moments[kind, site] = Moments(lm.sites.hidden_size)
            moments[kind, site].update(states[site])
    return [
        fit_transport(moments["harmful", site], moments["benign", site], components)
        for site in sites
    ]


def iteration_rows(profiles: Mapping[str, Profile]) -> Iterator[str]:
    """The validation F1 of each iteration, as the fit recorded it; 0 is the unedited model."""
    yield "| profile | kept | F1 at iteration 0, 1, 2, ... |"
    yield "|---|---|---|"
    for name, profile in profiles.items():
        record: dict[str, Any] = profile.provenance["diagnostics"]
        f1 = [record["unedited"]["f1"], *(entry["f1"] for entry in record["iterations"])]
        yield f"| {name} | {record['iteration']} | {' '.join(f'{value:.3f}' for value in f1)} |"
