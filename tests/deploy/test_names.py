"""Dashboards, rules and code mean the same metrics."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from server.metrics import Metrics
from tests.deploy.conftest import DASHBOARDS, DEPLOY

# A recorded series has colons around the metric's name.
_METRIC = re.compile(r"(?<![:\w])steering_[a-z0-9_]+\b(?!:)")


def exported() -> dict[str, str]:
    """Metric by each name of its series: `_bucket`, `_count`, and `_sum` where there is one."""
    metrics = Metrics(["raw"])
    metrics.add_experiment("trial", {"control": 1.0})
    families = list(text_string_to_metric_families(metrics.page("")[0].decode()))
    names = {name: name for name in metrics.names}
    for family in families:
        if family.type == "histogram":
            for sample in family.samples:
                names[sample.name] = family.name
            for suffix in ("bucket", "count"):
                names[f"{family.name}_{suffix}"] = family.name
    return names


def used(path: Path) -> set[str]:
    return set(_METRIC.findall(path.read_text("utf-8")))


@pytest.mark.parametrize(
    "path",
    [*DASHBOARDS, *sorted(p for p in (DEPLOY / "prometheus").glob("*/*") if p.is_file())],
    ids=lambda path: path.name,
)
def test_every_metric_that_is_asked_for_exists(path: Path) -> None:
    known = exported()
    unknown = sorted(name for name in used(path) if name not in known)
    assert not unknown, f"{path.name} asks for metrics that nobody exports: {unknown}"


def test_every_metric_is_on_some_dashboard() -> None:
    known = exported()
    shown = {known[name] for path in DASHBOARDS for name in used(path)}
    assert sorted(set(known.values()) - shown) == []


def test_a_sum_is_exported_only_where_no_observation_is_negative() -> None:
    """A query for the mean of a score that may be negative would find nothing, ever."""
    known = exported()
    assert "steering_edit_norm_ratio_sum" in known
    assert "steering_gate_value_sum" not in known
