"""Pictures of what is inside: layers, gates, states before and after a map."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from steering.edit import Site

# Harmful and benign, source and target; blue and orange differ for everybody.
HARMFUL, BENIGN, MAPPED = "#D55E00", "#0072B2", "#009E73"
_POINTS = {"attn_out": ("attention", "#0072B2", "o"), "mlp_out": ("MLP", "#E69F00", "s")}


def layer_scores(profile: Mapping[str, Any]) -> Figure:
    """The score that LLM-VA chose sublayers by, in its first iteration; chosen ones are filled."""
    figure, axes = _layer_figure("layer score")
    sublayers = profile["layers"][0]["sublayers"]
    _layer_lines(axes, sublayers, "score")
    axes.plot([], [], "o", color="#555555", label="edited")
    if not all(values["chosen"] for values in sublayers.values()):
        axes.plot([], [], "o", color="#555555", markerfacecolor="white", label="left alone")
    figure.legend(loc="outside upper center", ncols=4)
    return figure


def cosines(profile: Mapping[str, Any]) -> Figure:
    """Of `v_a` and `v_b`, in the first and, if there is another, the last iteration."""
    figure, axes = _layer_figure("cosine of $v_a$ and $v_b$")
    first, last = profile["layers"][0], profile["layers"][-1]
    for entry in (first,) if last is first else (first, last):
        _layer_lines(
            axes,
            entry["sublayers"],
            "cosine",
            fill=True,
            faint=entry is not first,
            suffix="" if last is first else f", iteration {entry['iteration']}",
        )
    axes.axhline(0, color="#888888", linewidth=0.8)
    axes.set_ylim(-1.05, 1.05)
    figure.legend(loc="outside upper center", ncols=2)
    return figure


def _layer_figure(label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.8, 4.0), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel("layer")
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, axes


def _layer_lines(
    axes: Axes,
    sublayers: Mapping[str, Mapping[str, Any]],
    key: str,
    *,
    fill: bool = False,
    faint: bool = False,
    suffix: str = "",
) -> None:
    for point, (name, colour, marker) in _POINTS.items():
        found = sorted(
            (Site.parse(site).layer, values)
            for site, values in sublayers.items()
            if Site.parse(site).point == point
        )
        axes.plot(
            [layer for layer, _ in found],
            [values[key] for _, values in found],
            color=colour,
            linestyle="--" if faint else "-",
            alpha=0.6 if faint else 1.0,
            label=name + suffix,
        )
        for layer, values in found:
            filled = fill or values["chosen"]
            axes.plot(
                layer,
                values[key],
                marker,
                color=colour,
                markerfacecolor=colour if filled else "white",
                alpha=0.6 if faint else 1.0,
            )


def gate_histograms(gates: Sequence[Mapping[str, Any]]) -> Figure:
    """A panel per gate, as shares of the prompts of each label."""
    figure, panels = _panels(len(gates), width=4.2, height=3.1)
    for axes, gate in zip(panels, gates, strict=True):
        for label, colour in (("harmful", HARMFUL), ("benign", BENIGN)):
            counts = gate["counts"][label]
            total = max(1, sum(counts))
            shares = [count / total for count in counts]
            axes.stairs(shares, gate["edges"], fill=True, color=colour, alpha=0.35)
            axes.stairs(shares, gate["edges"], color=colour, linewidth=1.5, label=label)
        if gate["threshold"] is not None:
            axes.axvline(gate["threshold"], color="#333333", linestyle=":", label="threshold")
        auc = "" if gate["auc"] is None else f", AUC {gate['auc']:.3f}"
        axes.set_title(f"{gate['site']}{auc}", fontsize=10)
        axes.set_xlabel("gate value")
    panels[0].set_ylabel("share of prompts")
    _shared_legend(figure)
    return figure


def scatters(found: Sequence[Mapping[str, Any]]) -> Figure:
    """A panel per site."""
    figure, panels = _panels(len(found), width=4.8, height=4.4)
    clouds = (
        ("source", "source (harmful)", HARMFUL, "o"),
        ("target", "target (benign)", BENIGN, "s"),
        ("mapped", "mapped", MAPPED, "^"),
    )
    for axes, scatter in zip(panels, found, strict=True):
        for key, label, colour, marker in clouds:
            x, y = zip(*scatter[key], strict=True)
            axes.scatter(x, y, s=14, color=colour, marker=marker, alpha=0.45, linewidths=0)
            axes.scatter([], [], s=36, color=colour, marker=marker, label=label)
        axes.set_title(scatter["site"], fontsize=10)
        first, second = scatter["explained"]
        axes.set_xlabel(f"first component ({first:.0%})")
        axes.set_ylabel(f"second component ({second:.0%})")
    _shared_legend(figure)
    return figure


def _panels(count: int, *, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A grid of at most four columns."""
    columns = min(4, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(max(width * columns, 4.8), height * rows + 0.5), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels[count:]:
        axes.remove()
    return figure, panels[:count]


def _shared_legend(figure: Figure) -> None:
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
