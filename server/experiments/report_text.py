"""A report as lines of text, and as the tables that the page shows too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from server.experiments.report import ArmReport, Bounds, Comparison, Interval, Report, when

LABELS = {
    "refusal": "refused",
    "over_refusal": "refused, of benign",
    "harmful_answer": "answered, of harmful",
    "degenerate": "degenerate or empty",
    "refusal_score": "refusal score",
    "answer_probability": "answer probability",
}
SECONDS = {
    "ttft_seconds": "first token, mean seconds",
    "duration_seconds": "whole answer, mean seconds",
}

Rows = list[list[str]]


def headline(report: Report) -> str:
    """Version, metric, and when."""
    experiment = report.experiment
    left = sum(arm.stopped is None for arm in report.arms)
    over = report.ended or left < 2 or any(event.kind == "removed" for event in report.events)
    early = experiment.start is not None and report.time < experiment.start.timestamp()
    state = "ended" if over else "scheduled" if early else "running"
    return (
        f"Version {experiment.version}, {state}, {when(report.time)}. Metric: {experiment.metric}, "
        f"{experiment.better} is better; margin {experiment.margin:g}, alpha {experiment.alpha:g}."
    )


def verdict_line(comparison: Comparison, control: str) -> str:
    """One arm's verdict in a sentence."""
    decision = comparison.decision
    line = f"{comparison.arm} against {control}: {decision.verdict}; {decision.why}."
    if decision.more_units is not None:
        line += f" About {decision.more_units:,} more units of the two may decide."
    test = comparison.mcnemar
    if test is not None:
        line += (
            f" McNemar at the end, first pair of each unit: {test.arm_only} only {comparison.arm}, "
            f"{test.control_only} only {control}, p = {test.p:.3g} (Holm {test.holm_p:.3g})."
        )
    return line


def sample_ratio_line(report: Report) -> str:
    """Whether units are spread as they should be."""
    ratio = report.sample_ratio
    seen = ", ".join(
        f"{name} {n} (expected {ratio.expected[name]:.1%})" for name, n in ratio.units.items()
    )
    word = "MISMATCH" if ratio.mismatch else "as expected"
    return f"Units: {seen}: {word}, p = {ratio.p:.3g}."


def arm_rows(report: Report) -> Rows:
    """Rates and scores by arm, with a header."""
    header = ["arm", "profile", "units", "answers", "not judged", *LABELS.values()]
    return [header, *(_arm_row(arm) for arm in report.arms)]


def _arm_row(arm: ArmReport) -> list[str]:
    name = f"{arm.name} (control)" if arm.control else arm.name
    if arm.stopped is not None:
        name += f" (stopped {when(arm.stopped)})"
    profile = arm.profile if arm.strength is None else f"{arm.profile} x {arm.strength:g}"
    figures = [shown(arm.rates[metric]) for metric in arm.rates]
    figures += [shown(arm.scores[score]) for score in arm.scores]
    return [name, profile, str(arm.units), str(arm.answers), str(arm.unjudged), *figures]


def corrected_rows(report: Report) -> Rows:
    """Corrected rates by arm; a header alone where none could be."""
    metrics = [m for m in LABELS if any(m in arm.corrected for arm in report.arms)]
    rows = [["arm", *(LABELS[m] for m in metrics)]]
    if metrics:
        corrected = ({str(m): b for m, b in arm.corrected.items()} for arm in report.arms)
        rows += [
            [arm.name, *(shown(found.get(m)) for m in metrics)]
            for arm, found in zip(report.arms, corrected, strict=True)
        ]
    return rows


def latency_rows(report: Report) -> Rows:
    """Latencies by arm."""
    rows = [["arm", "first token, median", "95th", "whole answer, median", "95th"]]
    for arm in report.arms:
        latency = arm.latency
        seconds = (
            latency.ttft_median,
            latency.ttft_p95,
            latency.duration_median,
            latency.duration_p95,
        )
        rows.append([arm.name, *("-" if s is None else f"{s:.3f} s" for s in seconds)])
    return rows


def difference_rows(comparisons: Sequence[Comparison]) -> Rows:
    """Differences to control, a row for each arm and figure."""
    rows = [["arm", "figure", "difference", "of", "corrected"]]
    for comparison in comparisons:
        corrected = {str(metric): bounds for metric, bounds in comparison.corrected.items()}
        for what, interval in comparison.differences.items():
            of = f"{interval.n} values, {interval.units} units"
            row = [comparison.arm, (LABELS | SECONDS)[what], shown(interval, sign=True), of]
            rows.append([*row, shown(corrected.get(what), sign=True)])
    return rows


def unsticky_rows(report: Report) -> Rows:
    """Rates of requests without a unit; a header alone where there are none."""
    rows = [["arm", "requests", *(LABELS[metric] for metric in report.arms[0].rates)]]
    for arm in report.arms:
        if arm.unsticky_answers:
            figures = [shown(arm.unsticky[metric]) for metric in arm.rates]
            rows.append([arm.name, str(arm.unsticky_answers), *figures])
    return rows


def shown(figure: Interval | Bounds | None, *, sign: bool = False) -> str:
    """`0.150 [0.101, 0.199]`."""
    if figure is None or figure.value is None:
        return "-"
    form = "+.3f" if sign else ".3f"
    value = format(figure.value, form)
    if figure.low is None or figure.high is None:
        return f"{value} [no interval]"
    return f"{value} [{figure.low:{form}}, {figure.high:{form}}]"


INTERVALS = (
    "Intervals in brackets are confidence sequences: they hold at every look, at once for all "
    "arms compared to control. They are clustered by unit."
)
NOT_CORRECTED = (
    "Differences are as the judge saw them: judges err differently on different profiles, so that "
    "they are corrected only with figures for each profile."
)


def lines(report: Report) -> Iterator[str]:
    """The report for a terminal."""
    control = report.experiment.control.name
    yield f"Experiment {report.experiment.name}"
    yield headline(report)
    for warning in report.warnings:
        yield f"WARNING: {warning}"
    yield ""
    for comparison in report.comparisons:
        yield verdict_line(comparison, control)
    for comparison in report.shadows:
        yield "On the same prompts, " + verdict_line(comparison, control)
    yield sample_ratio_line(report)
    yield ""
    yield from table(arm_rows(report))
    for title, rows in (
        ("Corrected for the judge's errors", corrected_rows(report)),
        ("Latencies", latency_rows(report)),
        (f"Less {control}, of different units", difference_rows(report.comparisons)),
        (f"Less {control}, on the same prompts", difference_rows(report.shadows)),
        ("Requests without a unit, apart", unsticky_rows(report)),
    ):
        if len(rows) > 1:
            yield ""
            yield f"{title}:"
            yield from table(rows)
    yield ""
    yield INTERVALS
    if not any(comparison.corrected for comparison in report.comparisons):
        yield NOT_CORRECTED
    for event in report.events:
        yield f"{when(event.time)}: {event.kind} {event.arm or ''}".rstrip()
    for reason, n in report.left_out.items():
        yield f"Left out: {n} {reason}."


def table(rows: Rows) -> Iterator[str]:
    """Columns side by side."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
