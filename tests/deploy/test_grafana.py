"""The dashboards by the rules of grafana/dashboard-linter, which cannot be installed by name."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from tests.deploy.conftest import DASHBOARDS, DEPLOY, fill_in, load, panels, queries

ALL = pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)


def test_the_files_are_what_the_script_writes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, DEPLOY / "grafana/build.py", tmp_path], check=True)
    written = {path.name: path.read_text("utf-8") for path in tmp_path.iterdir()}
    assert written == {path.name: path.read_text("utf-8") for path in DASHBOARDS}


@ALL
def test_a_dashboard_can_be_provisioned_and_not_edited(path: Path) -> None:
    dashboard = load(path)
    assert dashboard["id"] is None and dashboard["editable"] is False
    assert re.fullmatch(r"[a-z-]{1,40}", dashboard["uid"])
    assert dashboard["title"] and dashboard["description"]
    identifiers = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(identifiers)) == len(identifiers)
    assert dashboard["uid"] not in {load(other)["uid"] for other in DASHBOARDS if other != path}


@ALL
def test_the_variables_are_data_source_job_and_instance_and_reload(path: Path) -> None:
    variables = {v["name"]: v for v in load(path)["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    for name in ("job", "instance"):
        assert variables[name]["multi"] and variables[name]["includeAll"]
    for variable in variables.values():
        if variable["type"] == "query":
            assert variable["refresh"] == 2  # when the time range changes
            assert variable["datasource"]["uid"] == "${datasource}"
            inner = re.fullmatch(r"label_values\((.+), \w+\)", variable["query"]["query"])
            assert inner
            promql_parser.parse(fill_in(inner[1]))


@ALL
def test_every_variable_of_a_query_is_declared(path: Path) -> None:
    dashboard = load(path)
    declared = {v["name"] for v in dashboard["templating"]["list"]} | {"__rate_interval"}
    for panel in panels(dashboard):
        for text in (panel["title"], *queries(panel)):
            assert set(re.findall(r"\$(\w+)", text)) <= declared, panel["title"]


def _cases() -> list[Any]:
    return [
        pytest.param(panel, id=f"{path.stem}: {panel['title']}")
        for path in DASHBOARDS
        for panel in panels(load(path))
    ]


@pytest.mark.parametrize("panel", _cases())
def test_a_panel(panel: dict[str, Any]) -> None:
    assert panel["title"] and panel["description"].endswith(".")
    assert panel["datasource"]["uid"] == "${datasource}"
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert panel["targets"]
    for target in panel["targets"]:
        assert target["datasource"]["uid"] == "${datasource}" and target["legendFormat"]
    for expr in queries(panel):
        for selector in re.findall(r"(?:steering_\w+|\bup)(\{[^}]*\})?", expr):
            assert 'job=~"$job"' in selector and 'instance=~"$instance"' in selector, expr
        ranges = set(re.findall(r"\[([^]]+)\]", expr))
        assert ranges <= {"$__rate_interval", "$window"}, expr
        assert not re.search(r"\brate\([^[]*\[\$window", expr), expr
        for counter in re.findall(r"(\w*\(?)steering_\w+_total\{[^}]*\}(?!\[)", expr):
            assert "stops_total" in expr, counter  # the one counter that is read as it is
        promql_parser.parse(fill_in(expr))


@ALL
def test_panels_fill_rows_without_overlapping(path: Path) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in load(path)["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24, panel["title"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells


def test_broken_promql_does_not_parse() -> None:
    with pytest.raises(ValueError):
        promql_parser.parse(fill_in("sum by (profile (rate(steering_requests_total[$window]))"))


def test_what_is_provisioned_is_there() -> None:
    provisioning = DEPLOY / "grafana/provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yaml").read_text())[
        "datasources"
    ]
    assert source["type"] == "prometheus" and source["isDefault"]
    (provider,) = yaml.safe_load((provisioning / "dashboards/pilothouse.yaml").read_text())[
        "providers"
    ]
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    mounts = dict(mount.split(":")[:2] for mount in compose["services"]["grafana"]["volumes"])
    mounted = {target: DEPLOY / local for local, target in mounts.items()}
    assert mounted[provider["options"]["path"]].resolve() == DASHBOARDS[0].parent
    assert mounted["/etc/grafana/provisioning"].resolve() == provisioning.resolve()
    scrape = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())["global"]
    assert source["jsonData"]["timeInterval"] == scrape["scrape_interval"]
