"""A second client that people use, LangChain's, against a real server."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, SystemMessage
from langchain_core.messages.tool import ToolMessage
from langchain_openai import ChatOpenAI

from server.engine.local import LocalEngine
from tests.conftest import make_model
from tests.server.fakes import FakeEngine, make_host
from tests.server.live import live_server
from tests.server.test_tools import TWO, WEATHER, host_with

REPLY = "Hello, wörld! 🙂"


def model(address: str, **more: Any) -> Any:
    return ChatOpenAI(
        **{"base_url": f"{address}/v1", "api_key": "none", "model": "tiny", "max_retries": 0} | more
    )


def test_it_gets_answers_whole_in_pieces_and_many_at_once() -> None:
    asked = [SystemMessage("Be short."), HumanMessage("Hi")]
    with live_server(make_host(FakeEngine(REPLY))) as address:
        llm = model(address, temperature=0, seed=1, stop=["never"])
        whole = llm.invoke(asked)
        assert isinstance(whole, AIMessage) and whole.content == REPLY
        assert whole.response_metadata["finish_reason"] == "stop"
        assert whole.usage_metadata is not None and whole.usage_metadata["input_tokens"] > 10

        pieces = list(model(address, stream_usage=True).stream(asked))
        assert len(pieces) > 5 and "".join(str(p.content) for p in pieces) == REPLY
        total = sum(pieces[1:], pieces[0])
        assert isinstance(total, AIMessageChunk) and total.usage_metadata is not None
        assert total.usage_metadata["output_tokens"] == whole.usage_metadata["output_tokens"]

        async def many() -> list[Any]:
            return list(await llm.abatch([asked] * 8))

        assert [message.content for message in asyncio.run(many())] == [REPLY] * 8


def test_it_chooses_profiles_and_reads_log_probabilities() -> None:
    engine = LocalEngine(make_model("llama"), max_num_seqs=2, max_model_len=128)
    with live_server(make_host(engine)) as address:
        asked = dict(temperature=0, max_tokens=8)
        raw = model(address, **asked).invoke("Hi")
        steered = model(
            address, extra_body={"steering": {"profile": "bold", "strength": 4}}, **asked
        ).invoke("Hi")
        assert (
            steered.content
            == model(address, model="tiny:bold", **asked)
            .bind(extra_body={"steering": {"strength": 4}})
            .invoke("Hi")
            .content
        )
        assert steered.content != raw.content
        told = model(address, logprobs=True, top_logprobs=2, **asked).invoke("Hi")
        logprobs = told.response_metadata["logprobs"]["content"]
        assert len(logprobs) == 8 and all(len(t["top_logprobs"]) == 2 for t in logprobs)


def test_it_calls_tools_and_sends_their_results() -> None:
    with live_server(host_with(reply=TWO)) as address:
        llm = model(address).bind_tools([WEATHER])
        asked: list[Any] = [HumanMessage("What is the weather in Paris?")]
        reply = llm.invoke(asked)
        [call] = [call for call in reply.tool_calls if call["name"] == "get_weather"]
        assert call["args"] == {"city": "Paris"}
        streamed = list(llm.stream(asked))
        total = sum(streamed[1:], streamed[0])
        assert [c["args"] for c in total.tool_calls] == [c["args"] for c in reply.tool_calls]
        results = [ToolMessage("Rain.", tool_call_id=c["id"]) for c in reply.tool_calls]
        assert llm.invoke([*asked, reply, *results]).tool_calls


@pytest.mark.parametrize(
    ("changes", "kind", "code"),
    [
        ({"model": "other"}, openai.NotFoundError, "model_not_found"),
        ({"temperature": 5}, openai.BadRequestError, "invalid_value"),
        ({"reasoning_effort": "high"}, openai.BadRequestError, "unsupported_parameter"),
    ],
)
def test_errors_are_the_ones_that_it_knows(
    changes: dict[str, Any], kind: type[openai.APIStatusError], code: str
) -> None:
    with live_server(make_host()) as address:
        for call in ("invoke", "stream"):
            with pytest.raises(kind) as raised:
                list(getattr(model(address, **changes), call)("Hi"))
            assert raised.value.code == code
