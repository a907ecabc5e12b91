"""What Grafana's dashboards are made of: panels, variables, and rates with intervals in PromQL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

Json = dict[str, Any]

DATASOURCE: Json = {"type": "prometheus", "uid": "${datasource}"}
Z = 1.96
"""Quantile of the normal distribution of a 95 % interval."""


def select(metric: str, labels: str = "", *, by_profile: bool = True) -> str:
    """A selector of the series that the dashboard's variables choose."""
    chosen = ['job=~"$job"', 'instance=~"$instance"']
    if by_profile:
        chosen.append('profile=~"$profile"')
    return f"steering_{metric}{{{','.join([*chosen, *filter(None, [labels])])}}}"


def rate(metric: str, by: str = "", labels: str = "", *, by_profile: bool = True) -> str:
    """Events per second."""
    events = f"rate({select(metric, labels, by_profile=by_profile)}[$__rate_interval])"
    return f"sum by ({by}) ({events})" if by else f"sum({events})"


def count(metric: str, by: str, labels: str = "", *, by_profile: bool = True, ago: str = "") -> str:
    """Events within the window that the variable `window` holds, which ends `ago`."""
    offset = f" offset {ago}" if ago else ""
    selected = select(metric, labels, by_profile=by_profile)
    return f"sum by ({by}) (increase({selected}[$window]{offset}))"


def quantile(q: float, metric: str, by: str = "", *, by_profile: bool = True) -> str:
    grouped = ", ".join(filter(None, ["le", by]))
    buckets = rate(f"{metric}_bucket", grouped, by_profile=by_profile)
    return f"histogram_quantile({q}, {buckets})"


def mean(metric: str, by: str, *, ago: str = "") -> str:
    """Mean of a histogram's observations within the window."""
    return f"{count(f'{metric}_sum', by, ago=ago)} / {count(f'{metric}_count', by, ago=ago)}"


def wilson(successes: str, trials: str, side: Literal["low", "high"]) -> str:
    """An end of Wilson's 95 % interval of a rate.

    Counts from `increase` are extrapolated, each by itself, so there may seem to be more successes
    than trials.
    """
    sign = "-" if side == "low" else "+"
    spread = (
        f"sqrt({successes} * clamp_min({trials} - {successes}, 0) / {trials} + {Z * Z / 4:.4f})"
    )
    return f"({successes} + {Z * Z / 2:.4f} {sign} {Z} * {spread}) / ({trials} + {Z * Z:.4f})"


def panel(
    kind: str,
    title: str,
    description: str,
    unit: str,
    queries: Mapping[str, str] | Sequence[tuple[str, str]],
    *,
    width: int = 12,
    height: int = 8,
    instant: bool = False,
    stacked: bool = False,
    top: float | None = None,
    repeat: str | None = None,
    overrides: Sequence[Json] = (),
    transformations: Sequence[Json] = (),
    options: Json | None = None,
) -> Json:
    """A panel without its place.

    Args:
        queries: PromQL by legend.
        instant: only the last value, as a table's row.
        top: of the axis.
    """
    pairs = list(queries.items()) if isinstance(queries, Mapping) else list(queries)
    form = "heatmap" if kind == "heatmap" else "table" if kind == "table" else "time_series"
    targets = [
        {
            "refId": chr(ord("A") + i),
            "datasource": DATASOURCE,
            "expr": expr,
            "legendFormat": legend,
            "format": form,
            "instant": instant,
            "range": not instant,
        }
        for i, (legend, expr) in enumerate(pairs)
    ]
    custom: Json = {}
    if kind == "timeseries":
        custom = {"fillOpacity": 30 if stacked else 8, "lineWidth": 1, "showPoints": "never"}
        if stacked:
            custom["stacking"] = {"mode": "normal"}
    defaults: Json = {"unit": unit, "custom": custom}
    if unit != "none" and kind == "timeseries" and top is not None:
        defaults |= {"min": 0, "max": top}
    made: Json = {
        "type": kind,
        "title": title,
        "description": description,
        "datasource": DATASOURCE,
        "targets": targets,
        "fieldConfig": {"defaults": defaults, "overrides": list(overrides)},
        "options": _OPTIONS.get(kind, {}) | (options or {}),
        "gridPos": {"h": height, "w": width},
    }
    if transformations:
        made["transformations"] = list(transformations)
    if repeat:
        made |= {"repeat": repeat, "repeatDirection": "h", "maxPerRow": 4}
    return made


_OPTIONS: dict[str, Json] = {
    "timeseries": {
        "legend": {"displayMode": "list", "placement": "bottom"},
        "tooltip": {"mode": "multi", "sort": "desc"},
    },
    "heatmap": {
        "calculate": False,
        "cellGap": 1,
        "color": {"mode": "scheme", "scheme": "Oranges", "steps": 64, "exponent": 0.5},
        "yAxis": {"axisPlacement": "left"},
        "tooltip": {"mode": "single", "yHistogram": True},
    },
    "stat": {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "value"},
    "table": {"showHeader": True, "cellHeight": "sm"},
}


def heatmap(title: str, description: str, metric: str, *, width: int = 8) -> Json:
    return panel(
        "heatmap",
        title,
        description,
        "short",
        {"{{le}}": "sum by (le) (increase(" + select(f"{metric}_bucket") + "[$__rate_interval]))"},
        width=width,
    )


def band(
    title: str, description: str, successes: str, trials: str, *, repeat: str, width: int = 6
) -> Json:
    """A rate over time between the ends of its interval, one panel per value of a variable."""

    def styled(name: str, **custom: Any) -> Json:
        properties = [{"id": f"custom.{key}", "value": value} for key, value in custom.items()]
        return {"matcher": {"id": "byName", "options": name}, "properties": properties}

    return panel(
        "timeseries",
        title,
        description,
        "percentunit",
        {
            "rate": f"{successes} / {trials}",
            "low": wilson(successes, trials, "low"),
            "high": wilson(successes, trials, "high"),
        },
        width=width,
        top=1,
        repeat=repeat,
        overrides=[
            styled("low", lineWidth=0, fillOpacity=0),
            styled("high", lineWidth=0, fillBelowTo="low", fillOpacity=20),
            styled("rate", lineWidth=2, fillOpacity=0),
        ],
    )


def table(
    title: str,
    description: str,
    columns: Mapping[str, tuple[str, str]],
    *,
    width: int = 24,
    height: int = 8,
    hidden: Sequence[str] = (),
) -> Json:
    """One row per set of labels.

    Args:
        columns: unit and PromQL by name.
        hidden: labels that are not shown.
    """
    letters = [chr(ord("A") + i) for i in range(len(columns))]
    renamed = {f"Value #{letter}": name for letter, name in zip(letters, columns, strict=True)}
    if len(columns) == 1:
        renamed["Value"] = next(iter(columns))
    return panel(
        "table",
        title,
        description,
        "short",
        [(name, expr) for name, (_, expr) in columns.items()],
        width=width,
        height=height,
        instant=True,
        overrides=[
            {
                "matcher": {"id": "byName", "options": name},
                "properties": [{"id": "unit", "value": unit}, {"id": "decimals", "value": 3}],
            }
            for name, (unit, _) in columns.items()
        ],
        transformations=[
            {"id": "merge", "options": {}},
            {
                "id": "organize",
                "options": {
                    "excludeByName": dict.fromkeys(("Time", *hidden), True),
                    "renameByName": renamed,
                },
            },
        ],
    )


def _query_variable(name: str, label: str, query: str, *, multi: bool = True) -> Json:
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": DATASOURCE,
        "definition": query,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "sort": 1,
        "multi": multi,
        "includeAll": multi,
        **({"allValue": ".*"} if multi else {}),
        "current": {"text": ["All"], "value": ["$__all"]} if multi else {},
    }


def variables(*more: tuple[str, str, str, bool]) -> list[Json]:
    """Data source, job, instance and window, and `more` of name, label, query, several or one."""
    windows = ("1m", "5m", "15m", "1h", "6h", "1d")
    return [
        {
            "name": "datasource",
            "label": "Data source",
            "type": "datasource",
            "query": "prometheus",
            "current": {},
        },
        _query_variable("job", "Job", "label_values(steering_build_info, job)"),
        _query_variable(
            "instance", "Instance", 'label_values(steering_build_info{job=~"$job"}, instance)'
        ),
        *(_query_variable(name, label, query, multi=multi) for name, label, query, multi in more),
        {
            "name": "window",
            "label": "Window of rates with intervals",
            "type": "custom",
            "query": ",".join(windows),
            "options": [{"text": w, "value": w, "selected": w == "5m"} for w in windows],
            "current": {"text": "5m", "value": "5m"},
        },
    ]


def dashboard(
    uid: str,
    title: str,
    description: str,
    variables: Sequence[Json],
    rows: Mapping[str, Sequence[Json]],
) -> Json:
    """A dashboard with its panels in place: rows of 24 columns, filled from the left."""
    placed: list[Json] = []
    top = 0
    for name, panels in rows.items():
        head: Json = {"type": "row", "title": name, "collapsed": False, "panels": []}
        placed.append(head | {"gridPos": {"h": 1, "w": 24, "x": 0, "y": top}})
        top += 1
        left = height = 0
        for made in panels:
            size = made["gridPos"]
            # A repeated panel takes a line of its own, however many there will be.
            if left + size["w"] > 24 or (made.get("repeat") and left):
                top, left, height = top + height, 0, 0
            placed.append(made | {"gridPos": size | {"x": left, "y": top}})
            left = 24 if made.get("repeat") else left + size["w"]
            height = max(height, size["h"])
        top += height
    return {
        "id": None,
        "uid": uid,
        "title": title,
        "description": description,
        "tags": ["pilothouse"],
        "schemaVersion": 39,
        "version": 1,
        "editable": False,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "templating": {"list": list(variables)},
        "annotations": {
            "list": [
                {
                    "name": "Alerts",
                    "datasource": DATASOURCE,
                    "enable": True,
                    "iconColor": "red",
                    "expr": 'ALERTS{alertname=~"Steering.*",alertstate="firing"}',
                    "titleFormat": "{{alertname}}",
                    "textFormat": "{{profile}} {{prompt_class}}",
                }
            ]
        },
        "links": [
            {
                "type": "dashboards",
                "title": "Pilothouse",
                "tags": ["pilothouse"],
                "asDropdown": True,
                "keepTime": True,
            }
        ],
        "panels": [made | {"id": i} for i, made in enumerate(placed, 1)],
    }


PROFILE = (
    "profile",
    "Profile",
    'label_values(steering_requests_total{job=~"$job"}, profile)',
    True,
)
"""The variable of dashboards about profiles."""
