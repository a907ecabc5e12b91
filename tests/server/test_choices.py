"""Several choices in one request."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx2
import pytest

from server.engine.base import QueueFullError, StepFailedError
from server.engine.local import LocalEngine
from tests.conftest import make_model
from tests.server.fakes import FakeEngine, body, error_of, events, http_client, make_host, post


def test_every_choice_comes_whole_and_usage_is_their_sum() -> None:
    engine = FakeEngine("abc")
    answer = post(host=make_host(engine), n=3).json()
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2]
    assert {c["message"]["content"] for c in answer["choices"]} == {"abc"}
    del answer["usage"]["prompt_tokens_details"]
    assert answer["usage"] == {"prompt_tokens": 6, "completion_tokens": 12, "total_tokens": 18}
    assert len({request.request_id for request in engine.requests}) == 3


def test_a_stream_interleaves_the_choices_by_index() -> None:
    *chunks, usage, done = events(post(n=2, stream=True, stream_options={"include_usage": True}))
    assert done == "[DONE]" and usage["usage"]["completion_tokens"] == 40
    order = [c["choices"][0]["index"] for c in chunks]
    assert order != sorted(order)
    for index in (0, 1):
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert mine[0]["delta"]["role"] == "assistant"
        text = "".join(c["delta"].get("content", "") for c in mine)
        assert text == "Hello, wörld! 🙂"
        assert [c["finish_reason"] for c in mine] == [None] * (len(mine) - 1) + ["stop"]
        assert mine[-1]["steering"]["outcome"] == "answer"
    assert ["steering" in c for c in chunks] == [False] * (len(chunks) - 1) + [True]


def test_every_choice_has_an_outcome_and_one_choice_has_it_in_the_receipt_only() -> None:
    outcomes = iter(["refusal", "answer"])
    answer = post(host=make_host(judge=lambda text: next(outcomes)), n=2).json()  # type: ignore[arg-type]
    own = [c["steering"] for c in answer["choices"]]
    assert sorted(each["outcome"] for each in own) == ["answer", "refusal"]
    assert answer["steering"]["outcome"] == own[0]["outcome"]
    assert {each["refusal_score"] for each in own} == {answer["steering"]["refusal_score"]}
    assert post().json()["choices"][0]["steering"] is None


def test_each_choice_has_the_seed_plus_its_index() -> None:
    engine = FakeEngine()
    post(host=make_host(engine), n=3, seed=40)
    assert [request.sampling.seed for request in engine.requests] == [40, 41, 42]
    engine = FakeEngine()
    prompts = {"model": "tiny", "prompt": ["a", "b"], "n": 2, "seed": 7}
    post(prompts, host=make_host(engine), path="/v1/completions")
    assert [request.sampling.seed for request in engine.requests] == [7, 8, 7, 8]


def test_a_choice_is_what_its_seed_gives_alone() -> None:
    engine = LocalEngine(make_model("llama"), max_num_seqs=4, max_model_len=200)
    asked = body(temperature=1.5, max_tokens=16, min_p=0.01)

    async def run() -> list[httpx2.Response]:
        async with http_client(make_host(engine)) as client:
            payloads = [{**asked, "seed": 3, "n": 3}, *({**asked, "seed": 3 + i} for i in range(3))]
            path = "/v1/chat/completions"
            return [await client.post(path, json=payload) for payload in payloads]

    together, *alone = [response.json()["choices"] for response in asyncio.run(run())]
    texts = [choice["message"]["content"] for choice in together]
    assert texts == [choices[0]["message"]["content"] for choices in alone]
    assert len(set(texts)) == 3


@pytest.mark.parametrize("stream", [False, True])
def test_a_choice_that_fails_fails_the_request_and_cancels_the_others(stream: bool) -> None:
    class OneFails(FakeEngine):
        def generate(self, request: Any) -> Any:
            self.fail_after = 2 if request.request_id.endswith("-1") else 10**6
            tokens = FakeEngine("x" * 100, error=self.error, fail_after=self.fail_after)
            tokens.cancelled = self.cancelled
            return tokens.generate(request)

    engine = OneFails(error=StepFailedError("broken"), delay=0)
    response = post(host=make_host(engine), n=3, stream=stream)
    if stream:
        *_, error, done = events(response)
        assert error["error"]["code"] == "internal_error" and done == "[DONE]"
    else:
        assert response.status_code == 500
    assert len(engine.cancelled) == 2


def test_a_queue_without_room_for_all_takes_none() -> None:
    response = post(host=make_host(FakeEngine(error=QueueFullError("full"))), n=2)
    assert response.status_code == 429 and error_of(response)["code"] == "queue_full"


def test_the_choices_of_a_prompt_count_its_tokens_and_scores_once() -> None:
    async def run() -> str:
        async with http_client(make_host()) as client:
            await client.post("/v1/chat/completions", json=body(n=3))
            return (await client.get("/metrics")).text

    page = asyncio.run(run()).splitlines()
    assert 'steering_prompt_tokens_total{profile="raw"} 6.0' in page
    assert 'steering_refusal_score_count{profile="raw"} 1.0' in page
    assert 'steering_requests_total{finish_reason="stop",profile="raw"} 3.0' in page
