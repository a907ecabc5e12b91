"""The judge of an evaluation: asked once for each reply, measured, and corrected for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from steering.evaluate.page import write_page
from steering.evaluate.run import evaluate
from steering.evaluate.table import render
from steering.judge import OnJudged, Outcome
from steering.judge_error import corrected_by
from steering.judge_set import Card, Rate
from tests.steering.evaluate.evaluations import Answers, job
from tests.steering.evaluate.test_run import PROMPTS, lines, without_chance

RESPONSES = 4 * PROMPTS
"""Of raw and three profiles."""


GOOD, BETTER = Rate(45, 50), Rate(48, 50)


@dataclass
class Opinion:
    """Judges by the reply's length, two replies at once, and says how well it does.

    Args:
        stop_after: raise KeyboardInterrupt once so many were judged.
    """

    version: str = "opinion-1"
    sensitivity: Rate = GOOD
    specificity: Rate = BETTER
    stop_after: int | None = None
    unclear: bool = False
    seen: list[str] = field(default_factory=list)

    def __call__(self, reply: str, prompt: str | None = None) -> Outcome:
        if self.unclear:
            return "error"
        return "refusal" if len(reply) % 2 else "answer"

    def many(
        self, replies: Sequence[str], prompts: Sequence[str | None], on_done: OnJudged = None
    ) -> list[Outcome]:
        outcomes: list[Outcome] = []
        for at in range(0, len(replies), 2):
            if len(self.seen) == self.stop_after:
                raise KeyboardInterrupt
            batch = replies[at : at + 2]
            self.seen += batch
            found = {at + i: self(reply) for i, reply in enumerate(batch)}
            outcomes += found.values()
            if on_done is not None:
                on_done(found)
        return outcomes

    def card(self, on_done: OnJudged = None) -> Card:
        return Card(self.version, "held_out", self.sensitivity, self.specificity)


def run(out: Path, judge: Any, answers: Answers | None = None) -> dict[str, Any]:
    return evaluate(job(strengths=(), judge=judge), out, answers or Answers())


def test_another_judge_judges_the_replies_that_are_there(tmp_path: Path) -> None:
    evaluate(job(strengths=()), tmp_path, Answers())
    before = lines(tmp_path)
    judge, answers = Opinion(), Answers()
    results = run(tmp_path, judge, answers)
    assert answers.asked == [] and len(judge.seen) == RESPONSES
    after = lines(tmp_path)
    assert len(after) == len(before) == RESPONSES
    assert {line["judge"] for line in after} == {"opinion-1"}
    assert all(line["outcome"] == judge(line["reply"]) for line in after)
    # All but the outcomes is as it was.
    judged = ("outcome", "judge")
    assert [{k: v for k, v in line.items() if k not in judged} for line in after] == [
        {k: v for k, v in line.items() if k not in judged} for line in before
    ]
    assert results["judge"]["version"] == "opinion-1"
    run(tmp_path, judge)
    assert len(judge.seen) == RESPONSES, "nothing is judged twice"
    newer = Opinion("opinion-2")
    run(tmp_path, newer)
    assert len(newer.seen) == RESPONSES, "another version judges anew"


def test_interrupted_judging_goes_on_where_it_stopped(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", Opinion())
    first, second, answers = Opinion(stop_after=10), Opinion(), Answers()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "torn", first)
    resumed = run(tmp_path / "torn", second, answers)
    assert answers.asked == []
    assert len(first.seen) + len(second.seen) == RESPONSES
    assert without_chance(resumed) == without_chance(whole)


def test_rates_stand_beside_their_correction_and_the_judges_errors(tmp_path: Path) -> None:
    judge = Opinion()
    results = run(tmp_path, judge)
    raw = results["arms"][0]["all"]
    counts = {label: raw["outcomes"][label] for label in ("harmful", "benign")}
    refused = counts["benign"].get("refusal", 0)
    assert raw["over_refusal"]["value"] == refused / 5
    expected = corrected_by(judge.card(), refused, 5)
    found = raw["over_refusal_corrected"]
    assert (found["value"], found["low"], found["high"]) == pytest.approx(
        (expected.estimate, expected.low, expected.high)
    )
    expected = corrected_by(judge.card(), counts["harmful"].get("refusal", 0), 5)
    found = raw["attack_success_corrected"]
    assert (found["value"], found["low"], found["high"]) == pytest.approx(
        (1 - expected.estimate, 1 - expected.high, 1 - expected.low)
    )
    assert raw["attack_success"]["value"] == counts["harmful"].get("answer", 0) / 5
    assert results["judge"]["sensitivity"] == 0.9 and results["judge"]["specificity_n"] == 50
    low, high = judge.sensitivity.interval
    stated = f"sensitivity 0.900 [{low:.3f}, {high:.3f}] of 50, specificity 0.960"
    page = write_page(results, {}, tmp_path / "report.html").read_text()
    for text in ("\n".join(render(results)), page):
        assert stated in text and "corrected attack success" in text and "Rogan-Gladen" in text


def test_a_judge_like_a_coin_corrects_nothing_and_says_so(tmp_path: Path) -> None:
    results = run(tmp_path, Opinion(sensitivity=Rate(20, 50), specificity=Rate(25, 50)))
    raw = results["arms"][0]["all"]
    assert raw["over_refusal"] is not None
    assert raw["over_refusal_corrected"] is None and raw["attack_success_corrected"] is None
    assert "cannot be corrected" in results["judge"]["not_corrected"]
    page = write_page(results, {}, tmp_path / "report.html").read_text()
    for text in ("\n".join(render(results)), page):
        assert "No rate is corrected" in text and "corrected attack success" not in text


def test_replies_without_a_verdict_are_told_and_not_asked_for_again(tmp_path: Path) -> None:
    results = run(tmp_path, Opinion(unclear=True))
    assert results["arms"][0]["all"]["outcomes"] == {
        "harmful": {"error": 5},
        "benign": {"error": 5},
    }
    assert results["arms"][0]["all"]["over_refusal_corrected"] is None
    assert any("no verdict on 40 of 40" in warning for warning in results["warnings"])
    assert " error" in "\n".join(render(results))
    answers = Answers()
    run(tmp_path, Opinion(unclear=True), answers)
    assert answers.asked == []


def test_failed_replies_are_told(tmp_path: Path) -> None:
    run(tmp_path, Opinion())
    path = tmp_path / "responses.jsonl"
    broken = {**lines(tmp_path)[0], "outcome": "error", "judge": "", "error": "a step failed"}
    path.write_text("".join(json.dumps(line) + "\n" for line in [broken, *lines(tmp_path)[1:]]))

    def none_come(questions: Any, on_done: Any, /) -> None:
        assert len(questions) == 1

    results = evaluate(job(strengths=(), judge=Opinion()), tmp_path, none_come)
    assert any("1 of 40 replies failed" in w and "a step failed" in w for w in results["warnings"])
