"""The OpenAPI document tells the truth."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.fakes import get


def document() -> dict[str, Any]:
    return dict(get("/openapi.json").json())


def test_every_endpoint_declares_its_errors_as_envelopes() -> None:
    for path, operations in document()["paths"].items():
        for operation in operations.values():
            assert operation["summary"], path
            assert "422" not in operation["responses"], path
            for status, response in operation["responses"].items():
                if int(status) >= 400:
                    schema = response["content"]["application/json"]["schema"]
                    assert schema == {"$ref": "#/components/schemas/ErrorEnvelope"}
            assert "500" in operation["responses"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_generation_declares_both_kinds_of_answer_and_all_errors(path: str) -> None:
    responses = document()["paths"][path]["post"]["responses"]
    assert sorted(map(int, responses)) == [
        *(200, 400, 401, 403, 404, 408, 413, 429),
        *(500, 503, 504),
    ]
    assert set(responses["200"]["content"]) == {"application/json", "text/event-stream"}
    assert "X-Steering-Profile" in responses["200"]["headers"]


def test_every_key_of_a_request_is_documented() -> None:
    schemas = document()["components"]["schemas"]
    request = schemas["ChatRequest"]["properties"]
    for name in ("model", "messages", "steering", "temperature", "top_k", "stream_options", "stop"):
        assert name in request
    assert set(schemas["SteeringChoice"]["properties"]) == {
        "profile",
        "strength",
        "profiles",
        "phase",
        "trace",
    }
    assert {"prompt", "n", "logprobs"} <= set(schemas["CompletionRequest"]["properties"])
    assert {"arms", "trace", "seed"} <= set(schemas["CompareRequest"]["properties"])
    chunks = {"ChatCompletionChunk", "ComparisonChunk"}
    assert {*chunks, "Completion", "Tokens"} <= set(schemas)


def test_every_reference_resolves() -> None:
    whole = document()

    def check(node: Any) -> None:
        if isinstance(node, dict):
            if "$ref" in node:
                target: Any = whole
                for part in node["$ref"].removeprefix("#/").split("/"):
                    target = target[part]
            for child in node.values():
                check(child)
        elif isinstance(node, list):
            for child in node:
                check(child)

    check(whole)
