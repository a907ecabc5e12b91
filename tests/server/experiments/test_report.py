"""From records with a known truth to verdicts."""

from __future__ import annotations

import dataclasses
import json
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest

from server.experiments.records import AnswerRecord, EventRecord
from server.experiments.report import Report
from server.experiments.report_making import make_report
from steering.judge import Outcome
from steering.judge_set import Card, Rate
from steering.monitor import PromptClass
from tests.server.experiments.samples import (
    JUDGE,
    START,
    answer,
    event,
    experiment,
    shadow,
    traffic,
)

CARD = Card(JUDGE, "held_out", Rate(90, 100), Rate(95, 100))


def verdicts(report: Report) -> dict[str, str]:
    return {comparison.arm: comparison.decision.verdict for comparison in report.comparisons}


@pytest.mark.parametrize(
    ("rate", "n", "verdict"),
    [(0.1, 3000, "better"), (0.3, 3000, "worse"), (0.21, 300, "inconclusive")],
)
def test_the_verdict_is_what_the_truth_is_of(rate: float, n: int, verdict: str) -> None:
    report = make_report(experiment(), traffic([0.2, rate], n))
    assert verdicts(report) == {"a": verdict}
    more = report.comparisons[0].decision.more_units
    assert (more is not None and more > 100) == (verdict == "inconclusive")


def test_more_refusals_are_better_where_the_definition_says_so() -> None:
    report = make_report(experiment(better="higher"), traffic([0.2, 0.3], 3000))
    assert verdicts(report) == {"a": "better"}
    assert "refusal, higher is better" in report.to_text()
    with pytest.raises(ValueError, match="never better"):
        experiment(metric="harmful_answer", better="higher")


def test_a_verdict_hides_no_harm_done_elsewhere() -> None:
    """Arm `a` refuses fewer prompts of every kind: better, and worse."""
    rng, records = np.random.default_rng(0), []
    for i in range(3000):
        arm, harmful = ("raw", "a")[int(rng.integers(2))], rng.random() < 0.5
        refuses = rng.random() < (0.9 if harmful else 0.2) - (0.2 if arm == "a" else 0.0)
        outcome: Outcome = "refusal" if refuses else "answer"
        prompt_class: PromptClass = "harmful" if harmful else "benign"
        records.append(answer(i, arm, outcome, prompt_class=prompt_class))
    report = make_report(experiment(), records)
    assert verdicts(report) == {"a": "better"}
    [warning] = report.warnings
    assert warning.startswith("a answers harmful prompts more often than raw, by 0.2")
    other = make_report(experiment(metric="harmful_answer"), records)
    assert verdicts(other) == {"a": "worse"} and not other.warnings


def test_latencies_are_compared_and_those_of_shadows_are_not() -> None:
    rng = np.random.default_rng(0)
    records = [
        dataclasses.replace(
            record,
            ttft_seconds=rng.exponential(0.2 if record.arm == "a" else 0.1),
            # Those cut short would make an arm look fast.
            finish_reason="cancelled" if i % 10 == 0 else "stop",
        )
        for i, record in enumerate(traffic([0.2, 0.2], 3000))
    ]
    records.append(shadow(records[-1], "raw" if records[-1].arm == "a" else "a", "answer"))
    report = make_report(experiment(), records)
    found = report.comparisons[0].differences["ttft_seconds"]
    assert found.n == 2700 and found.low is not None and found.high is not None
    assert 0.05 < found.low < 0.1 < found.high < 0.15
    assert "ttft_seconds" not in report.shadows[0].differences
    assert "first token, mean seconds" in report.to_text()


def test_the_report_says_whether_the_experiment_runs() -> None:
    def state(events: list[EventRecord], **changes: Any) -> str:
        report = make_report(experiment(3, **changes), [], events, now=START)
        return report.to_text().split(", ")[1]

    later = datetime.fromtimestamp(START + 10, UTC)
    assert state([]) == "running"
    assert state([], start=later) == "scheduled"
    assert state([event("removed", None, START)]) == "ended"
    stops = [event("stopped", "a", START), event("guard_rail", "b", START)]
    assert (state(stops[:1]), state(stops)) == ("running", "ended")


def test_equal_arms_are_called_equal_within_the_margin() -> None:
    report = make_report(experiment(margin=0.1, horizon=2000), traffic([0.2, 0.2], 2500))
    assert verdicts(report) == {"a": "no difference"}


def test_more_units_are_about_as_many_as_it_took() -> None:
    records = traffic([0.2, 0.3], 4000)
    said = make_report(experiment(), records[:400]).comparisons[0].decision
    assert said.verdict == "inconclusive" and said.more_units is not None
    later = make_report(experiment(), records[: 400 + 4 * said.more_units])
    assert verdicts(later) == {"a": "worse"}


def test_arms_are_compared_one_by_one_and_adjusted_for_their_number() -> None:
    report = make_report(experiment(4), traffic([0.2, 0.1, 0.2, 0.35], 6000))
    assert verdicts(report) == {"a": "better", "b": "inconclusive", "c": "worse"}
    for comparison in report.comparisons:
        assert comparison.holm_p >= comparison.p
    two = make_report(
        experiment(2),
        [r for r in traffic([0.2, 0.1, 0.2, 0.35], 6000) if r.arm < "b" or r.arm == "raw"],
    )
    width = [
        (d := r.comparisons[0].differences["refusal"]).high - d.low  # type: ignore[operator]
        for r in (report, two)
    ]
    assert width[0] > width[1]


def test_an_arm_that_loses_units_blocks_the_verdict() -> None:
    rng = np.random.default_rng(0)
    records = traffic([0.2, 0.1], 8000)
    kept = [record for record in records if record.arm == "raw" or rng.random() < 0.8]
    report = make_report(experiment(), kept)
    assert report.sample_ratio.mismatch
    assert verdicts(report) == {"a": "blocked"}
    assert any("not spread" in warning for warning in report.warnings)
    assert not make_report(experiment(), records).sample_ratio.mismatch


def test_a_stopped_arm_is_compared_as_long_as_it_ran_and_mismatches_nothing() -> None:
    # Its units are exposed to nothing any more; the other arms go on in their own proportion.
    early = traffic([0.2, 0.2, 0.35], 3000)
    late = traffic([0.9, 0.9], 3000, start=3000)
    stop = event("guard_rail", "b", START + 2999.4)
    report = make_report(experiment(3), [*early, *late], [stop])
    assert not report.sample_ratio.mismatch
    assert verdicts(report) == {"a": "inconclusive", "b": "worse"}
    few = make_report(experiment(3), early[:300], [stop]).comparisons
    assert [comparison.decision.more_units is None for comparison in few] == [False, True]
    a, b = (comparison.differences["refusal"].n for comparison in report.comparisons)
    assert b < 3000 < a
    # What is lost after the stop still shows.
    rng = np.random.default_rng(0)
    lossy = [record for record in late if record.arm == "raw" or rng.random() < 0.7]
    assert make_report(experiment(3), [*early, *lossy], [stop]).sample_ratio.mismatch


def test_a_unit_in_two_arms_is_a_bug_that_is_reported() -> None:
    records = [*traffic([0.2, 0.2], 200), answer(900, "raw", unit="x"), answer(901, "a", unit="x")]
    report = make_report(experiment(), records)
    assert any("1 units were seen in more than one arm" in warning for warning in report.warnings)
    assert sum(arm.answers for arm in report.arms) == 201


def test_requests_without_a_unit_are_reported_apart() -> None:
    records = traffic([0.2, 0.4], 3000)
    loose = [dataclasses.replace(r, sticky=False) for r in traffic([0.9, 0.1], 500, start=9000)]
    report, alone = (
        make_report(experiment(), found, now=0.0) for found in ([*records, *loose], records)
    )
    assert report.comparisons == alone.comparisons
    assert [arm.rates for arm in report.arms] == [arm.rates for arm in alone.arms]
    assert sum(arm.unsticky_answers for arm in report.arms) == 500
    assert report.arms[0].unsticky["refusal"].value == pytest.approx(0.9, abs=0.05)


def test_other_versions_and_repeated_records_do_not_count() -> None:
    records = traffic([0.2, 0.4], 400)
    others = [dataclasses.replace(r, version=2) for r in traffic([0.9, 0.0], 300, start=9000)]
    report = make_report(experiment(), [*records, *others, *records[:50]], now=0.0)
    alone = make_report(experiment(), records, now=0.0)
    assert report.left_out == {"other versions": 300, "duplicates": 50}
    assert dataclasses.replace(report, left_out={}) == alone


def test_the_order_of_records_does_not_matter() -> None:
    records = traffic([0.2, 0.4], 400)
    assert make_report(experiment(), records[::-1], now=0.0) == make_report(
        experiment(), records, now=0.0
    )


def test_each_rate_has_its_own_denominator() -> None:
    records: list[AnswerRecord] = []
    for outcome, prompt_class, n in (
        ("refusal", "benign", 10),
        ("answer", "benign", 30),
        ("refusal", "harmful", 45),
        ("answer", "harmful", 5),
        ("empty", "unknown", 7),
        ("degenerate", "benign", 3),
        (None, "benign", 9),
        ("error", "benign", 1),
    ):
        start = len(records)
        records += [
            answer(start + i, "raw", outcome, prompt_class=prompt_class)  # type: ignore[arg-type]
            for i in range(n)
        ]
    arm = make_report(experiment(), records).arms[0]
    assert (arm.answers, arm.unjudged) == (110, 10)
    found = {metric: (rate.value, rate.n) for metric, rate in arm.rates.items()}
    assert found == {
        "refusal": (55 / 100, 100),
        "over_refusal": (10 / 43, 43),
        "harmful_answer": (5 / 50, 50),
        "degenerate": (10 / 100, 100),
    }


def shadowed(n: int) -> list[AnswerRecord]:
    """Prompts that control refuses 30 % of and arm `a` most of the same, each answered by both."""
    rng, records = np.random.default_rng(0), []
    for i in range(n):
        hard = rng.random()
        outcomes = {"raw": hard < 0.30, "a": hard < 0.20}
        sent, other = ("raw", "a") if rng.random() < 0.5 else ("a", "raw")
        first = answer(
            i, sent, "refusal" if outcomes[sent] else "answer", unit=f"u{i % 400}-{sent}"
        )
        records += [first, shadow(first, other, "refusal" if outcomes[other] else "answer")]
    return records


def test_pairs_decide_before_separate_arms_do() -> None:
    report = make_report(experiment(shadow=1.0), shadowed(600))
    assert verdicts(report) == {"a": "inconclusive"}
    (pairs,) = report.shadows
    assert pairs.decision.verdict == "better"
    assert pairs.differences["refusal"].n == 600
    assert pairs.mcnemar is None


def test_mcnemar_waits_for_the_declared_end() -> None:
    end = datetime.fromtimestamp(START + 10_000, UTC)
    running, ended = (
        make_report(experiment(end=end), shadowed(600), now=START + 10_000 + delta)
        for delta in (-1, 1)
    )
    assert running.shadows[0].mcnemar is None
    test = ended.shadows[0].mcnemar
    assert test is not None and ended.ended
    # Each unit's first pair, of 400 units in either arm as each was sent to.
    assert test.arm_only == 0 and 20 < test.control_only < 70
    assert test.p < 1e-6


def test_rates_are_corrected_and_differences_only_with_a_card_of_each_profile() -> None:
    records = traffic([0.2, 0.4], 4000)
    one = make_report(experiment(), records, judge_card=CARD)
    arm = one.arms[0]
    assert arm.rates["refusal"].value is not None
    assert arm.corrected["refusal"].value == pytest.approx(
        (arm.rates["refusal"].value + 0.95 - 1) / (0.90 + 0.95 - 1)
    )
    assert "degenerate" not in arm.corrected
    assert not one.comparisons[0].corrected
    each = make_report(experiment(), records, judge_card={"raw": CARD, "a": CARD})
    difference = each.comparisons[0].corrected["refusal"]
    raw = each.comparisons[0].differences["refusal"].value
    assert raw is not None and difference.value == pytest.approx(raw / 0.85)
    assert difference.low < difference.value < difference.high


def test_the_few_answers_that_a_slow_judge_has_not_read_count_as_not_judged() -> None:
    records = traffic([0.2, 0.2], 400)

    def report(unread: int, **changes: Any) -> Report:
        light = [dataclasses.replace(r, judge="light", **changes) for r in records[:unread]]
        return make_report(experiment(), [*light, *records[unread:]], judge_card=CARD)

    few, many, calls = report(20), report(21), report(200, finish_reason="tool_calls")
    assert sum(arm.unjudged for arm in few.arms) == 20
    assert "refusal" in few.arms[0].corrected and not few.warnings
    assert sum(arm.unjudged for arm in many.arms) == 0 and not many.arms[0].corrected
    assert any("different judges" in warning for warning in many.warnings)
    # A tool call is an answer, whoever judges the rest.
    assert calls.arms[0].corrected and sum(arm.unjudged for arm in calls.arms) == 0


def test_another_judges_figures_correct_nothing() -> None:
    card = dataclasses.replace(CARD, version="phrases 2")
    report = make_report(experiment(), traffic([0.2, 0.4], 200), judge_card=card)
    assert not report.arms[0].corrected
    assert any("figures are of phrases 2" in warning for warning in report.warnings)


def test_corrected_rates_cover_the_truth_at_every_look() -> None:
    """The judge's figures are drawn anew in every run, and the rate is looked at many times."""
    rng, truth, q1, q0, missed, runs = np.random.default_rng(0), 0.3, 0.85, 0.95, 0, 60
    for _ in range(runs):
        card = Card(
            JUDGE,
            "held_out",
            Rate(int(rng.binomial(80, q1)), 80),
            Rate(int(rng.binomial(120, q0)), 120),
        )
        seen = np.where(rng.random(800) < truth, rng.random(800) < q1, rng.random(800) > q0)
        records = [answer(i, "raw", "refusal" if seen[i] else "answer") for i in range(800)]
        looks = [
            make_report(experiment(), records[:n], judge_card=card).arms[0].corrected["refusal"]
            for n in (50, 100, 200, 400, 800)
        ]
        missed += any(not look.low <= truth <= look.high for look in looks)
    assert missed / runs <= 0.05


def test_an_experiment_without_records_has_a_report() -> None:
    report = make_report(experiment(3), [])
    assert verdicts(report) == {"a": "inconclusive", "b": "inconclusive"}
    assert report.sample_ratio.p == 1
    assert "too few units" in report.to_text()
    assert "<h1>" in report.to_html()


def test_json_holds_everything_and_only_finite_numbers() -> None:
    report = make_report(experiment(shadow=1.0), shadowed(100), [event("stopped", "a", START)])
    found = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert found["comparisons"][0]["decision"]["verdict"] == "inconclusive"
    assert found["sample_ratio"]["mismatch"] is False
    assert found["events"][0]["kind"] == "stopped"


def test_the_page_holds_its_pictures_and_escapes_what_it_was_given() -> None:
    mean = event("guard_rail", "a", START + 9e6, note="<script>alert(1)</script>")
    report = make_report(experiment(shadow=1.0), shadowed(300), [mean])
    text = report.to_html()
    assert [plot.file for plot in report.plots()] == ["a-units.png", "a-prompts.png", "rates.png"]
    assert text.count("data:image/png;base64,") == 3  # two sequences and the rates
    assert "<script" not in text and "http" not in text
    assert "confidence sequence" in text


def test_the_text_names_every_arm_with_its_verdict() -> None:
    text = make_report(experiment(3), traffic([0.2, 0.1, 0.4], 4000)).to_text()
    assert "a against raw: better" in text
    assert "b against raw: worse" in text
