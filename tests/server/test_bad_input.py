"""Every way to ask wrongly has its own clear error, and the server answers the next request."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import openai
import pytest

from server.engine.local import LocalEngine
from server.unsupported import UNSUPPORTED
from tests.server.fakes import (
    FakeEngine,
    body,
    error_of,
    get,
    http_client,
    make_host,
    openai_client,
    post,
)

USER = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize(
    ("changes", "param", "says"),
    [
        ({"messages": []}, "messages", "must not be empty"),
        ({"messages": "Hi"}, "messages", "valid list"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "required"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "got null"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "messages[0].role", "'system'"),
        ({"messages": [USER, "x"]}, "messages[1]", "got \"x\""),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0].type",
            "'text'",
        ),
        ({"model": 3}, "model", "valid string"),
        ({"temperature": -0.1}, "temperature", "greater than or equal to 0"),
        ({"temperature": 2.1}, "temperature", "less than or equal to 2 (got 2.1)"),
        ({"temperature": "1"}, "temperature", "valid number"),
        ({"temperature": True}, "temperature", "valid number"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"top_p": 1.5}, "top_p", "less than or equal to 1"),
        ({"top_k": -2}, "top_k", "-1"),
        ({"top_k": 1.5}, "top_k", "integer"),
        ({"top_k": 10**23}, "top_k", "less than"),
        ({"messages": [{**USER, "content": "\ud83d"}]}, "messages", "surrogate"),
        ({"seed": 2**63}, "seed", "less than"),
        ({"seed": "x"}, "seed", "integer"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": True}, "max_tokens", "integer"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "contradict"),
        ({"stream": "yes"}, "stream", "boolean"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "'stream': true"),
        (
            {"stream": True, "stream_options": {"usage": True}},
            "stream_options.usage",
            "not a key",
        ),
        ({"steering": "bold"}, "steering", "object"),
        ({"steering": {"profil": "bold"}}, "steering.profil", "not a key"),
        ({"steering": {"profile": 3}}, "steering.profile", "valid string"),
        ({"steering": {"strength": "1"}}, "steering.strength", "valid number"),
        ({"steering": {"strength": 1e5}}, "steering.strength", "10000"),
        (
            {"model": "tiny:bold", "steering": {"profile": "shy"}},
            "steering.profile",
            "'model' asks for the profile 'bold'",
        ),
        ({"metadata": {"a": 1}}, "metadata.a", "valid string"),
        ({"metadata": {str(i): "x" for i in range(17)}}, "metadata", "at most 16"),
        ({"user": 3}, "user", "valid string"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "at most 4"),
        ({"stop": ""}, "stop", "at least 1 character"),
        ({"stop": ["a", ""]}, "stop[1]", "at least 1 character"),
        ({"stop": "x" * 1001}, "stop", "at most 1000"),
        ({"stop": 3}, "stop", "valid string"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 17}, "n", "less than or equal to 16"),
        ({"n": 5}, "n", "--max-num-seqs"),
        ({"n": True}, "n", "integer"),
        ({"min_p": 1.5}, "min_p", "less than or equal to 1"),
        ({"presence_penalty": 3}, "presence_penalty", "less than or equal to 2"),
        ({"frequency_penalty": -3}, "frequency_penalty", "greater than or equal to -2"),
        ({"repetition_penalty": 0}, "repetition_penalty", "0.01"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "token ids for keys"),
        ({"logit_bias": {"5": 1, "05": -1}}, "logit_bias", "token ids for keys"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1", "less than or equal to 100"),
        ({"logit_bias": [1]}, "logit_bias", "dictionary"),
        ({"top_logprobs": 3}, "top_logprobs", "'logprobs': true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"logprobs": 3}, "logprobs", "boolean"),
        ({"continue_final_message": True}, "continue_final_message", "role 'assistant'"),
        (
            {"continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message",
            "contradict",
        ),
        ({"ignore_eos": True}, "ignore_eos", "send false"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_a_400_that_names_it(
    changes: dict[str, Any], param: str, says: str
) -> None:
    engine = FakeEngine()
    response = post(host=make_host(engine), **changes)
    error = error_of(response)
    assert response.status_code == 400, response.text
    assert error["param"] == param
    assert says in error["message"]
    assert error["type"] == "invalid_request_error"
    assert not engine.requests


@pytest.mark.parametrize("name", sorted(UNSUPPORTED))
def test_a_known_but_unsupported_field_is_refused_unless_it_asks_for_nothing(name: str) -> None:
    response = post(**{name: "something else"})
    assert response.status_code == 400
    assert error_of(response)["param"] == name
    assert error_of(response)["code"] == "unsupported_parameter"
    for value in (None, *UNSUPPORTED[name]):
        response = post(**{name: value})
        assert response.status_code == 200, (name, value)
        assert "x-ignored-fields" not in response.headers


def test_every_field_of_the_official_client_is_known() -> None:
    from openai.types.chat.completion_create_params import CompletionCreateParamsBase

    from server.protocol import ChatRequest

    # Hints to a cache, which cost nothing where there is none; `stream` is in a subclass.
    hints = {"prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"}
    known = set(UNSUPPORTED) | set(ChatRequest.model_fields) | hints
    assert set(CompletionCreateParamsBase.__annotations__) <= known


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_strength_that_is_not_finite_is_a_400(literal: str) -> None:
    raw = json.dumps(body(steering={"profile": "bold", "strength": "X"})).replace('"X"', literal)
    response = post(raw=raw)
    assert response.status_code == 400
    assert error_of(response)["param"] == "steering.strength"


@pytest.mark.parametrize("literal", ["NaN", "1e999"])
def test_a_temperature_that_is_not_finite_is_a_400(literal: str) -> None:
    response = post(raw=json.dumps(body(temperature="X")).replace('"X"', literal))
    assert response.status_code == 400
    assert error_of(response)["param"] == "temperature"


@pytest.mark.parametrize(
    "raw",
    [
        b"{", b"", b"[]", b"null", b'"x"', b"\xff\xfe", b'{"model": "tiny",}', b"[" * 100_000,
        b'{"seed": ' + b"1" * 5000 + b"}",
    ],
)  # fmt: skip
def test_a_body_that_is_no_json_object_is_a_400(raw: bytes) -> None:
    response = post(raw=raw)
    assert response.status_code == 400
    assert error_of(response)["type"] == "invalid_request_error"


def test_a_body_sent_as_a_form_is_told_what_to_send() -> None:
    response = post(headers={"Content-Type": "application/x-www-form-urlencoded"})
    assert response.status_code == 400
    assert "Content-Type: application/json" in error_of(response)["message"]


def test_text_that_is_no_unicode_is_a_400_or_harmless() -> None:
    surrogate = '"\\ud800"'
    message = json.dumps(body()).replace('"Hi"', surrogate)
    assert post(raw=message).status_code == 400
    assert post(raw=json.dumps(body()).replace('"tiny"', surrogate)).status_code in (400, 404)
    refused = post(raw=json.dumps(body(x=1)).replace('"x"', surrogate))
    assert refused.status_code == 400 and "surrogate" in error_of(refused)["message"]


def test_an_unknown_model_is_a_404_that_lists_the_models() -> None:
    response = post(model="gpt-4")
    assert response.status_code == 404
    error = error_of(response)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "tiny:bold" in error["message"]


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"model": "tiny:none"}, "model"),
        ({"steering": {"profile": "none"}}, "steering.profile"),
        ({"model": "tiny:"}, "model"),
    ],
)
def test_an_unknown_profile_is_a_404_that_lists_the_profiles(
    changes: dict[str, Any], param: str
) -> None:
    response = post(**changes)
    assert response.status_code == 404
    error = error_of(response)
    assert (error["code"], error["param"]) == ("model_not_found", param)
    assert "raw, bold, shy" in error["message"]


def test_an_unknown_experiment_is_a_404() -> None:
    response = post(model="tiny@x")
    assert response.status_code == 404
    assert "experiment 'x'" in error_of(response)["message"]


def test_a_prompt_over_the_context_is_a_400() -> None:
    engine = FakeEngine()
    host = make_host(engine)
    for changes in (
        {"messages": [{"role": "user", "content": "x" * 500}]},
        {"messages": [{"role": "user", "content": "x" * 190}], "max_tokens": 50},
        {"max_tokens": 10**9},
    ):
        response = post(host=host, **changes)
        assert response.status_code == 400
        assert error_of(response)["code"] == "context_length_exceeded"
        assert "200 tokens" in error_of(response)["message"]
    assert not engine.requests


def test_messages_that_the_template_rejects_are_a_400() -> None:
    host = make_host()

    def reject(messages: Any) -> list[int]:
        raise ValueError("the chat template cannot render these messages: no system role")

    object.__setattr__(host.lm, "encode_chat", reject)
    try:
        response = post(host=host)
    finally:
        object.__delattr__(host.lm, "encode_chat")
    assert response.status_code == 400
    assert "no system role" in error_of(response)["message"]


def test_errors_and_echoes_are_capped() -> None:
    many = post(messages=[{"role": "x" * 5000, "content": 1}] * 500)
    assert many.status_code == 400
    assert len(many.text) < 10_000
    assert "and 990 more" in error_of(many)["message"]
    assert len(post(model="x" * 100_000).text) < 1000
    assert len(post(**{"x" * 100_000: 1}).headers["x-ignored-fields"]) < 200


def test_an_unknown_path_or_method_is_an_envelope() -> None:
    assert error_of(get("/v1/nothing"))["code"] == "not_found"
    response = get("/v1/chat/completions")
    assert response.status_code == 405
    assert error_of(response)["code"] == "method_not_allowed"
    assert response.headers["allow"] == "POST"


def test_the_official_client_raises_its_own_errors() -> None:
    async def run() -> None:
        async with openai_client(make_host()) as client:
            create: Any = client.chat.completions.create
            with pytest.raises(openai.NotFoundError) as missing:
                await create(model="gpt-4", messages=[USER])
            assert missing.value.code == "model_not_found"
            with pytest.raises(openai.BadRequestError) as bad:
                await create(model="tiny", messages=[USER], n=17)
            assert bad.value.param == "n"
            assert (await create(model="tiny", messages=[USER])).choices  # it serves on

    asyncio.run(run())


def test_one_server_survives_all_of_it() -> None:
    async def run() -> None:
        async with http_client(make_host()) as client:
            for raw in (b"{", b"[]", b"\xff", json.dumps(body(n=0)).encode(), b"[" * 100_000):
                response = await client.post(
                    "/v1/chat/completions",
                    content=raw,
                    headers={"Content-Type": "application/json"},
                )
                assert response.status_code == 400
            assert (await client.post("/v1/chat/completions", json=body())).status_code == 200

    asyncio.run(run())


def test_a_body_that_is_too_large_is_refused_unread_or_as_soon_as_it_is() -> None:
    host = replace(make_host(), max_body_bytes=2000)
    large = json.dumps(body(messages=[{**USER, "content": "x" * 5000}])).encode()

    async def in_pieces() -> AsyncIterator[bytes]:
        for at in range(0, len(large), 100):
            yield large[at : at + 100]

    async def send() -> None:
        async with http_client(host) as client:
            for content in (large, in_pieces()):
                response = await client.post("/v1/chat/completions", content=content)
                assert response.status_code == 413
                assert error_of(response)["code"] == "body_too_large"
                assert response.headers["X-Request-Id"]

    asyncio.run(send())
    assert post(host=host).status_code == 200


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/steering/profiles"])
def test_a_body_that_never_ends_is_not_waited_for(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.middleware.BODY_SECONDS", 0.05)
    host = make_host()
    host.engine = LocalEngine(host.lm, max_num_seqs=1, max_model_len=64)

    async def begun() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.Event().wait()

    async def send() -> None:
        async with http_client(host) as client:
            response = await client.post(path, content=begun())
            assert response.status_code == 408
            assert error_of(response)["code"] == "body_timeout"
            assert response.headers["Connection"] == "close"
            page = (await client.get("/metrics")).text
            assert 'steering_rejections_total{reason="slow_body"} 1.0' in page

    asyncio.run(send())


def test_a_reply_may_take_longer_than_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wait for the client to go away is none for its body."""
    monkeypatch.setattr("server.middleware.BODY_SECONDS", 0.05)
    engine = FakeEngine("Hi", delay=0.1)
    assert post(host=make_host(engine)).status_code == 200


def test_a_prompt_that_cannot_fit_is_refused_before_it_is_tokenised() -> None:
    response = post(messages=[{**USER, "content": "x" * 200_000}])
    assert response.status_code == 400
    assert error_of(response)["code"] == "context_length_exceeded"
    assert "200000 characters" in error_of(response)["message"]


@pytest.mark.parametrize("raw", [b'{"model": "\xff"}', b"[" * 100_000])
def test_a_body_that_is_no_json_text_says_so(raw: bytes) -> None:
    response = post(raw=raw, headers={"Content-Type": "application/json"})
    assert response.status_code == 400 and error_of(response)["code"] == "invalid_json"
