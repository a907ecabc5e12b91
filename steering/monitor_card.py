"""What people are told about a monitor: how good each probe is, and where the thresholds lie."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from steering.monitor import Monitor, Probe


def card(monitor: Monitor) -> dict[str, Any]:
    """Everything but the numbers of the probes, in JSON.

    AUROC, calibration error and classes are of prompts that neither a probe nor its calibration
    nor a threshold has seen (`steering.monitor_fit`).
    """
    return {
        "base": monitor.base.to_json(),
        "template": monitor.template.to_json(),
        "benign": [_figures(probe) for probe in monitor.benign],
        "answer": [
            {"profile": name, "fingerprint": key, **_figures(probe), "constant": constant}
            for name, key, probe, constant in _answer(monitor)
        ],
        "harmful_below": monitor.harmful_below,
        "benign_above": monitor.benign_above,
        "classes": monitor.provenance.get("classes"),
        "refusal_token_ids": list(monitor.refusal_token_ids),
        "provenance": monitor.provenance,
    }


def table(monitor: Monitor) -> list[str]:
    """The card in lines for a terminal."""
    best = monitor.benign_probe if monitor.benign else None
    rows = [("benign", probe, "  best" if probe is best else "") for probe in monitor.benign] + [
        (f"answer, {name}", probe, "  constant" if constant else "")
        for name, _, probe, constant in _answer(monitor)
    ]
    width = max((len(what) for what, _, _ in rows), default=0)
    lines = [f"{'probe':{width}}  {'site':14}  AUROC  calibration error"]
    for what, probe, mark in rows:
        error = probe.expected_calibration_error
        lines.append(f"{what:{width}}  {probe.site!s:14}  {probe.auroc:.3f}  {error:.4f}{mark}")
    lines.append(
        f"a prompt is harmful below {monitor.harmful_below:g} and benign above "
        f"{monitor.benign_above:g}, else unknown"
    )
    for label, classes in (monitor.provenance.get("classes") or {}).items():
        counts = ", ".join(f"{count} {name}" for name, count in classes.items())
        lines.append(f"of {sum(classes.values())} held-out {label} prompts: {counts}")
    return lines


def _figures(probe: Probe) -> dict[str, Any]:
    return {
        "site": str(probe.site),
        "auroc": probe.auroc,
        "expected_calibration_error": probe.expected_calibration_error,
    }


def _answer(monitor: Monitor) -> Iterator[tuple[str, str, Probe, str | None]]:
    """Name, fingerprint, probe, and why it is constant if it is, of each profile."""
    made = monitor.provenance.get("answer") or {}
    for key, probe in monitor.answer.items():
        about = made.get(key) or {}
        yield about.get("profile") or key[:12] or "raw", key, probe, about.get("constant")
