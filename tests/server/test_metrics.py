"""What Prometheus sees."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from server.engine.base import QueueFullError, StepFailedError
from server.metrics import Metrics
from steering.template import TemplateForm
from tests.server.fakes import FakeEngine, body, http_client, make_host


def scrape(
    *requests: dict[str, Any], host: Any = None, path: str = "/v1/chat/completions"
) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Every sample of the page after some requests, by name and labels."""

    async def run() -> str:
        async with http_client(host or make_host()) as client:
            for request in requests:
                await client.post(path, content=json.dumps(request),
                                  headers={"Content-Type": "application/json"})  # fmt: skip
            return (await client.get("/metrics")).text

    families = text_string_to_metric_families(asyncio.run(run()))
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def value(page: Any, name: str, **labels: str) -> float:
    return float(page[f"steering_{name}", frozenset(labels.items())])


def test_series_exist_at_zero_before_the_first_request() -> None:
    page = scrape()
    for profile in ("raw", "bold", "shy"):
        for reason in ("stop", "length", "cancelled", "error"):
            assert value(page, "requests_total", profile=profile, finish_reason=reason) == 0
        for prompt_class in ("harmful", "benign", "unknown"):
            labels = {"profile": profile, "prompt_class": prompt_class}
            assert value(page, "refusals_total", **labels) == 0
            for outcome in ("answer", "refusal", "degenerate", "empty"):
                assert value(page, "responses_judged_total", **labels, outcome=outcome) == 0
        for histogram in ("time_to_first_token_seconds", "refusal_score", "gate_value"):
            assert value(page, f"{histogram}_count", profile=profile) == 0
    for reason in ("queue_full", "context_length", "invalid_request", "not_found", "unavailable"):
        assert value(page, "rejections_total", reason=reason) == 0


def test_there_are_no_created_series() -> None:
    assert not [name for name, _ in scrape(body()) if name.endswith("_created")]


def test_a_request_is_counted_under_its_profile() -> None:
    page = scrape(body(model="tiny:bold"), body(model="tiny:bold", max_tokens=3, stream=True))
    assert value(page, "requests_total", profile="bold", finish_reason="stop") == 1
    assert value(page, "requests_total", profile="bold", finish_reason="length") == 1
    assert value(page, "requests_total", profile="raw", finish_reason="stop") == 0
    assert value(page, "prompt_tokens_total", profile="bold") == 12
    tokens = len(FakeEngine().reply.encode()) + 1 + 3
    assert value(page, "completion_tokens_total", profile="bold") == tokens
    assert value(page, "inter_token_latency_seconds_count", profile="bold") == tokens - 2
    for histogram in (
        "time_to_first_token_seconds", "request_duration_seconds", "refusal_score",
        "answer_probe_score", "benign_probe_score", "edit_norm_ratio", "gate_value",
    ):  # fmt: skip
        assert value(page, f"{histogram}_count", profile="bold") == 2, histogram
    assert value(page, "queue_time_seconds_count") == 2
    assert value(page, "refusal_score_bucket", profile="bold", le="-4.0") == 0
    assert value(page, "refusal_score_bucket", profile="bold", le="-2.0") == 2


def test_replies_are_counted_by_outcome_and_class_of_prompt() -> None:
    host = make_host(judge=lambda text: "refusal")
    labels = {"profile": "shy", "prompt_class": "unknown"}  # without a monitor nobody knows
    page = scrape(body(model="tiny:shy"), host=host)
    assert value(page, "refusals_total", **labels) == 1
    assert value(page, "responses_judged_total", **labels, outcome="refusal") == 1
    assert value(page, "responses_judged_total", **labels, outcome="answer") == 0
    assert value(page, "judge_seconds_count") == 1


def test_the_class_of_a_prompt_is_the_monitors() -> None:
    host = make_host(judge=lambda text: "refusal")

    class FakeMonitor:
        template = TemplateForm()

        def prompt_class(self, benign_probability: float) -> str:
            assert benign_probability == 0.8
            return "benign"

    host.monitor = FakeMonitor()  # type: ignore[assignment]
    page = scrape(body(), host=host)
    assert value(page, "refusals_total", profile="raw", prompt_class="benign") == 1


def test_rejections_are_counted_by_reason() -> None:
    page = scrape(
        body(n=0), body(model="x"), body(max_tokens=10**6), {}, body(steering={"x": 1})
    )  # fmt: skip
    assert value(page, "rejections_total", reason="invalid_request") == 3
    assert value(page, "rejections_total", reason="not_found") == 1
    assert value(page, "rejections_total", reason="context_length") == 1
    full = scrape(body(), host=make_host(FakeEngine(error=QueueFullError("full"))))
    assert value(full, "rejections_total", reason="queue_full") == 1
    assert value(full, "requests_total", profile="raw", finish_reason="error") == 0


def test_a_reply_that_fails_is_counted_as_an_error() -> None:
    for stream in (False, True):
        host = make_host(FakeEngine(error=StepFailedError("x"), fail_after=2))
        page = scrape(body(stream=stream), host=host)
        assert value(page, "requests_total", profile="raw", finish_reason="error") == 1
        assert value(page, "requests_total", profile="raw", finish_reason="cancelled") == 0
        assert value(page, "completion_tokens_total", profile="raw") == 2


def test_the_engines_gauges_are_read_at_each_scrape() -> None:
    page = scrape()
    assert value(page, "requests_running") == 1
    assert value(page, "requests_waiting") == 2
    assert value(page, "slots_used") == 1


def test_info_series_tell_what_is_served() -> None:
    names = {name: dict(labels) for name, labels in scrape() if name.endswith("_info")}
    assert names["steering_model_info"]["model"] == "tiny"
    assert names["steering_model_info"]["architecture"] == "llama"
    assert names["steering_model_info"]["dtype"] == "float32"
    assert set(names["steering_build_info"]) == {"version", "torch"}
    assert set(names["steering_profile_info"]) == {"profile", "fingerprint", "method"}


def test_http_requests_are_counted_by_route_template_and_class_of_status() -> None:
    async def run() -> str:
        async with http_client(make_host()) as client:
            await client.get("/v1/steering/profiles/bold")
            await client.get("/v1/steering/profiles/none")
            await client.get("/v1/models/tiny:bold")
            await client.get("/some/random/path")
            await client.request("BREW", "/v1/models")
            return (await client.get("/metrics")).text

    lines = [
        line for line in asyncio.run(run()).splitlines()
        if line.startswith("steering_http_requests_total")
    ]  # fmt: skip
    template = 'route="/v1/steering/profiles/{name}"'
    assert any(template in line and 'status="2xx"' in line for line in lines)
    assert any(template in line and 'status="4xx"' in line for line in lines)
    assert any('route="/v1/models/{model:path}"' in line for line in lines)
    assert any('route="unmatched"' in line for line in lines)
    assert any('method="other"' in line for line in lines)
    assert not any("random" in line or "BREW" in line or "bold" in line for line in lines)


def test_two_apps_in_one_process_count_apart() -> None:
    assert value(scrape(body()), "requests_total", profile="raw", finish_reason="stop") == 1
    assert value(scrape(body()), "requests_total", profile="raw", finish_reason="stop") == 1


def test_an_experiments_series_exist_at_zero_and_go_with_it() -> None:
    metrics = Metrics([])
    metrics.add_experiment("trial", {"control": 0.75, "treated": 0.25})
    page = metrics.page("")[0].decode()
    for arm, share in (("control", 0.75), ("treated", 0.25)):
        labels = f'{{arm="{arm}",experiment="trial"}}'
        assert f"steering_experiment_arm_share_ratio{labels} {share}" in page
        assert f"steering_experiment_exposures_total{labels} 0.0" in page
        assert f"steering_guardrail_stops_total{labels} 0.0" in page
    assert page.count("steering_experiment_responses_judged_total{") == 2 * 3 * 4
    metrics.retire_experiment("trial")
    assert "trial" not in metrics.page("")[0].decode()
