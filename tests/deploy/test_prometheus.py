"""Scrape configuration, recording rules and alerts, by promtool."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from tests.deploy.conftest import DEPLOY, RULES
from tests.services.conftest import require_tool

PROMETHEUS = DEPLOY / "prometheus"
TESTS = sorted((PROMETHEUS / "tests").glob("*.yml"))


def rules(kind: str) -> list[dict[str, Any]]:
    """Recording rules by "record", alerts by "alert"."""
    groups = [group for path in RULES for group in yaml.safe_load(path.read_text())["groups"]]
    return [rule for group in groups for rule in group["rules"] if kind in rule]


def promtool(*arguments: str | Path) -> str:
    command = [require_tool("promtool"), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=PROMETHEUS)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize("path", RULES, ids=lambda path: path.stem)
def test_promtool_takes_the_rules(path: Path) -> None:
    assert "SUCCESS" in promtool("check", "rules", "--lint-fatal", path)


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.stem)
def test_the_rules_unit_tests(path: Path) -> None:
    assert "SUCCESS" in promtool("test", "rules", path)


@pytest.mark.parametrize("name", ["prometheus.yml", "local.yml"])
def test_promtool_takes_the_configuration(name: str) -> None:
    assert "SUCCESS" in promtool("check", "config", "--syntax-only", name)


def test_every_alert_is_seen_firing_by_a_unit_test() -> None:
    text = "".join(path.read_text("utf-8") for path in TESTS)
    fires = set(re.findall(r'labels: \'\{alertname="(\w+)"', text))
    assert fires == {rule["alert"] for rule in rules("alert")}


@pytest.mark.parametrize("rule", rules("alert"), ids=lambda rule: rule["alert"])
def test_an_alert_says_how_bad_it_is_and_what_to_do(rule: dict[str, Any]) -> None:
    assert re.fullmatch(r"Steering([A-Z][a-z]+)+", rule["alert"])
    assert rule["labels"]["severity"] in ("warning", "critical")
    assert rule["annotations"]["summary"] and rule["annotations"]["runbook"].endswith((".", "?"))
    promql_parser.parse(rule["expr"])


@pytest.mark.parametrize("rule", rules("alert"), ids=lambda rule: rule["alert"])
def test_an_alert_on_a_ratio_asks_for_a_minimum_volume(rule: dict[str, Any]) -> None:
    if re.search(r":(ratio|mean|p95)_|/ sum", rule["expr"]):
        volumes = re.findall(r"\band\b[^>]*(?:rate|_count|increase6h)[^>]*> [\d.]+", rule["expr"])
        assert volumes, rule["alert"]


@pytest.mark.parametrize("rule", rules("record"), ids=lambda rule: rule["record"])
def test_a_recorded_series_is_named_level_metric_operation(rule: dict[str, Any]) -> None:
    assert re.fullmatch(r"[a-z_]+:steering_[a-z_]+:[a-z0-9_]+", rule["record"])
    if "/" in rule["expr"]:
        assert "_per_" in rule["record"] or ":mean_" in rule["record"]
        assert not re.search(r"avg\b", rule["expr"])
    promql_parser.parse(rule["expr"])


def test_every_recorded_series_is_used() -> None:
    asked = " ".join(rule["expr"] for kind in ("alert", "record") for rule in rules(kind))
    assert [r["record"] for r in rules("record") if r["record"] not in asked] == []
