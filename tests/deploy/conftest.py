"""What `deploy/` holds, as data. Nothing here starts anything."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DASHBOARDS = sorted((DEPLOY / "grafana/dashboards").glob("*.json"))
RULES = sorted((DEPLOY / "prometheus/rules").glob("*.yml"))


def load(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text("utf-8")))


def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    """Every panel but the rows' heads."""
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def queries(panel: dict[str, Any]) -> Iterator[str]:
    for target in panel["targets"]:
        yield target["expr"]


def fill_in(expr: str, *, window: str = "5m", job: str = ".*", **values: str) -> str:
    """A query as Grafana would send it."""
    known = {"window": window, "__rate_interval": window, "job": job} | values
    return re.sub(r"\$(\w+)", lambda found: known.get(found[1], ".*"), expr)
