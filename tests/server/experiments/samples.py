"""Records as a server would write them, of answers with a known truth."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from server.experiments.definitions import Arm, Experiment
from server.experiments.records import AnswerRecord, EventRecord
from steering.judge import Outcome
from steering.monitor import PromptClass

START = 1_700_000_000.0
JUDGE = "phrases 1"


def experiment(arms: int = 2, **values: Any) -> Experiment:
    named = tuple(Arm(name=name, profile=name) for name in ("raw", "a", "b", "c")[:arms])
    return Experiment(**{"name": "test", "arms": named, "horizon": 2000, **values})


def answer(
    i: int,
    arm: str,
    outcome: Outcome | None = "answer",
    *,
    unit: str | None = None,
    prompt_class: PromptClass = "benign",
    **values: Any,
) -> AnswerRecord:
    record = AnswerRecord(
        id=f"chatcmpl-{i}",
        time=START + i,
        experiment="test",
        version=1,
        arm=arm,
        unit=unit or f"unit-{i}",
        sticky=True,
        kind="exposure",
        pair=f"chatcmpl-{i}",
        request_id=f"request-{i}",
        profile=arm,
        fingerprint="f" * 16,
        strength=None,
        model="demo",
        weights="w" * 16,
        prompt_class=prompt_class,
        benign_probability=0.9,
        refusal_score=1.0 if outcome == "refusal" else -1.0,
        answer_probability=0.1 if outcome == "refusal" else 0.9,
        outcome=outcome,
        judge=JUDGE,
        finish_reason="stop",
        prompt_tokens=10,
        completion_tokens=20,
        ttft_seconds=0.1,
        duration_seconds=0.5,
    )
    return dataclasses.replace(record, **values)


def shadow(of: AnswerRecord, arm: str, outcome: Outcome) -> AnswerRecord:
    id = f"{of.id}/{arm}"
    return dataclasses.replace(of, id=id, kind="shadow", arm=arm, profile=arm, outcome=outcome)


def traffic(rates: Sequence[float], n: int, *, seed: int = 0, start: int = 0) -> list[AnswerRecord]:
    """One request a unit, the arms in equal shares; benign prompts with these rates of refusal."""
    rng = np.random.default_rng(seed)
    names = ("raw", "a", "b", "c")[: len(rates)]
    found = []
    for i in range(start, start + n):
        arm = int(rng.integers(len(rates)))
        outcome: Outcome = "refusal" if rng.random() < rates[arm] else "answer"
        found.append(answer(i, names[arm], outcome))
    return found


def event(kind: str, arm: str | None, time: float, **detail: Any) -> EventRecord:
    return EventRecord(f"{kind}-{arm}-{time}", time, "test", 1, kind, arm, detail)
