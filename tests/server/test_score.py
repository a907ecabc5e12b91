"""Reading a conversation without answering it."""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any

import httpx2
import pytest

from server.engine.base import PromptScores, QueueFullError, StepFailedError
from server.engine.local import LocalEngine
from server.hosting import Host
from tests.conftest import make_model
from tests.server import fakes
from tests.server.fakes import FakeEngine, error_of, http_client, make_host
from tests.server.test_hosting import make_monitor
from tests.server.test_metrics import scrape, value

URL = "/v1/steering/score"
CONVERSATION = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}


def score(host: Host | None = None, **changes: Any) -> httpx2.Response:
    async def send() -> httpx2.Response:
        async with http_client(host or make_host()) as client:
            return await client.post(URL, json={**CONVERSATION, **changes})

    return asyncio.run(send())


def test_a_score_is_what_a_reply_under_the_same_steering_tells() -> None:
    async def run() -> None:
        lm = make_model("llama")
        engine = LocalEngine(lm, max_num_seqs=8, max_model_len=100, monitor=make_monitor(lm))
        both = {"profiles": [{"name": "bold"}, {"name": "shy", "strength": -1}]}
        async with http_client(make_host(engine)) as client:
            for steering in (None, {"profile": "bold"}, {"strength": 0}, {"phase": "prompt"}, both):
                asked = {**CONVERSATION, "steering": steering}
                told, answer = await asyncio.gather(
                    client.post(URL, json=asked),
                    client.post("/v1/chat/completions", json={**asked, "max_tokens": 2}),
                )
                found, receipt = told.json(), answer.json()["steering"]
                for name in ("refusal_score", "benign_probability", "answer_probability"):
                    assert found[name] == pytest.approx(receipt[name], abs=1e-4), name
                for name in receipt.keys() - {"outcome", "judge", "experiment", "arm"}:
                    assert type(found[name]) is type(receipt[name]), name
                assert found["fingerprint"] == receipt["fingerprint"]
                assert found["edit_norm"] > 0 or steering != both
                usage = answer.json()["usage"]
                del found["usage"]["prompt_tokens_details"]
                assert found["usage"] == {
                    "prompt_tokens": usage["prompt_tokens"],
                    "completion_tokens": 0,
                    "total_tokens": usage["prompt_tokens"],
                }

    asyncio.run(run())


def test_a_score_takes_one_token_that_is_not_shown_and_enters_no_metric_of_the_profile() -> None:
    engine = FakeEngine()
    host = make_host(engine)
    found = score(host).json()
    assert found["object"] == "steering.score" and found["model"] == "tiny"
    assert (found["edit_norm"], found["gate_values"]) == (0.02, [1.0])
    assert found["prompt_class"] == "unknown"  # without a monitor nobody knows
    assert [request.sampling.max_tokens for request in engine.requests] == [1]
    page = scrape(CONVERSATION, host=host, path=URL)
    assert value(page, "requests_total", profile="raw", finish_reason="length") == 0
    assert value(page, "refusal_score_count", profile="raw") == 0


def test_scores_that_json_has_no_word_for_are_null(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = PromptScores(refusal_score=math.nan, edit_norm=math.inf, gate_values=(math.inf, 1.0))
    monkeypatch.setattr(fakes, "SCORES", broken)
    found = score().json()
    assert found["refusal_score"] is None and found["edit_norm"] is None
    assert found["gate_values"] == [None, 1.0]


@pytest.mark.parametrize(
    ("changes", "status", "param"),
    [
        ({"model": "gpt-4"}, 404, "model"),
        ({"steering": {"profile": "none"}}, 404, "steering.profile"),
        ({"messages": []}, 400, "messages"),
        ({"messages": None}, 400, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 300}]}, 400, "messages"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "messages"),
        ({"temperature": 1}, 400, "temperature"),
        ({"steering": {"x": 1}}, 400, "steering.x"),
    ],
)
def test_a_wrong_field_is_named(changes: dict[str, Any], status: int, param: str) -> None:
    engine = FakeEngine()

    async def send() -> httpx2.Response:
        async with http_client(make_host(engine)) as client:
            content = json.dumps({**CONVERSATION, **changes})
            kind = {"Content-Type": "application/json"}
            return await client.post(URL, content=content, headers=kind)

    response = asyncio.run(send())
    assert (response.status_code, error_of(response)["param"]) == (status, param)
    assert not engine.requests


def test_a_full_queue_and_a_failed_step_are_told_as_in_chat() -> None:
    full = score(make_host(FakeEngine(error=QueueFullError("full"))))
    assert full.status_code == 429 and full.headers["Retry-After"]
    failed = score(make_host(FakeEngine(error=StepFailedError("x"), fail_after=0)))
    assert failed.status_code == 500
