"""Plain completions as the official client sees them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import pytest
from openai.types import Completion

from server.engine.base import EngineRequest, EngineToken
from server.protocol import CompletionRequest
from server.unsupported import UNSUPPORTED_IN_COMPLETIONS
from tests.conftest import make_model, make_sentencepiece
from tests.server.fakes import (
    FakeEngine,
    error_of,
    events,
    make_host,
    make_profile,
    openai_client,
    post,
)

TEXT = "Hello, wörld! 🙂"


def ask(engine: FakeEngine | None = None, **arguments: Any) -> Completion:
    async def run() -> Completion:
        async with openai_client(make_host(engine)) as client:
            return await client.completions.create(
                **{"model": "tiny", "prompt": "Hi", "max_tokens": 50, **arguments}
            )

    return asyncio.run(run())


def send(host: Any = None, **changes: Any) -> Any:
    payload = {"model": "tiny", "prompt": "Hi", "max_tokens": 50, **changes}
    return post(payload, host=host, path="/v1/completions")


def test_the_official_client_gets_a_completion() -> None:
    completion: Any = ask(model="tiny:bold")
    Completion.model_validate(completion.model_dump(), strict=True)
    assert completion.object == "text_completion" and completion.id.startswith("cmpl-")
    assert completion.choices[0].text == TEXT
    assert completion.choices[0].finish_reason == "stop"
    assert completion.usage.prompt_tokens == 2
    assert completion.steering["profile"] == "bold"
    assert completion.steering["outcome"] == "answer"


def test_the_official_client_gets_a_stream() -> None:
    async def run() -> list[Completion]:
        async with openai_client(make_host()) as client:
            stream = await client.completions.create(
                model="tiny", prompt="Hi", max_tokens=50, stream=True,
                stream_options={"include_usage": True},
            )  # fmt: skip
            return [chunk async for chunk in stream]

    chunks: list[Any] = asyncio.run(run())
    *pieces, last, usage = chunks
    assert "".join(c.choices[0].text for c in pieces) == TEXT
    assert all(c.choices[0].finish_reason is None for c in pieces)
    assert last.choices[0].finish_reason == "stop" and last.steering["outcome"] == "answer"
    assert usage.choices == [] and usage.usage.total_tokens == 2 + len(TEXT.encode()) + 1
    assert {c.object for c in chunks} == {"text_completion"} and len({c.id for c in chunks}) == 1


def test_a_stream_ends_with_done() -> None:
    response = send(stream=True)
    assert events(response)[-1] == "[DONE]"
    assert response.headers["x-steering-profile"] == "raw"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("Hi", [[72, 105]]),
        (["Hi", "a"], [[72, 105], [97]]),
        ([72, 105], [[72, 105]]),
        ([[72], [97, 98]], [[72], [97, 98]]),
    ],
)
def test_a_prompt_is_text_or_tokens_or_a_list_of_either(
    prompt: Any, expected: list[list[int]]
) -> None:
    engine = FakeEngine()
    completion = ask(engine, prompt=prompt)
    tokenizer = make_model("llama").tokenizer
    sent = [list(request.prompt_ids) for request in engine.requests]
    if isinstance(prompt, str) or isinstance(prompt[0], str):
        assert [tokenizer.decode(ids) for ids in sent] == (
            [prompt] if isinstance(prompt, str) else prompt
        )
    else:
        assert sent == expected
    assert [c.index for c in completion.choices] == list(range(len(expected)))
    assert completion.usage is not None
    assert completion.usage.prompt_tokens == sum(map(len, sent))


def test_the_default_length_is_openais() -> None:
    engine = FakeEngine()
    ask(engine, max_tokens=None)
    assert engine.requests[0].sampling.max_tokens == 16


def test_logprobs_have_the_older_shape() -> None:
    completion = ask(FakeEngine("aé"), logprobs=2)
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == ["a", "bytes:\\xc3", "bytes:\\xa9"]
    assert logprobs.token_logprobs == [-0.5] * 3
    assert logprobs.text_offset == [0, 1, 1]
    assert logprobs.top_logprobs is not None
    assert logprobs.top_logprobs[0]["a"] == -0.5
    assert sorted(logprobs.top_logprobs[0].values()) == [-9999.0, -0.5]
    # The token itself, even where no alternatives were asked for; nothing unless asked.
    assert (ask(FakeEngine("a"), logprobs=0).choices[0].logprobs or logprobs).top_logprobs == [
        {"a": -0.5}
    ]
    assert ask().choices[0].logprobs is None


@pytest.mark.parametrize(
    ("changes", "param", "says"),
    [
        ({"prompt": None}, "prompt", "got null"),
        ({"prompt": []}, "prompt", "must not be empty"),
        ({"prompt": [[]]}, "prompt[0]", "must not be empty"),
        ({"prompt": ["a", 3]}, "prompt[1]", "valid string"),
        ({"prompt": [1, "a"]}, "prompt[1]", "valid integer"),
        ({"prompt": [True]}, "prompt[0]", "valid integer"),
        ({"prompt": [-1]}, "prompt[0]", "greater than or equal to 0"),
        ({"prompt": {"a": 1}}, "prompt", "valid string"),
        ({"prompt": ["a"] * 5}, "prompt", "--max-num-seqs"),
        ({"prompt": ["a"] * 3, "n": 2}, "prompt", "3 prompts"),
        ({"prompt": "\ud83d"}, "prompt", "surrogate"),
        ({"prompt": "x" * 300}, "prompt", "shorten it"),
        ({"prompt": "x" * 20000}, "prompt", "characters"),
        ({"echo": True}, "echo", "not support"),
        ({"suffix": "end"}, "suffix", "not support"),
        ({"best_of": 2}, "best_of", "same as 'n'"),
        ({"best_of": 1, "n": 2}, "best_of", "same as 'n'"),
        ({"logprobs": 6}, "logprobs", "less than or equal to 5"),
        ({"logprobs": True}, "logprobs", "integer"),
        ({"top_logprobs": 2}, "top_logprobs", "not support"),
        ({"messages": []}, "messages", "not support"),
        ({"stream_options": {}}, "stream_options", "'stream': true"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_a_400_that_names_it(
    changes: dict[str, Any], param: str, says: str
) -> None:
    engine = FakeEngine()
    response = send(make_host(engine), **changes)
    error = error_of(response)
    assert response.status_code == 400, response.text
    assert error["param"] == param and says in error["message"], error
    assert not engine.requests


def test_what_asks_for_nothing_is_accepted() -> None:
    response = send(n=2, best_of=2, echo=False, suffix=None, user="me", metadata={"a": "b"}, x=1)
    assert response.status_code == 200
    assert response.headers["x-ignored-fields"] == "x"


def test_every_field_of_the_official_client_is_known() -> None:
    from openai.types.completion_create_params import CompletionCreateParamsBase

    known = set(UNSUPPORTED_IN_COMPLETIONS) | set(CompletionRequest.model_fields)
    assert set(CompletionCreateParamsBase.__annotations__) <= known


def test_an_unknown_profile_is_a_404_and_a_known_one_steers() -> None:
    assert send(model="tiny:none").status_code == 404
    engine = FakeEngine()
    send(make_host(engine), steering={"profile": "bold", "strength": 2})
    assert [applied.strength for applied in engine.requests[0].edits] == [2]
    assert make_profile("bold").edits


def test_a_text_goes_on_with_the_blank_before_its_next_word() -> None:
    """Prompt and reply put together are the text, with tokenizers that mark blanks, too."""
    tokenizer = make_sentencepiece("Of", "course")
    of, course = tokenizer.convert_tokens_to_ids(["\u2581Of", "\u2581course"])

    class Engine(FakeEngine):
        async def _tokens(self, request: EngineRequest) -> AsyncGenerator[EngineToken, None]:
            yield EngineToken(course, -0.5, finish_reason="length")

    host = make_host(Engine())
    host.lm = replace(host.lm, tokenizer=tokenizer)
    assert send(host, prompt=[of]).json()["choices"][0]["text"] == " course"
    stopped = send(host, prompt=[of], stop=" cou").json()["choices"][0]
    assert (stopped["text"], stopped["finish_reason"]) == ("", "stop")
