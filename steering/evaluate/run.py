"""The whole evaluation: responses, utility, readings, and what is written about them.

A folder holds `responses.jsonl` (every response, as it came), `results.json`, `*.png` and
`report.html`. Running it again on the same folder asks for no response twice.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from steering.evaluate import summary
from steering.evaluate.arms import RAW_ARM, Arm, arms_of
from steering.evaluate.job import Evaluation
from steering.evaluate.provenance import FORMAT, provenance, warnings
from steering.evaluate.readings import figures_inside
from steering.evaluate.responses import Answerer, Response, ResponseLog, collect, judge_all
from steering.evaluate.utility import (
    MIN_KL_TOKENS,
    Passage,
    choice_accuracies,
    divergences,
    perplexities,
)
from steering.judge_error import why_not_corrected
from steering.judge_set import labelled_replies
from steering.selection import group_of

SAMPLES_PER_CLASS = 3


def evaluate(job: Evaluation, out: Path, answerer: Answerer) -> dict[str, Any]:
    """Do it all, write `responses.jsonl` and `results.json` to `out`, and return the results.

    Args:
        answerer: must be done with the model when it returns.
    """
    arms = arms_of(job.profiles, job.strengths)
    main = [arm for arm in arms if arm.main]
    responses = _responses(job, arms, out, answerer)
    with _bar(job, "measuring the judge", len(labelled_replies("held_out"))) as update:
        card = job.judge.card(lambda found: update(len(found)))
    correcting = None if why_not_corrected(card) else card
    found = [summary.arm_figures(arm, job.sets, responses, correcting) for arm in arms]
    for arm, figures in zip(main, [f for f in found if f["main"]], strict=True):
        figures["utility"] = {}
        figures["inside"] = _inside(job, arm)
    _add_utility(job, main, [f for f in found if f["main"]], responses)
    results = {
        "format": FORMAT,
        **provenance(job, arms, card),
        "warnings": [*warnings(job), *summary.failures(responses)],
        "arms": found,
        "comparisons": summary.comparisons(arms, job.sets, responses),
        "pareto_front": summary.pareto_front(found),
        "throughput": summary.throughput(responses),
        "samples": _samples(job, main, responses),
    }
    text = json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False)
    partial = out / "results.json.partial"
    partial.write_text(text + "\n", "utf-8")
    partial.replace(out / "results.json")
    return results


def _responses(
    job: Evaluation, arms: Sequence[Arm], out: Path, answerer: Answerer
) -> dict[tuple[str, str], list[Response]]:
    """Responses by arm's and set's name, all of them judged."""
    total = len({prompt.text for found in job.sets for prompt in found.prompts.prompts})
    total *= len({arm.digest for arm in arms})
    with ResponseLog(out / "responses.jsonl") as log:
        with _bar(job, "answering", total) as update:
            keys = collect(job.lm, arms, job.sets, job.decoding, answerer, log, on_done=update)
        with _bar(job, "judging", total) as update:
            every = [key for found in keys.values() for key in found]
            judge_all(log, every, job.judge, on_done=update)
        log.tidy()
        return {names: [log.found[key] for key in found] for names, found in keys.items()}


def _add_utility(
    job: Evaluation,
    arms: Sequence[Arm],
    found: Sequence[dict[str, Any]],
    responses: summary.Responses,
) -> None:
    edits, utility = [arm.edits for arm in arms], job.utility
    if utility.passages:
        with _bar(job, "perplexity", len(utility.passages)) as update:
            values = perplexities(job.lm, utility.passages, edits, update)
        for figures, value in zip(found, values, strict=True):
            figures["utility"]["perplexity"] = value
    for label in ("benign", "harmful"):
        passages = kl_passages(job, responses, harmful=label == "harmful")
        if passages:
            with _bar(job, f"KL to raw, {label}", len(passages)) as update:
                values = divergences(job.lm, passages, edits, update)
            for figures, value in zip(found, values, strict=True):
                figures["utility"][f"kl_to_raw_{label}"] = {
                    "nats_per_token": value,
                    "replies": len(passages),
                    "tokens": sum(len(p.continuation) for p in passages),
                }
    for name, questions in utility.questions.items():
        with _bar(job, name, sum(len(q.choices) for q in questions)) as update:
            accuracies = choice_accuracies(job.lm, questions, edits, update)
        for figures, accuracy in zip(found, accuracies, strict=True):
            figures["utility"].setdefault("multiple_choice", {})[name] = accuracy
    for figures in found:
        _add_kept(figures["utility"], found[0]["utility"])


def _add_kept(utility: dict[str, Any], raw: dict[str, Any]) -> None:
    """Utility kept: accuracy over raw's, the mean over the tasks (arXiv 2601.19487)."""
    shares = [
        found["accuracy"]["value"] / raw["multiple_choice"][name]["accuracy"]["value"]
        for name, found in utility.get("multiple_choice", {}).items()
        if raw["multiple_choice"][name]["accuracy"]["value"] > 0
    ]
    if shares:
        utility["kept"] = sum(shares) / len(shares)


def kl_passages(job: Evaluation, responses: summary.Responses, *, harmful: bool) -> list[Passage]:
    """Prompts of a label with the first tokens of raw's own replies to them, the end included.

    Replies of fewer than 8 tokens are left out.
    """
    found: dict[str, Passage] = {}
    for prompts in job.sets:
        raw = responses[RAW_ARM.name, prompts.name]
        for prompt, response in zip(prompts.prompts.prompts, raw, strict=True):
            if len(found) == job.utility.kl_prompts:
                return list(found.values())
            tokens = response.token_ids[: job.utility.kl_tokens]
            if prompt.harmful == harmful and len(tokens) >= MIN_KL_TOKENS:
                context = tuple(job.lm.encode_prompt(prompt.text))
                found.setdefault(prompt.text, Passage(context, tokens))
    return list(found.values())


def _inside(job: Evaluation, arm: Arm) -> dict[str, Any]:
    prompts = list({p.text: p for found in job.sets for p in found.prompts.prompts}.values())
    if not arm.edits:
        return {}
    with _bar(job, f"reading {arm.name}", None) as update:
        return figures_inside(job.lm, arm, prompts, update)


def _samples(
    job: Evaluation, arms: Sequence[Arm], responses: summary.Responses
) -> list[dict[str, Any]]:
    """Some prompts of each class with every profile's reply, those first where outcomes differ."""
    classes: dict[tuple[str, str], list[tuple[int, int, dict[str, Any]]]] = {}
    for found in job.sets:
        for i, prompt in enumerate(found.prompts.prompts):
            replies: dict[str, Response] = {
                arm.name: responses[arm.name, found.name][i] for arm in arms
            }
            row = {
                "set": found.name,
                "class": group_of(prompt),
                "harmful": prompt.harmful,
                "prompt": prompt.text,
                "replies": [
                    {"arm": name, "outcome": r.outcome, "reply": r.reply, "error": r.error}
                    for name, r in replies.items()
                ],
            }
            alike = -len({r.outcome for r in replies.values()})
            classes.setdefault((found.name, str(row["class"])), []).append((alike, i, row))
    return [
        row
        for rows in classes.values()
        for _, _, row in sorted(rows, key=lambda r: r[:2])[:SAMPLES_PER_CLASS]
    ]


@contextmanager
def _bar(job: Evaluation, what: str, total: int | None) -> Iterator[Callable[[int], object]]:
    with tqdm(total=total, desc=what, leave=False, disable=not job.progress) as bar:
        yield bar.update
