"""Demo traffic on a real server, scraped by a real Prometheus with the project's configuration,
rules and key file; then every query of every dashboard is asked.

Not real here: yesterday's series, which are written into Prometheus' storage beforehand.
"""

from __future__ import annotations

import csv
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml

from server.hosting import open_host
from server.settings import Settings
from steering.evaluate.statistics import wilson_interval
from tests.deploy.conftest import DASHBOARDS, DEPLOY, ROOT, fill_in, load, panels, queries
from tests.server.live import live_server
from tests.services.conftest import require_tool
from tests.services.prometheus import Prometheus, running_prometheus

TRAFFIC_SECONDS = 15
WINDOW = "30s"
EXPERIMENT = {
    "name": "trial",
    "arms": [{"name": "control", "profile": "raw"}, {"name": "treated", "profile": "llm-va"}],
    "shadow": 0.5,
}


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as compose.yaml's volumes: keys by the script that makes them there."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("server", "scrape", "load", "database"):
        (folder / name).mkdir()
    program = folder / "pilothouse"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m server.cli "$@"\n')
    program.chmod(0o755)
    path = f"{folder}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["sh", str(DEPLOY / "make-keys.sh"), str(folder)]
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, env=environment)
    before = {file: file.read_text() for file in folder.glob("*/*")}
    subprocess.run(command, check=True, env=environment)
    assert {file: file.read_text() for file in folder.glob("*/*")} == before
    return folder


@pytest.fixture(scope="module")
def address(keys: Path) -> Iterator[str]:
    settings = Settings.model_validate(
        {
            "keys": str(keys / "server/keys.json"),
            "protect_metrics": True,
            "experiments": [EXPERIMENT],
            "experiments_journal": keys / "journal",
        }
    )
    with live_server(open_host(settings)) as address:
        yield address


@pytest.fixture(scope="module")
def prometheus(
    address: str, keys: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    folder = tmp_path_factory.mktemp("prometheus")
    _write_yesterday(folder)
    config = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(DEPLOY / "prometheus/rules/*.yml")]
    (job,) = config["scrape_configs"]
    job["authorization"]["credentials_file"] = str(keys / "scrape/scrape.key")
    job["static_configs"] = [{"targets": [address.removeprefix("http://")]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    console = f"--web.console.templates={DEPLOY / 'prometheus/consoles'}"
    with running_prometheus(folder / "prometheus.yml", folder / "data", console) as prometheus:
        yield prometheus


@pytest.fixture(scope="module")
def traffic(prometheus: Prometheus, address: str, keys: Path) -> list[dict[str, str]]:
    """Locust's figures, one row per kind of request, after which all of it has been scraped."""
    report = keys / "locust"
    result = subprocess.run(
        [
            sys.executable, "-m", "locust",
            "--locustfile", str(DEPLOY / "loadtest/locustfile.py"),
            "--host", address,
            "--api-key-file", str(keys / "load/load.key"),
            "--experiment", "trial",
            "--headless", "--users", "6", "--spawn-rate", "6",
            "--run-time", f"{TRAFFIC_SECONDS}s", "--stop-timeout", "20s",
            "--csv", str(report), "--only-summary",
        ],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    with Path(f"{report}_stats.csv").open() as file:
        rows = list(csv.DictReader(file))
    asked = sum(int(r["Request Count"]) for r in rows if r["Name"].startswith("chat"))
    found = prometheus.wait_for(f"sum(steering_requests_total) >= {asked}")
    assert found, f"locust asked {asked} times, Prometheus never saw as many"
    return rows


def test_locust_asks_every_kind_of_prompt_and_nothing_fails(traffic: list[dict[str, str]]) -> None:
    names = {row["Name"] for row in traffic}
    assert any(name.startswith("chat, benign") for name in names)
    assert any("harmful" in name or "jailbroken" in name for name in names)
    assert any(name.endswith("streamed") for name in names) and "first token" in names
    assert sum(int(row["Failure Count"]) for row in traffic) == 0


def test_the_scrape_needs_the_key_that_the_script_made(address: str, keys: Path) -> None:
    assert httpx2.get(f"{address}/metrics").status_code == 401
    for name, status in (("scrape/scrape.key", 200), ("load/load.key", 403)):
        secret = (keys / name).read_text().strip()
        answer = httpx2.get(f"{address}/metrics", headers={"Authorization": f"Bearer {secret}"})
        assert answer.status_code == status


def _panels() -> list[Any]:
    return [
        pytest.param(panel, id=f"{path.stem}: {panel['title']}")
        for path in DASHBOARDS
        for panel in panels(load(path))
    ]


@pytest.mark.usefixtures("traffic")
@pytest.mark.parametrize("panel", _panels())
def test_every_query_of_a_panel_returns_data(panel: dict[str, Any], prometheus: Prometheus) -> None:
    for query in queries(panel):
        expr = fill_in(
            query, window=WINDOW, job="pilothouse", experiment="trial", control="control"
        )
        now = time.time()
        result = prometheus.get("query_range", query=expr, start=now - 20, end=now, step=2)
        numbers = [float(value) for series in result["result"] for _, value in series["values"]]
        assert any(math.isfinite(number) for number in numbers), expr


@pytest.mark.usefixtures("traffic")
def test_every_rule_is_evaluated_without_error(prometheus: Prometheus) -> None:
    groups = prometheus.get("rules")["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) > 30
    assert [(r["name"], r.get("lastError")) for r in rules if r["health"] != "ok"] == []
    recorded = [rule["name"] for rule in rules if rule["type"] == "recording"]
    assert [name for name in recorded if not prometheus.wait_for(f"{{__name__='{name}'}}")] == []
    firing = {alert["labels"]["alertname"] for alert in prometheus.get("alerts")["alerts"]}
    assert "SteeringDown" not in firing


@pytest.mark.usefixtures("traffic")
def test_the_console_shows_rates_without_grafana(prometheus: Prometheus) -> None:
    answer = httpx2.get(f"{prometheus.address}/consoles/refusals.html")
    assert answer.status_code == 200, answer.text
    for shown in ("benign prompts", "llm-va", "raw"):
        assert shown in answer.text
    rows = re.findall(r'"number">([\d.]+) to ([\d.]+) %', answer.text)
    assert rows and all(0 <= float(low) < float(high) <= 100 for low, high in rows)
    assert "NaN" not in answer.text


def test_intervals_in_promql_are_wilsons(prometheus: Prometheus) -> None:
    sys.path.insert(0, str(DEPLOY / "grafana"))
    try:
        from panels import wilson  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(DEPLOY / "grafana"))
    for successes, trials in ((0, 5), (7, 40), (400, 400)):
        low, high = wilson_interval(successes, trials)
        for side, right in (("low", low), ("high", high)):
            expr = wilson(f"vector({successes})", f"vector({trials})", side)
            (series,) = prometheus.query(expr)
            assert float(series["value"][1]) == pytest.approx(right, abs=2e-4)


def _write_yesterday(folder: Path) -> None:
    """Blocks with ten minutes of a day ago, from five minutes before to five after."""
    counters = {
        'steering_refusals_total{%s,prompt_class="%s"}': 0.3,
        'steering_responses_judged_total{%s,prompt_class="%s",outcome="answer"}': 1.0,
    }
    probes = {
        "steering_answer_probe_score_sum{%s}": 0.6, "steering_answer_probe_score_count{%s}": 1.0,
        "steering_benign_probe_score_sum{%s}": 0.7, "steering_benign_probe_score_count{%s}": 1.0,
    }  # fmt: skip
    series: dict[str, float] = {}
    for profile in ("raw", "llm-va", "alphasteer"):
        labels = f'job="pilothouse",instance="yesterday",profile="{profile}"'
        series |= {name % labels: rate for name, rate in probes.items()}
        for prompt_class in ("benign", "harmful", "unknown"):
            series |= {name % (labels, prompt_class): rate for name, rate in counters.items()}
    day_ago = time.time() - 24 * 3600
    lines = [
        f"{name} {rate * step} {day_ago - 300 + 5 * step:.0f}"
        for name, rate in series.items()
        for step in range(120)
    ]
    (folder / "yesterday.txt").write_text("\n".join([*lines, "# EOF\n"]))
    promtool = require_tool("promtool")
    command = [promtool, "tsdb", "create-blocks-from", "openmetrics", "yesterday.txt", "data"]
    made = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr
