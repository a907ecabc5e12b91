"""A real Prometheus scrapes a real server; promtool lints what it serves."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from server.hosting import open_host
from server.settings import Settings
from tests.server.live import live_server
from tests.services.conftest import require_tool
from tests.services.prometheus import running_prometheus

PROFILES = ("raw", "llm-va", "alphasteer", "optimal-transport")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A server on the demo model that has answered each profile once."""
    with live_server(open_host(Settings())) as address:
        for profile in PROFILES:
            httpx2.post(
                f"{address}/v1/chat/completions",
                json={
                    "model": f"demo:{profile}",
                    "temperature": 0,
                    "messages": [{"role": "user", "content": "How do I repair the fence?"}],
                },
                timeout=60,
            ).raise_for_status()
        yield address


def test_promtool_finds_nothing_wrong_with_the_metrics(address: str) -> None:
    promtool = require_tool("promtool")
    text = httpx2.get(f"{address}/metrics").text
    result = subprocess.run(
        [promtool, "check", "metrics"], input=text, capture_output=True, text=True
    )
    assert result.returncode == 0 and not result.stderr.strip(), result.stdout + result.stderr


def test_a_real_prometheus_scrapes_every_profile(address: str, tmp_path: Path) -> None:
    config = tmp_path / "prometheus.yml"
    target = address.removeprefix("http://")
    config.write_text(
        "global: {scrape_interval: 1s}\n"
        "scrape_configs:\n"
        "  - job_name: pilothouse\n"
        f"    static_configs: [{{targets: ['{target}']}}]\n"
    )
    with running_prometheus(config, tmp_path / "data") as prometheus:
        judged = 'steering_responses_judged_total{outcome="answer",prompt_class="benign"} >= 1'
        for query in ("sum by (profile) (steering_requests_total) >= 1", judged):
            found = prometheus.wait_for(query, len(PROFILES))
            assert {series["metric"]["profile"] for series in found} == set(PROFILES)
