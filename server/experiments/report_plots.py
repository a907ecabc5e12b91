"""A report's pictures; needs matplotlib (extra `eval`). Okabe and Ito's colours, never pyplot."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass

import matplotlib
from matplotlib.figure import Figure

from server.experiments.report import Comparison, Report
from server.experiments.report_text import LABELS
from steering.evaluate.plots import COLOURS, MARKERS, STYLE


@dataclass(frozen=True)
class Plot:
    """One picture.

    Args:
        file: name that it may be kept under.
    """

    file: str
    caption: str
    png: bytes


def draw(report: Report) -> list[Plot]:
    """A confidence sequence over time for each comparison that has one, and the arms' rates."""
    found = []
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]  # its keys are literals
        for name, caption, figure in _figures(report):
            file = io.BytesIO()
            figure.savefig(file, format="png", metadata={"Software": None})
            found.append(Plot(f"{name}.png", caption, file.getvalue()))
    return found


def _figures(report: Report) -> Iterator[tuple[str, str, Figure]]:
    control, metric = report.experiment.control.name, LABELS[report.experiment.metric]
    for end, kind, comparisons in (
        ("units", "of different units", report.comparisons),
        ("prompts", "on the same prompts", report.shadows),
    ):
        for comparison in comparisons:
            if comparison.looks:
                yield (
                    f"{comparison.arm}-{end}",
                    f"{comparison.arm} less {control}, {metric}, {kind}: estimate and confidence "
                    "sequence over time; the dotted lines are the margin.",
                    sequence(report, comparison),
                )
    if any(rate.n for arm in report.arms for rate in arm.rates.values()):
        yield (
            "rates",
            "Rates by arm; the lines are confidence sequences, none where units are few.",
            rates(report),
        )


def sequence(report: Report, comparison: Comparison) -> Figure:
    """Estimate and interval of the experiment's metric against the number of units."""
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    colour = _colour(report, comparison.arm)
    units = [look.units for look in comparison.looks]
    # Units that return bring looks without new units: the picture goes by values then.
    by_units = len(set(units)) > 1 and units[-1] == comparison.looks[-1].n
    x = units if by_units else [look.n for look in comparison.looks]
    low, high = [k.low for k in comparison.looks], [k.high for k in comparison.looks]
    axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.plot(x, [look.value for look in comparison.looks], color=colour)
    axes.axhline(0, color="#000000", linewidth=1)
    margin = report.experiment.margin
    for line in (-margin, margin):
        axes.axhline(line, color="#7F7F7F", linestyle=":", linewidth=1)
    # The first intervals are so wide that nothing else would be seen.
    last, later = comparison.looks[-1], comparison.looks[len(comparison.looks) // 10]
    reach = max(
        abs(later.low), abs(later.high), abs(last.low), abs(last.high), 1.5 * margin
    )  # fmt: skip
    axes.set_ylim(-reach, reach)
    axes.set_xlabel("units" if by_units else "judged answers or pairs")
    axes.set_ylabel(f"{LABELS[report.experiment.metric]}, less {report.experiment.control.name}")
    return figure


def rates(report: Report) -> Figure:
    """All rates with their intervals, by arm."""
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    metrics = list(report.arms[0].rates)
    for i, arm in enumerate(report.arms):
        shift = (i - (len(report.arms) - 1) / 2) * 0.7 / len(report.arms)
        colour, marker = _colour(report, arm.name), MARKERS[i % len(MARKERS)]
        shown = [(j + shift, arm.rates[m]) for j, m in enumerate(metrics) if arm.rates[m].n]
        axes.plot(
            [x for x, _ in shown],
            [rate.value or 0.0 for _, rate in shown],
            linestyle="",
            marker=marker,
            color=colour,
            label=arm.name,
        )
        for x, rate in shown:
            if rate.low is not None and rate.high is not None:
                axes.plot([x, x], [rate.low, rate.high], color=colour, linewidth=1.5)
    labels = [LABELS[metric].replace(", ", ",\n").replace(" or ", "\nor ") for metric in metrics]
    axes.set_xticks(range(len(metrics)), labels)
    axes.set_ylim(-0.02, 1.02)
    axes.set_ylabel("rate")
    axes.legend()
    return figure


def _colour(report: Report, arm: str) -> str:
    names = [each.name for each in report.arms]
    return COLOURS[names.index(arm) % len(COLOURS)]
