"""A report as one HTML page that needs nothing else: no network, no scripts, pictures inside.

All text that came from a file or a client is escaped.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from html import escape

from server.experiments.report import Report, when
from server.experiments.report_text import (
    INTERVALS,
    NOT_CORRECTED,
    arm_rows,
    corrected_rows,
    difference_rows,
    headline,
    latency_rows,
    sample_ratio_line,
    unsticky_rows,
    verdict_line,
)
from steering.evaluate.page import CSS


def page(report: Report) -> str:
    """The page's HTML, with plots where matplotlib (extra `eval`) is installed."""
    return "\n".join(_page(report)) + "\n"


def _page(report: Report) -> Iterator[str]:
    title, control = f"Experiment {report.experiment.name}", report.experiment.control.name
    yield '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">'
    yield f"<title>{escape(title)}</title>"
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<style>{CSS}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>"
    yield f'<p class="lead">{escape(headline(report))}</p>'
    for warning in report.warnings:
        yield f'<p class="warning">{escape(warning)}</p>'
    yield "<h2>Verdict</h2>"
    for comparison in report.comparisons:
        yield f"<p>{_tag(comparison.decision.verdict)} {escape(verdict_line(comparison, control))}"
        yield "</p>"
    for comparison in report.shadows:
        line = "On the same prompts, " + verdict_line(comparison, control)
        yield f"<p>{_tag(comparison.decision.verdict)} {escape(line)}</p>"
    yield f"<p>{escape(sample_ratio_line(report))}</p>"
    if plots := report.plots():
        yield '<div class="plots">'
        for plot in plots:
            text, encoded = escape(plot.caption), base64.b64encode(plot.png).decode()
            yield f'<figure><img alt="{text}" src="data:image/png;base64,{encoded}">'
            yield f"<figcaption>{text}</figcaption></figure>"
        yield "</div>"
    yield "<h2>Arms</h2>"
    yield from _table(arm_rows(report))
    yield f"<p>{escape(INTERVALS)}</p>"
    for heading, rows in (
        ("Corrected for the judge's errors", corrected_rows(report)),
        (f"Less {control}, of different units", difference_rows(report.comparisons)),
        (f"Less {control}, on the same prompts", difference_rows(report.shadows)),
        ("Latencies", latency_rows(report)),
        ("Requests without a unit, apart", unsticky_rows(report)),
    ):
        if len(rows) > 1:
            yield f"<h2>{escape(heading)}</h2>"
            yield from _table(rows)
    if not any(comparison.corrected for comparison in report.comparisons):
        yield f"<p>{escape(NOT_CORRECTED)}</p>"
    if report.events:
        yield "<h2>Events</h2>"
        yield from _table(
            [
                ["time", "event", "arm", "figures"],
                *(
                    [when(e.time), e.kind, e.arm or "-", json.dumps(e.detail, default=str)]
                    for e in report.events
                ),
            ]
        )
    if report.left_out:
        yield "<h2>Left out</h2>"
        yield from _table([["records", "why"], *([str(n), r] for r, n in report.left_out.items())])
    definition = report.experiment.model_dump_json(indent=2)
    yield f"<details><summary>Definition</summary><pre>{escape(definition)}</pre></details>"
    yield "</body>\n</html>"


def _tag(verdict: str) -> str:
    mark = {"better": "right", "worse": "wrong", "blocked": "wrong"}.get(verdict, "quiet")
    return f'<span class="tag {mark}">{escape(verdict)}</span>'


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield '<div class="wide"><table class="figures">'
    for i, row in enumerate(rows):
        tag = "td" if i else "th"
        yield "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row) + "</tr>"
    yield "</table></div>"
