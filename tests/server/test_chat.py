"""Chat completions as the official client sees them, on an engine that plays its part."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx2
import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from server.engine.base import (
    EngineStoppedError,
    ProfileRemovedError,
    PromptTooLongError,
    QueueFullError,
    StepFailedError,
)
from tests.conftest import make_model
from tests.server.fakes import (
    FakeEngine,
    body,
    error_of,
    events,
    get,
    make_host,
    make_profile,
    openai_client,
    post,
)

MESSAGES: Any = [{"role": "user", "content": "Hi"}]
RECEIPT = {
    "profile", "fingerprint", "strength", "experiment", "arm",
    "refusal_score", "answer_probability", "benign_probability", "outcome", "judge",
}  # fmt: skip


def ask(engine: FakeEngine | None = None, **arguments: Any) -> ChatCompletion:
    async def run() -> ChatCompletion:
        async with openai_client(make_host(engine)) as client:
            return await client.chat.completions.create(
                **{"model": "tiny", "messages": MESSAGES, **arguments}
            )

    return asyncio.run(run())


def ask_streaming(engine: FakeEngine | None = None, **arguments: Any) -> list[ChatCompletionChunk]:
    async def run() -> list[ChatCompletionChunk]:
        async with openai_client(make_host(engine)) as client:
            stream = await client.chat.completions.create(
                **{"model": "tiny", "messages": MESSAGES, "stream": True, **arguments}
            )
            return [chunk async for chunk in stream]

    return asyncio.run(run())


def test_the_official_client_gets_a_completion() -> None:
    completion = ask()
    ChatCompletion.model_validate(completion.model_dump(), strict=True)
    assert completion.choices[0].message.content == "Hello, wörld! 🙂"
    assert completion.choices[0].finish_reason == "stop"
    assert completion.model == "tiny"
    assert completion.usage is not None
    assert completion.usage.total_tokens == 6 + len("Hello, wörld! 🙂".encode()) + 1


def test_the_official_client_gets_a_stream() -> None:
    first, *rest, last, usage = ask_streaming(stream_options={"include_usage": True})
    assert first.choices[0].delta.role == "assistant"
    assert first.choices[0].delta.content == ""
    text = "".join(chunk.choices[0].delta.content or "" for chunk in rest)
    assert text == "Hello, wörld! 🙂"
    assert last.choices[0].delta.model_dump(exclude_unset=True) == {}
    assert last.choices[0].finish_reason == "stop"
    assert usage.choices == [] and usage.usage is not None
    assert usage.usage.completion_tokens == len("Hello, wörld! 🙂".encode()) + 1
    assert len({chunk.id for chunk in (first, *rest, last, usage)}) == 1


def test_a_stream_ends_with_done_and_has_usage_only_if_asked() -> None:
    response = post(stream=True)
    *chunks, done = events(response)
    assert done == "[DONE]"
    assert all(chunk["choices"] and "usage" not in chunk for chunk in chunks)
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"


def test_no_chunk_holds_half_a_character() -> None:
    chunks = ask_streaming(FakeEngine("日本語 🙂🙂 é"))
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert "日" in pieces and "🙂" in pieces
    assert not any("\ufffd" in piece for piece in pieces if piece)


def test_a_reply_cut_inside_a_character_is_the_same_streamed_or_not() -> None:
    whole = ask(FakeEngine("a🙂"), max_tokens=3).choices[0].message.content
    chunks = ask_streaming(FakeEngine("a🙂"), max_tokens=3)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole
    assert whole is not None and whole.startswith("a\ufffd")


def test_the_reply_carries_a_receipt_streamed_or_not() -> None:
    completion: Any = ask(extra_body={"steering": {"profile": "bold"}})
    receipt = completion.steering
    assert set(receipt) == RECEIPT
    assert receipt["profile"] == "bold"
    assert receipt["fingerprint"] == make_profile("bold").fingerprint
    assert receipt["strength"] == 0.5
    assert receipt["experiment"] is None and receipt["arm"] is None
    assert receipt["refusal_score"] == -3.5
    assert receipt["answer_probability"] == 0.9 and receipt["benign_probability"] == 0.8
    assert receipt["outcome"] == "answer"
    assert receipt["judge"] == "unknown"  # a function, which has no version
    chunks: Any = ask_streaming(extra_body={"steering": {"profile": "bold"}})
    assert [getattr(chunk, "steering", None) for chunk in chunks[:-1]] == [None] * len(chunks[:-1])
    assert chunks[-1].steering == receipt


def test_headers_name_profile_fingerprint_and_request() -> None:
    for stream in (False, True):
        response = post(model="tiny:bold", stream=stream)
        assert response.headers["x-steering-profile"] == "bold"
        assert response.headers["x-steering-fingerprint"] == make_profile("bold").fingerprint
        assert response.headers["x-request-id"]


def test_a_sane_request_id_is_kept_and_another_replaced() -> None:
    assert post(headers={"X-Request-Id": "abc-123"}).headers["x-request-id"] == "abc-123"
    assert post(headers={"X-Request-Id": "a b\tc"}).headers["x-request-id"].startswith("req-")
    assert post(headers={"X-Request-Id": "x" * 500}).headers["x-request-id"].startswith("req-")


def test_the_system_fingerprint_tells_weights_and_profile_apart() -> None:
    raw, bold = ask().system_fingerprint, ask(model="tiny:bold").system_fingerprint
    weights = make_model("llama").fingerprint.weights[:8]
    assert raw == f"fp_{weights}_raw"
    assert bold == f"fp_{weights}_{make_profile('bold').fingerprint[:8]}"


@pytest.mark.parametrize(
    ("changes", "name", "strength"),
    [
        ({}, "raw", 1.0),
        ({"model": "tiny:shy"}, "shy", 2.0),
        ({"steering": {"profile": "bold"}}, "bold", 0.5),
        ({"model": "tiny:bold", "steering": {"profile": "bold", "strength": -1}}, "bold", -1.0),
        ({"model": "tiny:bold", "steering": {"strength": 3}}, "bold", 3.0),
        ({"steering": {}}, "raw", 1.0),
        ({"steering": None}, "raw", 1.0),
    ],
)
def test_a_profile_is_chosen_by_model_or_by_steering(
    changes: dict[str, Any], name: str, strength: float
) -> None:
    engine = FakeEngine()
    receipt = post(host=make_host(engine), **changes).json()["steering"]
    assert (receipt["profile"], receipt["strength"]) == (name, strength)
    (request,) = engine.requests
    assert [applied.strength for applied in request.edits] == ([] if name == "raw" else [strength])


def test_the_answer_probe_is_read_only_where_it_was_calibrated() -> None:
    engine = FakeEngine()
    host = make_host(engine)
    for steering in ({}, {"strength": 0}, {"strength": 3}):
        post(host=host, model="tiny:bold", steering=steering)
    own, off, other = (request.answer_probe for request in engine.requests)
    assert own == make_profile("bold").fingerprint
    assert off == ""
    assert other is None


def test_sampling_parameters_reach_the_engine() -> None:
    engine = FakeEngine()
    ask(engine, temperature=0.5, top_p=0.9, seed=7, max_tokens=5, extra_body={"top_k": 3})
    sampling = engine.requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 3)
    assert (sampling.seed, sampling.max_tokens) == (7, 5)


def test_every_other_way_to_choose_tokens_reaches_the_engine_too() -> None:
    engine = FakeEngine()
    ask(
        engine,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias={"65": 3, "66": -100},
        logprobs=True,
        top_logprobs=2,
        extra_body={"min_p": 0.1, "repetition_penalty": 1.2},
    )
    sampling = engine.requests[0].sampling
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.5, -0.5)
    assert (sampling.min_p, sampling.repetition_penalty) == (0.1, 1.2)
    assert sampling.logit_bias == {65: 3, 66: -100} and sampling.top_logprobs == 2


def test_logprobs_are_told_of_every_token_of_the_text() -> None:
    completion = ask(FakeEngine("aé"), logprobs=True, top_logprobs=2)
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert [t.bytes for t in logprobs.content] == [[0x61], [0xC3], [0xA9]]
    assert [t.token for t in logprobs.content] == ["a", "bytes:\\xc3", "bytes:\\xa9"]
    assert [t.logprob for t in logprobs.content[0].top_logprobs] == [-0.5, -9999.0]
    chunks = ask_streaming(FakeEngine("aé"), logprobs=True, top_logprobs=2)
    told = [c.choices[0].logprobs.content for c in chunks if c.choices[0].logprobs]
    assert [t for each in told for t in each or ()] == logprobs.content
    alone = ask(FakeEngine("a"), logprobs=True).choices[0].logprobs
    assert alone is not None and alone.content is not None
    assert alone.content[0].top_logprobs == []
    assert ask().choices[0].logprobs is None


def test_the_temperature_is_one_under_every_profile_unless_asked() -> None:
    engine = FakeEngine()
    host = make_host(engine)
    for name in host.profiles.names:
        post(host=host, model=f"tiny:{name}")
    assert [request.sampling.temperature for request in engine.requests] == [1.0, 1.0, 1.0]


def test_the_default_length_shrinks_to_what_fits() -> None:
    engine = FakeEngine()
    engine.max_model_len = 1000
    ask(engine)
    assert engine.requests[0].sampling.max_tokens == 256
    engine = FakeEngine()
    ask(engine)
    assert engine.requests[0].sampling.max_tokens == FakeEngine.max_model_len - 6


def test_a_reply_that_reaches_its_length_says_so() -> None:
    completion = ask(max_completion_tokens=4)
    assert completion.choices[0].finish_reason == "length"
    assert completion.choices[0].message.content == "Hell"


def test_messages_of_every_role_and_text_parts_reach_the_template() -> None:
    engine = FakeEngine()
    post(
        host=make_host(engine),
        messages=[
            {"role": "system", "content": "Be kind."},
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": t} for t in ("Hi", "you")]},
            {"role": "assistant", "content": "Yes?", "refusal": None, "tool_calls": None},
            {"role": "user", "content": "Bye"},
        ],
    )
    text = make_model("llama").tokenizer.decode(engine.requests[0].prompt_ids)
    assert text == (
        "<|begin|><|system|>Be kind.<|end|><|system|>Be brief.<|end|><|user|>Hi\nyou<|end|>"
        "<|assistant|>Yes?<|end|><|user|>Bye<|end|><|assistant|>"
    )


def test_unknown_fields_are_ignored_and_named() -> None:
    response = post(vendor_key=1, **{"bad\nkey": 2}, prompt_cache_key="x")
    assert response.status_code == 200
    assert response.headers["x-ignored-fields"] == "vendor_key, bad?key, prompt_cache_key"
    named = post(messages=[{"role": "user", "content": "Hi", "name": "Ann"}])
    assert named.headers["x-ignored-fields"] == "messages.name"
    nameless = post(**{"0": 1, "": 1})  # a header must not end in a blank
    assert nameless.headers["x-ignored-fields"] == "0, ?"


def test_a_failure_before_the_answer_is_a_status() -> None:
    for error, status, code in (
        (QueueFullError("256 requests are waiting already"), 429, "queue_full"),
        (EngineStoppedError("the engine is not running"), 503, "engine_stopped"),
        (PromptTooLongError("too long"), 400, "context_length_exceeded"),
        (StepFailedError("/secret/path"), 500, "internal_error"),
        (ProfileRemovedError("0.mlp_out"), 404, "model_not_found"),
    ):
        for stream in (False, True):
            response = post(host=make_host(FakeEngine(error=error)), stream=stream)
            assert response.status_code == status
            assert error_of(response)["code"] == code
            assert "secret" not in response.text
    response = post(host=make_host(FakeEngine(error=QueueFullError("full"))))
    assert int(response.headers["retry-after"]) >= 1


def test_a_failure_in_the_middle_of_an_answer_reaches_the_client() -> None:
    def engine() -> FakeEngine:
        return FakeEngine(error=StepFailedError("/secret/path"), fail_after=3)

    *_, error, done = events(post(host=make_host(engine()), stream=True))
    assert error["error"]["code"] == "internal_error" and done == "[DONE]"
    assert "secret" not in json.dumps(error)
    with pytest.raises(openai.APIError, match="computation of this request failed"):
        ask_streaming(engine())
    with pytest.raises(openai.InternalServerError, match="computation of this request failed"):
        ask(engine())


def test_an_unforeseen_error_is_an_envelope_without_a_traceback() -> None:
    host = make_host()
    host.engine.check = lambda request: 1 / 0  # type: ignore[method-assign]
    response = post(host=host)
    assert response.status_code == 500
    assert error_of(response)["type"] == "server_error"
    assert "ZeroDivision" not in response.text
    assert response.headers["x-request-id"]


def test_a_judge_that_fails_costs_the_outcome_only() -> None:
    def broken(text: str) -> Any:
        raise RuntimeError

    receipt = post(host=make_host(judge=broken)).json()["steering"]
    assert receipt["outcome"] is receipt["judge"] is None and receipt["refusal_score"] == -3.5


def test_the_judge_reads_the_whole_reply() -> None:
    seen: list[str] = []

    def judge(text: str) -> Any:
        seen.append(text)
        return "refusal"

    for stream in (False, True):
        post(host=make_host(judge=judge), stream=stream)
    assert seen == ["Hello, wörld! 🙂"] * 2


def test_a_draining_server_takes_no_requests_but_is_alive() -> None:
    host = make_host()

    async def run() -> list[httpx2.Response]:
        from tests.server.fakes import http_client

        async with http_client(host) as client:
            host.draining = True
            return [
                await client.post("/v1/chat/completions", json=body()),
                await client.get("/ready"),
                await client.get("/health"),
            ]

    chat, ready, health = asyncio.run(run())
    assert (chat.status_code, ready.status_code, health.status_code) == (503, 503, 200)
    assert error_of(chat)["code"] == error_of(ready)["code"] == "engine_stopped"


def test_a_dead_engine_shows_in_health_and_ready() -> None:
    host = make_host()
    host.engine.healthy = lambda: False  # type: ignore[method-assign]
    assert get("/health", host).status_code == 503
    assert get("/ready", host).status_code == 503
    assert post(host=host).status_code == 503


def test_models_are_listed_and_retrieved_by_the_official_client() -> None:
    async def run() -> tuple[list[str], Any]:
        async with openai_client(make_host(served_name="org/tiny")) as client:
            listed = [model.id async for model in client.models.list()]
            return listed, await client.models.retrieve("org/tiny:bold")

    listed, bold = asyncio.run(run())
    assert listed == ["org/tiny", "org/tiny:raw", "org/tiny:bold", "org/tiny:shy"]
    assert (bold.id, bold.parent, bold.profile) == ("org/tiny:bold", "org/tiny", "bold")


def test_profiles_are_listed_with_their_cards() -> None:
    profile = make_profile(
        "bold", card={"summary": "Bold.", "f1": float("nan")}, provenance={"seed": 1}
    )
    host = make_host(profiles=[profile])
    raw, bold = get("/v1/steering/profiles", host).json()["data"]
    assert raw["name"] == "raw" and raw["identity"] and raw["default"] and raw["edits"] == []
    assert bold["card"] == {"summary": "Bold.", "f1": None}
    assert bold["provenance"] == {"seed": 1}
    assert bold["fingerprint"] == profile.fingerprint
    assert bold["edits"] == [
        {"site": "1.resid_post", "rank": 0, "shift": True, "phase": "all", "gate": None}
    ]
    assert get("/v1/steering/profiles/bold", host).json() == bold
    assert get("/v1/steering/profiles/none", host).status_code == 404


def test_the_version_is_told() -> None:
    assert set(get("/version").json()) == {"version"}
