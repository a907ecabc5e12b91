"""The generation contract with the official client, sync and async, on the real engine behind a
real socket."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import torch
from openai.types import Completion
from openai.types.chat import ChatCompletion

from server.engine.local import LocalEngine
from tests.conftest import make_model
from tests.server.fakes import make_host
from tests.server.live import live_server, wait_until

MESSAGES: Any = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def engine() -> LocalEngine:
    return LocalEngine(make_model("llama"), max_num_seqs=4, max_model_len=250)


@pytest.fixture(scope="module")
def address(engine: LocalEngine) -> Iterator[str]:
    with live_server(make_host(engine, profiles=[])) as url:
        yield url


@pytest.fixture
def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def test_raw_responses_parse_into_the_clients_types(client: openai.OpenAI) -> None:
    chat = client.chat.completions.with_raw_response.create(
        model="tiny", messages=MESSAGES, n=2, logprobs=True, top_logprobs=3, seed=1, max_tokens=8
    )
    assert chat.headers["x-steering-profile"] == "raw"
    ChatCompletion.model_validate_json(chat.text, strict=True)
    parsed = chat.parse()
    assert [c.index for c in parsed.choices] == [0, 1]
    plain = client.completions.with_raw_response.create(
        model="tiny", prompt="a", logprobs=2, max_tokens=8, seed=1
    )
    Completion.model_validate_json(plain.text, strict=True)
    assert plain.parse().choices[0].logprobs is not None


def test_streams_say_what_whole_answers_say_sync_and_async(
    client: openai.OpenAI, address: str
) -> None:
    asked: dict[str, Any] = {
        "model": "tiny",
        "n": 3,
        "seed": 5,
        "max_tokens": 12,
        "stop": ["e", "\n"],
    }
    whole = client.chat.completions.create(messages=MESSAGES, **asked)
    plain = client.completions.create(prompt="Hi", **asked)

    def texts(chunks: list[Any]) -> list[tuple[str, str]]:
        found = []
        for index in range(3):
            mine = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == index]
            pieces = [c.text if hasattr(c, "text") else c.delta.content or "" for c in mine]
            found.append(("".join(pieces), mine[-1].finish_reason))
        return found

    async def run() -> list[list[Any]]:
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none") as a:
            chat = await a.chat.completions.create(messages=MESSAGES, stream=True, **asked)
            text = await a.completions.create(prompt="Hi", stream=True, **asked)
            return [[c async for c in chat], [c async for c in text]]

    chat = client.chat.completions.create(messages=MESSAGES, stream=True, **asked)
    text = client.completions.create(prompt="Hi", stream=True, **asked)
    chats, plains = asyncio.run(run())
    expected = [(c.message.content, c.finish_reason) for c in whole.choices]
    assert texts(list(chat)) == texts(chats) == expected
    assert texts(list(text)) == texts(plains) == [(c.text, c.finish_reason) for c in plain.choices]
    assert not any("e" in t or "\n" in t for t, _ in texts(chats) + texts(plains))


def test_log_probabilities_are_the_models_own(client: openai.OpenAI) -> None:
    lm = make_model("llama")
    prompt = [10, 20, 30, 40]
    completion = client.completions.create(
        model="tiny", prompt=prompt, max_tokens=6, temperature=0, logprobs=5,
        presence_penalty=1.0, frequency_penalty=1.0, logit_bias={"70": 5},
    )  # fmt: skip
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None and logprobs.tokens and logprobs.token_logprobs
    with torch.inference_mode():
        raw = lm.model(torch.tensor([prompt])).logits[0, -1].float().log_softmax(-1)
    assert logprobs.top_logprobs is not None and logprobs.top_logprobs[0] is not None
    best = sorted(logprobs.top_logprobs[0].values(), reverse=True)[:5]
    assert best == pytest.approx(raw.topk(5).values.tolist(), abs=1e-4)


def test_a_stop_string_frees_the_slot_before_the_length_is_reached(
    client: openai.OpenAI, engine: LocalEngine
) -> None:
    reply = client.chat.completions.create(
        model="tiny", messages=MESSAGES, temperature=0, max_tokens=200, logit_bias={"257": -100}
    )
    text = reply.choices[0].message.content or ""
    stop = text[3:5]
    cut = client.chat.completions.create(
        model="tiny", messages=MESSAGES, temperature=0, max_tokens=200, logit_bias={"257": -100},
        stop=stop,
    )  # fmt: skip
    assert cut.choices[0].message.content == text[: text.find(stop)]
    assert cut.choices[0].finish_reason == "stop"
    assert cut.usage is not None and cut.usage.completion_tokens < 30
    wait_until(lambda: engine.stats().slots_used == 0)


def test_a_client_that_goes_away_frees_the_slots_of_all_choices(
    client: openai.OpenAI, engine: LocalEngine
) -> None:
    stream = client.chat.completions.create(
        model="tiny", messages=MESSAGES, n=4, max_tokens=230, logit_bias={"257": -100}, stream=True
    )
    for chunk in stream:
        if chunk.choices[0].delta.content:
            break
    assert engine.stats().slots_used == 4
    stream.close()
    wait_until(lambda: engine.stats().slots_used == 0)


def test_a_bias_beyond_the_vocabulary_is_named(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="below 261") as bad:
        client.chat.completions.create(model="tiny", messages=MESSAGES, logit_bias={"5000": 1})
    assert bad.value.param == "logit_bias"
    with pytest.raises(openai.BadRequestError, match="token ids") as bad:
        client.completions.create(model="tiny", prompt=[5000])
    assert bad.value.param == "prompt"
    with pytest.raises(openai.BadRequestError, match="empty") as bad:
        client.completions.create(model="tiny", prompt="")
    assert bad.value.param == "prompt"
