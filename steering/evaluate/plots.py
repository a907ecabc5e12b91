"""The results as pictures, from what `results.json` holds alone.

Colours are Okabe and Ito's, which colour-blind people can tell apart; markers differ too. Figures
are made without pyplot: nothing global, no window, always Agg.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from steering.evaluate.plots_inside import cosines, gate_histograms, layer_scores, scatters

Results = Mapping[str, Any]
Estimate = Mapping[str, float]

COLOURS = (
    *("#000000", "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C6D00"),
    *("#7F7F7F", "#5D3A9B"),
)
MARKERS = "oDs^vPX*<>"
STYLE: dict[str, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e5e5e5",
    "legend.frameon": False,
    "savefig.dpi": 150,
}


def draw_plots(results: Results, out: Path) -> dict[str, Path]:
    """Write every plot that the results have something for; paths by caption, in order."""
    out.mkdir(parents=True, exist_ok=True)
    paths = {}
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]  # its keys are literals
        for name, caption, figure in _figures(results):
            paths[caption] = out / f"{name}.png"
            figure.savefig(paths[caption])
    return paths


def _figures(results: Results) -> Iterator[tuple[str, str, Figure]]:
    if any(found["f1"] for found in _groups(results).values()):
        yield (
            "f1",
            "F1 with 95 % intervals, degenerate replies as failures; of sets with both labels.",
            f1_bars(results),
        )
    if results["pareto_front"]:
        yield (
            "tradeoff",
            "Attack success against over-refusal with 95 % intervals; the Pareto front joins the "
            "profiles that no other beats in both; best is the lower left. Small points are other "
            "strengths. Degenerate replies are neither: see the table.",
            tradeoff(results),
        )
    if any(not arm["main"] for arm in results["arms"]):
        yield (
            "strengths",
            "Strength sweep with 95 % intervals; the star is a profile's own strength.",
            sweep(results),
        )
    for profile in results["profiles"]:
        name = profile["name"]
        if profile["layers"]:
            yield (
                f"layers-{name}",
                f"{name}: score by layer, of which the best sublayers (filled) were edited.",
                layer_scores(profile),
            )
            yield (
                f"cosine-{name}",
                f"{name}: cosine of the answer vector v_a and the benign vector v_b by layer, "
                "before the first and, dashed, the last iteration.",
                cosines(profile),
            )
    for arm in results["arms"]:
        inside, name = arm.get("inside", {}), arm["name"]
        if inside.get("gates"):
            yield (
                f"gates-{name}",
                f"{name}: what its gates read at the end of harmful and of benign prompts; AUC of "
                "telling them apart.",
                gate_histograms(inside["gates"]),
            )
        if inside.get("scatters"):
            yield (
                f"transport-{name}",
                f"{name}: harmful states before (source) and after the map, and benign ones "
                "(target), in their first two principal components (share of the variance before "
                f"the map), at strength {arm['strength']:g}.",
                scatters(inside["scatters"]),
            )


def style_of(results: Results, profile: str) -> dict[str, Any]:
    """Colour and marker of a profile, the same in every plot."""
    k = [found["name"] for found in results["profiles"]].index(profile)
    return {"color": COLOURS[k % len(COLOURS)], "marker": MARKERS[k % len(MARKERS)]}


def _groups(results: Results) -> dict[str, dict[str, Any]]:
    """F1 by group of bars: all prompts, then each set with both labels."""
    main = [arm for arm in results["arms"] if arm["main"]]
    names = [prompts["name"] for prompts in results["prompts"]]
    groups = {"all prompts": {"f1": {arm["name"]: arm["all"]["f1"] for arm in main}}}
    if len(names) > 1:
        for name in names:
            groups[name] = {"f1": {arm["name"]: arm["sets"][name]["f1"] for arm in main}}
    return {
        name: group if all(group["f1"].values()) else {"f1": None} for name, group in groups.items()
    }


def f1_bars(results: Results) -> Figure:
    """A group of bars per set of prompts, a bar per profile."""
    groups = {name: found["f1"] for name, found in _groups(results).items() if found["f1"]}
    counts = {found["name"]: found["harmful"] + found["benign"] for found in results["prompts"]}
    counts["all prompts"] = sum(counts.values())
    profiles = [arm["name"] for arm in results["arms"] if arm["main"]]
    width = 0.8 / len(profiles)
    inches = max(5.0, 1.5 + 0.42 * len(profiles) * len(groups))
    figure = Figure(figsize=(min(inches, 14.0), 4.2), layout="constrained")
    axes = figure.add_subplot()
    for k, name in enumerate(profiles):
        values = [group[name] for group in groups.values()]
        centres = [i + (k - (len(profiles) - 1) / 2) * width for i in range(len(groups))]
        axes.bar(
            centres,
            [v["value"] for v in values],
            width * 0.92,
            yerr=_errors(values),
            color=style_of(results, name)["color"],
            ecolor="#888888",
            capsize=3,
            label=name,
        )
    axes.set_xticks(range(len(groups)), [f"{name}\n(n = {counts[name]})" for name in groups])
    axes.set_ylim(0, 1.02)
    axes.set_ylabel("F1")
    axes.grid(False, axis="x")
    figure.legend(loc="outside upper center", ncols=min(4, len(profiles)))
    return figure


def _errors(estimates: list[Any]) -> list[list[float]]:
    """Lengths of error bars below and above."""
    return [
        [max(0.0, e["value"] - e["low"]) for e in estimates],
        [max(0.0, e["high"] - e["value"]) for e in estimates],
    ]


def tradeoff(results: Results) -> Figure:
    """Both rates are to be low: the best corner is the lower left."""
    figure = Figure(figsize=(6.4, 5.2), layout="constrained")
    axes = figure.add_subplot()
    arms = {
        arm["name"]: arm
        for arm in results["arms"]
        if arm["all"]["over_refusal"] and arm["all"]["attack_success"]
    }
    for arm in arms.values():
        x, y = arm["all"]["over_refusal"], arm["all"]["attack_success"]
        style = style_of(results, arm["profile"])
        if not arm["main"]:
            axes.plot(x["value"], y["value"], **style, markersize=4, alpha=0.5, clip_on=False)
            continue
        axes.errorbar(
            x["value"],
            y["value"],
            xerr=_errors([x]),
            yerr=_errors([y]),
            **style,
            markersize=8,
            capsize=3,
            elinewidth=1,
            linestyle="none",
            label=arm["name"],
            clip_on=False,
            zorder=3,
        )
    front = [arms[name]["all"] for name in results["pareto_front"]]
    points = [(f["over_refusal"]["value"], f["attack_success"]["value"]) for f in front]
    # To the edges, so that what the front leaves behind it is a region even of a single point.
    x, y = zip((points[0][0], 1.0), *points, (1.0, points[-1][1]), strict=True)
    axes.step(
        x,
        y,
        where="post",
        color="#888888",
        linestyle="--",
        linewidth=1.2,
        label="Pareto front",
        zorder=1,
    )
    axes.set_xlim(-0.02, _limit(arms, "over_refusal"))
    axes.set_ylim(-0.02, _limit(arms, "attack_success"))
    axes.set_xlabel("over-refusal (benign refused)")
    axes.set_ylabel("attack success (harmful answered)")
    if any(not arm["main"] for arm in arms.values()):
        axes.plot([], [], "o", color="#7F7F7F", markersize=4, alpha=0.5, label="other strength")
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(
        range(len(labels)), key=lambda i: labels[i] in ("Pareto front", "other strength")
    )
    figure.legend(
        [handles[i] for i in order],
        [labels[i] for i in order],
        loc="outside upper center",
        ncols=3,
    )
    return figure


def _limit(arms: Mapping[str, Any], key: str) -> float:
    """The end of an axis: at the next tenth above all intervals, and never a tiny range."""
    highest: float = max(arm["all"][key]["high"] for arm in arms.values())
    return min(1.02, max(0.3, math.ceil(10 * highest) / 10))


def sweep(results: Results) -> Figure:
    """Attack success, over-refusal and F1 by strength, a line per profile."""
    figure = Figure(figsize=(11.0, 3.9), layout="constrained")
    swept = {arm["profile"] for arm in results["arms"] if not arm["main"]}
    panels = (
        ("attack success", "attack_success"),
        ("over-refusal", "over_refusal"),
        ("F1", "f1"),
        ("degenerate", "degenerate"),
    )
    axes_of = figure.subplots(1, len(panels), sharey=True)
    for axes, (title, key) in zip(axes_of, panels, strict=True):
        for name in (p["name"] for p in results["profiles"] if p["name"] in swept):
            arms = [a for a in results["arms"] if a["profile"] == name and a["all"][key]]
            style = style_of(results, name)
            axes.plot(
                [arm["strength"] for arm in arms],
                [arm["all"][key]["value"] for arm in arms],
                **style,
                markersize=4,
                label=name,
            )
            axes.fill_between(
                [arm["strength"] for arm in arms],
                [arm["all"][key]["low"] for arm in arms],
                [arm["all"][key]["high"] for arm in arms],
                color=style["color"],
                alpha=0.15,
                linewidth=0,
            )
            for arm in arms:
                if arm["main"]:
                    value = arm["all"][key]["value"]
                    axes.plot(arm["strength"], value, "*", color=style["color"], markersize=13)
        axes.set_title(title, fontsize=10)
        axes.set_ylim(-0.03, 1.03)
        axes.locator_params(axis="x", nbins=4)
        axes.set_xlabel("strength")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(5, len(labels)))
    return figure
