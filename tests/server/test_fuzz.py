"""Bodies that are nearly right, and bodies that are garbage: no 5xx, no hang, a 4xx in the envelope
where they are wrong, and answers that the official client's types parse.

Profile files are fuzzed in `tests.server.test_admin`.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from contextlib import AsyncExitStack
from typing import Any

import httpx2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from server.compare_protocol import Comparison, ComparisonChunk
from server.responses import ErrorEnvelope, Score, Tokens
from tests.server.fakes import FakeEngine, error_of, events, http_client, make_host

CASES = 500
"""Per endpoint."""
PATIENCE = 20

numbers = st.sampled_from(
    [0, 1, 2, 0.5, 1.0, -1, 16, 17, 10**6, 2**31, -(2**63), 2**63, 10**400, 1e308, 1e-320, 5e-324]
)
texts = st.text(max_size=8) | st.sampled_from(
    ["", "Hi", "\ud800", "\x00", "\u202e", "<|end|>", "<|user|>", "é" * 300, "x" * 1200, "{}", "]"]
)
anything = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


def fields(of: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    """Some of these fields, each once in a while with something else in it."""
    mixed = {key: st.one_of(value, value, value, value, anything) for key, value in of.items()}
    return st.fixed_dictionaries({}, optional=mixed)


flags = st.none() | st.booleans()
steering = fields(
    {
        "profile": st.sampled_from(["raw", "bold", "shy", "gone"]),
        "strength": st.sampled_from([0, 0.5, -1, 1e4, 1e5]),
        "profiles": st.lists(
            fields({"name": st.sampled_from(["raw", "bold", "shy"]), "strength": numbers}),
            max_size=9,
        ),
        "phase": st.sampled_from(["prompt", "generation", "all", "never"]),
        "trace": flags,
    }
)
models = st.sampled_from(["tiny"] * 6 + ["tiny:bold", "tiny:shy", "tiny:gone", "tiny@x", "other"])
calls = st.fixed_dictionaries(
    {
        "id": texts,
        "type": st.just("function"),
        "function": fields(
            {"name": texts, "arguments": st.sampled_from(["{}", "", "[", '{"a": 1}'])}
        ),
    }
)
messages = st.lists(
    fields(
        {
            "role": st.sampled_from(["user"] * 4 + ["system", "assistant", "developer", "tool"]),
            "content": texts
            | st.lists(fields({"type": st.just("text"), "text": texts}), max_size=3),
            "name": texts,
            "tool_calls": st.lists(calls, max_size=2),
            "tool_call_id": texts,
        }
    ).map(lambda message: {"role": "user", "content": "Hi", **message}),
    min_size=1,
    max_size=4,
)
schemas = st.recursive(
    fields(
        {
            "type": st.sampled_from(["object", "string", "integer", "number", "boolean", "null"]),
            "enum": st.lists(anything, max_size=2),
            "pattern": st.sampled_from(["a+", "(", "^$", "(?=a)", "[0-9]{1,99}"]),
            "multipleOf": numbers,
            "minimum": numbers,
            "maxLength": st.sampled_from([0, 1, 9, -1]),
            "$ref": st.sampled_from(["#", "#/$defs/a", "https://example.org/a.json"]),
            "not": st.just({}),
        }
    ),
    lambda inner: fields(
        {
            "type": st.just("object"),
            "properties": st.dictionaries(texts, inner, max_size=2),
            "required": st.lists(texts, max_size=2),
            "items": inner,
            "anyOf": st.lists(inner, max_size=2),
            "additionalProperties": inner | st.booleans(),
        }
    ),
    max_leaves=3,
)
formats = st.sampled_from([{"type": "text"}, {"type": "json_object"}]) | schemas.map(
    lambda schema: {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
)
tools = st.lists(
    fields({"name": st.sampled_from(["f", "g", "no name"]), "parameters": schemas}).map(
        lambda function: {"type": "function", "function": function}
    ),
    max_size=2,
)
arms = fields({"strength": st.sampled_from([0, 0.5, -1, 1e5]), "messages": messages}).flatmap(
    lambda arm: st.sampled_from(["raw"] * 6 + ["bold", "shy", "gone"]).map(
        lambda profile: {"profile": profile, **arm}
    )
)
generation: dict[str, st.SearchStrategy[Any]] = {
    "steering": steering,
    "max_tokens": st.sampled_from([1, 5, 150, 0, 10**9]),
    "max_completion_tokens": st.sampled_from([1, 5]),
    "temperature": st.sampled_from([0, 1, 2, 2.1]),
    "top_p": st.sampled_from([1, 0.1, 0]),
    "top_k": st.sampled_from([-1, 0, 5, 2**31]),
    "min_p": st.sampled_from([0, 1, 1.1]),
    "presence_penalty": st.sampled_from([0, -2, 2, 3]),
    "frequency_penalty": st.sampled_from([0, -2, 2, 3]),
    "repetition_penalty": st.sampled_from([1, 0.01, 100, 0]),
    "logit_bias": st.dictionaries(st.sampled_from(["0", "9", "260", "999", "a", "-1"]), numbers),
    "seed": st.sampled_from([0, -5, 2**63 - 1, 2**63]),
    "n": st.sampled_from([1, 2, 4, 5, 17]),
    "stop": texts | st.lists(texts, max_size=5),
    "stream": flags,
    "stream_options": fields({"include_usage": flags, "include_obfuscation": flags}),
    "user": texts,
    "metadata": st.dictionaries(texts, texts, max_size=2),
    "unheard_of": anything,
    "echo": flags,
    "best_of": st.sampled_from([1, 2]),
}
BODIES: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "/v1/chat/completions": fields(
        {
            **generation,
            "logprobs": flags,
            "top_logprobs": st.sampled_from([0, 2, 20, 21]),
            "response_format": formats,
            "tools": tools,
            "tool_choice": st.sampled_from(["none", "auto", "required"]),
            "chat_template_kwargs": st.dictionaries(texts, anything, max_size=2),
            "continue_final_message": flags,
            "add_generation_prompt": flags,
        }
    ),
    "/v1/completions": fields({**generation, "logprobs": st.sampled_from([0, 5, 6])}),
    "/tokenize": fields(
        {
            "return_token_strs": flags,
            "add_generation_prompt": flags,
            "chat_template_kwargs": st.dictionaries(texts, anything, max_size=1),
        }
    ),
    "/v1/steering/score": fields({"steering": steering}),
    "/v1/steering/compare": fields(
        {
            **{key: value for key, value in generation.items() if key not in ("n", "steering")},
            "trace": flags,
            "n": st.sampled_from([1, 1, 2]),
            "chat_template_kwargs": st.dictionaries(texts, anything, max_size=1),
        }
    ),
    "/v1/steering/profiles": fields({"path": texts, "name": texts}),
}
prompts = (
    texts
    | st.lists(st.sampled_from([0, 5, 260, 261, -1]), max_size=3)
    | st.lists(texts, max_size=3)
    | st.lists(st.lists(st.sampled_from([0, 5, 260]), max_size=3), max_size=3)
)


@st.composite
def bodies(draw: Any, path: str) -> bytes:
    """A sound body with some fields added; sometimes torn, or nothing of the kind."""
    kind = draw(st.integers(0, 19))
    if kind == 0:
        return bytes(draw(st.binary(max_size=40)))
    if kind == 1:
        return json.dumps(draw(anything)).encode()
    body: dict[str, Any] = {"model": draw(models)}
    if path in ("/v1/chat/completions", "/v1/steering/score", "/v1/steering/compare"):
        body["messages"] = draw(messages)
    if path == "/v1/steering/compare":
        body["model"] = draw(st.sampled_from(["tiny"] * 9 + ["tiny:bold"]))
        body["arms"] = draw(st.lists(arms, min_size=1, max_size=3) | st.lists(arms))
    if path == "/v1/completions":
        body["prompt"] = draw(prompts)
    if path == "/tokenize":
        body |= draw(
            fields({"messages": messages, "continue_final_message": flags})
            | fields({"prompt": texts, "add_special_tokens": flags})
        )
    if path == "/v1/steering/profiles":
        del body["model"]
    # Few at a time, so that most get past the first check.
    chosen = draw(BODIES[path])
    keys = draw(st.lists(st.sampled_from(sorted(chosen)), max_size=5)) if chosen else []
    body |= {key: chosen[key] for key in keys}
    whole = json.dumps(body).encode()
    return whole[: draw(st.integers(0, len(whole)))] if kind == 2 else whole


def parse(path: str, response: httpx2.Response) -> None:
    """Read an answer with the official client's types; raises where it is none."""
    if path == "/v1/completions":
        of_chunk: Any = Completion
        of_whole: Any = Completion
    elif path == "/v1/steering/compare":
        of_chunk, of_whole = ComparisonChunk, Comparison
    else:
        of_chunk, of_whole = ChatCompletionChunk, ChatCompletion
    if path == "/tokenize":
        assert Tokens.model_validate(response.json()).count == len(response.json()["tokens"])
    elif path == "/v1/steering/score":
        Score.model_validate(response.json())
    elif response.headers["content-type"].startswith("text/event-stream"):
        *told, done = events(response)
        assert done == "[DONE]"
        for event in told:
            if "error" in event:  # the status was sent by then
                ErrorEnvelope.model_validate(event)
            else:
                if path == "/v1/completions":
                    # OpenAI's own chunks have null before the last; their type says otherwise.
                    for choice in event["choices"]:
                        choice["finish_reason"] = choice["finish_reason"] or "stop"
                of_chunk.model_validate(event)
    else:
        of_whole.model_validate(response.json())


@pytest.mark.filterwarnings("ignore:Generating overly large repr")  # these bodies are
@pytest.mark.parametrize("path", BODIES)
def test_no_body_breaks_the_server(path: str) -> None:
    statuses: Counter[int] = Counter()
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()
        http = runner.run(stack.enter_async_context(http_client(make_host(FakeEngine("Hi! 🙂")))))

        @settings(
            max_examples=CASES,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        @given(raw=bodies(path))
        def fuzz(raw: bytes) -> None:
            async def send() -> httpx2.Response:
                headers = {"Content-Type": "application/json"}
                async with asyncio.timeout(PATIENCE):
                    return await http.post(path, content=raw, headers=headers)

            response = runner.run(send())
            statuses[response.status_code] += 1
            if response.status_code == 200:
                parse(path, response)
            else:
                assert response.status_code in (400, 403, 404, 409), response.text
                error_of(response)

        try:
            fuzz()
        finally:
            runner.run(stack.aclose())
    assert statuses.total() >= CASES
    if path != "/v1/steering/profiles":  # a path that is inside the folder is none
        assert min(statuses[200], statuses[400]) > CASES / 10, statuses
