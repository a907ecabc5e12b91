"""Fit a monitor: probes, refusal tokens and thresholds of one base model.

Who sees what: probes are fitted on the fit prompts; the selection prompts are halved at random, one
half for calibration and thresholds, the other for every figure that is published. Probabilities
hold for that half's mixture of prompts: traffic with another share of harmful requests shifts them.

Not covered: isotonic calibration, and recalibration for a model derived from the base.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from torch import Tensor

from steering.edit import AppliedEdit, Site
from steering.fit import library_versions, overlaps
from steering.judge import Outcome, version_of
from steering.methods import FitData
from steering.monitor import Monitor, Probe, PromptClass
from steering.probes import (
    Labels,
    LinearProbe,
    choose_thresholds,
    constant_probe,
    enough,
    fit_linear_probe,
    stratified_split,
)
from steering.profile import RAW, Profile
from steering.prompts import Prompt
from steering.template import form_of

BENIGN_DEPTHS = (0.0, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0)
ANSWER_DEPTHS = (0.8, 0.9, 1.0)
"""Read late: LLM-VA makes the answer projection of an edited sublayer equal the benign one, so
there it is true by construction."""

# A first token belongs to refusals if its smoothed odds there are so many times those in answers.
_ODDS = 4.0
_REFUSAL_MASS = 0.99


def fit_monitor(
    data: FitData,
    profiles: Sequence[Profile] = (),
    *,
    benign_depths: Sequence[float] = BENIGN_DEPTHS,
    answer_depths: Sequence[float] = ANSWER_DEPTHS,
) -> Monitor:
    """Fit a monitor with answer probes for the unedited model and each profile.

    Args:
        profiles: of this base model. Each costs one generation over all prompts.
        benign_depths, answer_depths: where to read, as shares of the depth (`resid_post`); before
            each profile's first edit a benign probe is added.

    Raises ValueError if there are too few prompts of a label, or if the model refuses or answers
    nothing, so that no token can be said to open a refusal.
    """
    halves = _halves(data)
    repeated = overlaps(data)
    data.report("monitor: replies of the unedited model")
    replies = {"": Replies.of(data, ())}
    tokens, token_counts = learn_refusal_tokens(replies[""])
    benign, benign_made = _benign_probes(data, halves, _benign_sites(data, profiles, benign_depths))
    low, high = choose_thresholds(*_benign_probabilities(data, benign, halves[0]))
    answer: dict[str, Probe] = {}
    answer_made: dict[str, Any] = {}
    for profile in (RAW, *profiles):
        key = profile.fingerprint
        if key in answer:
            continue
        if key not in replies:
            data.report(f"monitor: replies under {profile.name}")
            replies[key] = Replies.of(data, profile.applied())
        sites = _sites_at(data, answer_depths)
        answer[key], made = _answer_probe(data, replies[key], profile.applied(), sites)
        answer_made[key] = {"profile": profile.name, **made}
        data.report(
            f"monitor: answer probe of {profile.name}, AUROC {answer[key].auroc:.3f}"
            + (" (constant)" if made["constant"] else "")
        )
    form = form_of(data.lm)
    monitor = Monitor(
        base=data.lm.fingerprint,
        benign=benign,
        answer=answer,
        refusal_token_ids=tokens,
        harmful_below=low,
        benign_above=high,
        provenance={
            "benign": benign_made,
            "answer": answer_made,
            "refusal_tokens": token_counts,
            "base_model": data.lm.name,
            "base_revision": data.lm.revision,
            **form.to_json(),
            "prompts": {"fit": data.fit.digest, "selection": data.selection.digest},
            "overlaps": repeated,
            "seed": data.seed,
            "judge": version_of(data.judge),
            "versions": library_versions(),
        },
        template=form,
    )
    held_out = _benign_probabilities(data, benign, halves[1])
    monitor.provenance["classes"] = _classes(monitor, *held_out)
    return monitor


@dataclass(frozen=True)
class Replies:
    """First tokens (None for an empty reply) and outcomes, of fit and of selection prompts."""

    first: tuple[list[int | None], list[int | None]]
    outcomes: tuple[list[Outcome], list[Outcome]]

    @classmethod
    def of(cls, data: FitData, edits: Sequence[AppliedEdit]) -> Replies:
        first: list[list[int | None]] = []
        outcomes: list[list[Outcome]] = []
        for prompts in (data.fit.prompts, data.selection.prompts):
            ids = data.replies(prompts, edits)
            first.append([reply[0] if reply else None for reply in ids])
            outcomes.append(data.judged(prompts, ids))
        return cls((first[0], first[1]), (outcomes[0], outcomes[1]))

    def answered(self) -> tuple[Labels, Labels]:
        fit, selection = (np.array([o == "answer" for o in found]) for found in self.outcomes)
        return fit, selection


def learn_refusal_tokens(replies: Replies) -> tuple[tuple[int, ...], dict[str, Any]]:
    """First tokens over-represented among refusals, most frequent first, and their counts.

    A token counts if `((r + 1/2) / (R + 1)) / ((a + 1/2) / (A + 1))` is at least 4, with `r` of `R`
    refusals and `a` of `A` answers beginning with it. Tokens are taken until they cover 99 % of the
    refusals.

    Raises ValueError where that is impossible: no refusals, no answers, or none that differ.
    """
    openings: dict[Outcome, Counter[int]] = {"refusal": Counter(), "answer": Counter()}
    for tokens, outcomes in zip(replies.first, replies.outcomes, strict=True):
        for token, outcome in zip(tokens, outcomes, strict=True):
            if token is not None and outcome in openings:
                openings[outcome][token] += 1
    refusals, answers = openings["refusal"], openings["answer"]
    for found, verb in ((refusals, "refuses"), (answers, "answers")):
        if not found:
            raise ValueError(
                f"the monitor learns from the model's own refusals and answers, but it {verb} none "
                f"of the prompts. Add prompts that it {verb}."
            )
    chosen: list[int] = []
    for token, count in sorted(refusals.items(), key=lambda item: (-item[1], item[0])):
        if sum(refusals[t] for t in chosen) >= _REFUSAL_MASS * refusals.total():
            break
        rate = (count + 0.5) / (refusals.total() + 1)
        if rate >= _ODDS * (answers[token] + 0.5) / (answers.total() + 1):
            chosen.append(token)
    if not chosen:
        raise ValueError(
            "no token opens refusals much more often than answers; give more prompts, a judge that "
            "knows this model's refusals, or, if its replies open with reasoning, template kwargs "
            "that turn it off"
        )
    counts = {
        name: {"of": found.total(), "covered": sum(found[token] for token in chosen)}
        for name, found in (("refusals", refusals), ("answers", answers))
    }
    return tuple(chosen), counts


def _halves(data: FitData) -> tuple[Labels, Labels]:
    """Masks of the selection prompts for calibration and for published figures."""
    labels = _benign_labels(data.selection.prompts)
    halves = stratified_split(labels, 0.5, data.seed)
    if not enough(_benign_labels(data.fit.prompts), *(labels[half] for half in halves)):
        raise ValueError(
            "a monitor needs at least 5 fit prompts and 4 selection prompts of each label (and "
            "means little below some dozens); add prompts"
        )
    return halves


def _benign_labels(prompts: Sequence[Prompt]) -> Labels:
    return np.array([not prompt.harmful for prompt in prompts])


def _sites_at(data: FitData, depths: Sequence[float]) -> list[Site]:
    last = len(data.lm.sites.blocks) - 1
    return [Site(layer, "resid_post") for layer in sorted({round(f * last) for f in depths})]


def _benign_sites(
    data: FitData, profiles: Sequence[Profile], depths: Sequence[float]
) -> list[Site]:
    """Sites at the depths, and the last one before each profile's first edit."""
    firsts = [min(edit.site.order for edit in p.edits) for p in profiles if p.edits]
    # The residual stream is the same after block l as at the input of block l + 1; no edit at
    # `resid_pre` of the first has been met then.
    before = [Site(order[0] - 1, "resid_post") for order in firsts if order[0] > 0]
    return sorted({*_sites_at(data, depths), *before}, key=lambda site: site.order)


def _states(
    data: FitData, sites: Sequence[Site], edits: Sequence[AppliedEdit] = ()
) -> Iterator[tuple[Site, Tensor, Tensor]]:
    """States of fit and of selection prompts, by site."""
    fit = data.all_states(data.fit.prompts, sites, edits)
    selection = data.all_states(data.selection.prompts, sites, edits)
    for site in sites:
        yield site, fit[site], selection[site]


def _benign_probes(
    data: FitData, halves: tuple[Labels, Labels], sites: Sequence[Site]
) -> tuple[tuple[Probe, ...], list[dict[str, Any]]]:
    fit_labels = _benign_labels(data.fit.prompts)
    labels = _benign_labels(data.selection.prompts)
    probes, made = [], []
    for site, fit_x, x in _states(data, sites):
        found = fit_linear_probe(
            (fit_x, fit_labels), *((x[half], labels[half]) for half in halves), seed=data.seed
        )
        probes.append(_probe(site, found))
        made.append({**_provenance(site, found), "held_out": int(halves[1].sum())})
        data.report(f"monitor: benign probe at {site}, AUROC {found.auroc:.3f}")
    return tuple(probes), made


def _benign_probabilities(
    data: FitData, probes: Sequence[Probe], half: Labels
) -> tuple[Tensor, Labels]:
    """The best benign probe's probabilities of one half's prompts, and the labels."""
    best = max(probes, key=lambda probe: probe.auroc)
    prompts = [p for p, used in zip(data.selection.prompts, half, strict=True) if used]
    states = data.all_states(prompts, [best.site])[best.site]
    return best.probability(states), _benign_labels(prompts)


def _classes(monitor: Monitor, probabilities: Tensor, benign: Labels) -> dict[str, dict[str, int]]:
    """How many prompts of each label the thresholds put into each class."""
    found = {label: dict.fromkeys(get_args(PromptClass), 0) for label in ("harmful", "benign")}
    for probability, is_benign in zip(probabilities.tolist(), benign, strict=True):
        found["benign" if is_benign else "harmful"][monitor.prompt_class(probability)] += 1
    return found


def _answer_probe(
    data: FitData, replies: Replies, edits: Sequence[AppliedEdit], sites: Sequence[Site]
) -> tuple[Probe, dict[str, Any]]:
    """The best of the sites' probes, or a constant where the model always does the same."""
    fit_labels, labels = replies.answered()
    halves = stratified_split(labels, 0.5, data.seed)
    rates = {
        "answered": {"fit": float(fit_labels.mean()), "selection": float(labels.mean())},
        "held_out": int(halves[1].sum()),
    }
    if not enough(fit_labels, *(labels[half] for half in halves)):
        seen = np.concatenate([fit_labels, labels[halves[0]]])
        found = constant_probe(data.lm.sites.hidden_size, seen, labels[halves[1]])
        site = sites[-1]
        reason = "too few prompts that it refuses" if labels.mean() > 0.5 else "it hardly answers"
        return _probe(site, found), {
            **_provenance(site, found),
            **rates,
            "constant": f"{reason}; the probability is the rate of answers",
        }
    probes = {
        site: fit_linear_probe(
            (fit_x, fit_labels), *((x[half], labels[half]) for half in halves), seed=data.seed
        )
        for site, fit_x, x in _states(data, sites, edits)
    }
    site = min(probes, key=lambda s: probes[s].development_loss)
    made = {**_provenance(site, probes[site]), **rates, "constant": None}
    return _probe(site, probes[site]), made


def _probe(site: Site, found: LinearProbe) -> Probe:
    return Probe(site, found.direction, found.bias, found.auroc, found.expected_calibration_error)


def _provenance(site: Site, found: LinearProbe) -> dict[str, Any]:
    return {
        "site": str(site),
        "C": found.cost,
        "auroc": found.auroc,
        "expected_calibration_error": found.expected_calibration_error,
    }
