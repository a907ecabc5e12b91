"""An experiment on the demo model, raw against LLM-VA, from its definition to its verdict, with
nothing but HTTP between."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest

from server.cli import main
from steering.demo.corpus import prompts
from steering.judge import JUDGE_VERSION
from tests.server.test_keys_live import Server

UNITS = 160
DEFINITION = """
[[experiments]]
name = "trial"
arms = [{name = "control", profile = "raw"}, {name = "treated", profile = "llm-va"}]
metric = "over_refusal"
horizon = 200
"""


def test_traffic_alone_brings_the_right_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Borderline prompts: the unedited model refuses most of them, LLM-VA none."""
    config = tmp_path / "serve.toml"
    config.write_text(DEFINITION)
    borderline = [p.text for p in prompts("selection", ("borderline",), per_kind=UNITS)]
    server = Server("--config", config, "--experiments-journal", tmp_path / "journal")
    try:
        client = server.client("none")

        def ask(i: int) -> tuple[str, str]:
            reply = client.chat.completions.create(
                model="demo@trial",
                temperature=0,
                messages=[{"role": "user", "content": borderline[i]}],
                user=f"user-{i}",
            )
            receipt = reply.steering  # type: ignore[attr-defined]
            assert receipt["experiment"] == "trial" and receipt["judge"] == JUDGE_VERSION
            assert receipt["profile"] == {"control": "raw", "treated": "llm-va"}[receipt["arm"]]
            return receipt["arm"], receipt["outcome"]

        with ThreadPoolExecutor(8) as pool:
            seen = list(pool.map(ask, range(UNITS)))
        report = httpx2.get(f"{server.address}/v1/experiments/trial/report").json()
        page = httpx2.get(f"{server.address}/v1/experiments/trial/report?format=html")
        assert main(["experiments", "report", "trial", "--url", server.address]) == 0
    finally:
        server.close()
    [comparison] = report["comparisons"]
    assert comparison["arm"] == "treated"
    assert comparison["decision"]["verdict"] == "better"
    assert not report["sample_ratio"]["mismatch"]
    assert "better" in capsys.readouterr().out
    assert page.status_code == 200 and "trial" in page.text
    # What the report counts is what the clients saw.
    for arm in report["arms"]:
        outcomes = [outcome for name, outcome in seen if name == arm["name"]]
        assert arm["answers"] == len(outcomes)
        share = outcomes.count("refusal") / len(outcomes)
        assert arm["rates"]["refusal"]["value"] == pytest.approx(share)
