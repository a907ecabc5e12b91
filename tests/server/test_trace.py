"""Traces as clients get them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from server.engine.local import LocalEngine
from server.hosting import Host
from tests.conftest import make_model
from tests.server.fakes import FakeEngine, error_of, events, make_host, post
from tests.server.test_hosting import make_monitor
from tests.server.test_tools import TWO, WEATHER, host_with

TRACE = {"trace": True}
TEXT = "Hello, wörld! 🙂"
SCORES = ("answer_probability", "benign_probability", "edit_norm")


def monitored(**engine: Any) -> Host:
    lm = make_model("llama")
    monitor = make_monitor(lm)
    settings = {"max_num_seqs": 4, "max_model_len": 200, "monitor": monitor, **engine}
    return replace(make_host(LocalEngine(lm, **settings)), monitor=monitor)


def streamed(host: Host | None = None, **changes: Any) -> list[dict[str, Any]]:
    *chunks, done = events(post(host=host, stream=True, **changes))
    assert done == "[DONE]"
    return [chunk["choices"][0] for chunk in chunks if chunk["choices"]]


def text_of(trace: list[dict[str, Any]]) -> str:
    """The text that a trace's tokens spell, a token a byte."""
    spelt = b"".join(
        bytes.fromhex(entry["token"].removeprefix("bytes:\\x"))
        if entry["token"].startswith("bytes:")
        else entry["token"].encode()
        for entry in trace
    )
    return spelt.decode()


def test_a_whole_reply_has_an_entry_for_every_token_of_its_text() -> None:
    answer = post(steering=TRACE).json()
    own = answer["choices"][0]["steering"]
    trace = own["trace"]
    assert [set(entry) for entry in trace] == [{"token", "offset", *SCORES}] * len(TEXT.encode())
    assert text_of(trace) == TEXT
    for entry in trace:
        if not entry["token"].startswith("bytes:"):
            assert TEXT[entry["offset"]] == entry["token"]
    assert [e["answer_probability"] for e in trace] == [i / 100 for i in range(len(trace))]
    assert own["outcome"] == answer["steering"]["outcome"] == "answer"


def test_the_chunks_of_a_stream_make_the_same_text_and_trace() -> None:
    whole = post(steering=TRACE).json()["choices"][0]
    chunks = streamed(steering=TRACE)
    assert "".join(c["delta"].get("content", "") for c in chunks) == whole["message"]["content"]
    told = [c["steering"]["trace"] for c in chunks if "content" in c["delta"] and "steering" in c]
    assert [entry for each in told for entry in each] == whole["steering"]["trace"]
    assert all(set(c["steering"]) == {"trace"} for c in chunks if "steering" in c)
    assert "steering" not in chunks[-1]


def test_nothing_is_traced_unless_asked() -> None:
    engine = FakeEngine()
    host = make_host(engine)
    for steering in (None, {"trace": False}, {"profile": "bold"}):
        assert "trace" not in post(host=host, steering=steering).text
        assert "trace" not in post(host=host, steering=steering, stream=True, n=2).text
    assert not any(request.trace for request in engine.requests)


def test_tokens_that_a_stop_string_cuts_off_are_not_in_the_trace() -> None:
    for changes in ({"steering": TRACE, "stop": "rld"}, {"steering": TRACE, "stop": ["ö", "xx"]}):
        whole = post(**changes).json()["choices"][0]
        assert text_of(whole["steering"]["trace"]) == whole["message"]["content"]
        told = [c.get("steering", {}).get("trace", []) for c in streamed(**changes)]
        assert [entry for each in told for entry in each] == whole["steering"]["trace"]


def test_every_choice_has_its_own_trace() -> None:
    asked = {"steering": TRACE, "n": 2, "seed": 1, "max_tokens": 5, "temperature": 2.0}
    host = monitored()
    choices = post(host=host, **asked).json()["choices"]
    assert [set(c["steering"]) for c in choices] == [{*SCORES[:2], "refusal_score", "outcome",
                                                      "trace"}] * 2  # fmt: skip
    first, second = (choice["steering"]["trace"] for choice in choices)
    # Each is read in its own row; only the first entry, at the prompt, is both's.
    assert [e["benign_probability"] for e in first[1:]] != [
        e["benign_probability"] for e in second[1:]
    ]
    chunks = streamed(host=monitored(), **asked)
    for index, expected in enumerate((first, second)):
        own = [c for c in chunks if c["index"] == index and "content" in c["delta"]]
        told = [entry for c in own for entry in c.get("steering", {}).get("trace", ())]
        for name in SCORES:
            values = [entry[name] for entry in expected]
            assert [entry[name] for entry in told] == pytest.approx(values, abs=1e-4)


def test_plain_completions_are_traced_too_without_probes() -> None:
    asked = {"model": "tiny:bold", "prompt": "Hi", "steering": TRACE, "max_tokens": 4}
    path, greedy = "/v1/completions", {"temperature": 0}
    whole = post({**asked, **greedy}, host=monitored(), path=path).json()["choices"][0]
    trace = whole["steering"]["trace"]
    assert trace and {entry["answer_probability"] for entry in trace} == {None}
    assert {entry["benign_probability"] for entry in trace} == {None}
    assert all(entry["edit_norm"] > 0 for entry in trace)
    response = post({**asked, **greedy, "stream": True}, host=monitored(), path=path)
    *chunks, _ = events(response)
    told = [c["choices"][0].get("steering", {}).get("trace", []) for c in chunks]
    assert [e["token"] for each in told for e in each] == [e["token"] for e in trace]


def test_probes_are_null_where_the_receipts_are() -> None:
    system = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    for host, changes in (
        (monitored(), {"messages": system}),
        (replace(monitored(), monitor_read="off"), {}),
    ):
        answer = post(host=host, steering=TRACE, max_tokens=3, **changes).json()
        assert answer["steering"]["benign_probability"] is None
        for entry in answer["choices"][0]["steering"]["trace"]:
            assert entry["answer_probability"] is entry["benign_probability"] is None
            assert entry["edit_norm"] == 0


def test_the_tokens_of_tool_calls_are_traced_as_they_are_told_with_logprobs() -> None:
    asked: dict[str, Any] = {"tools": [WEATHER], "steering": TRACE, "logprobs": True}
    choice = post(host=host_with(reply=TWO), **asked).json()["choices"][0]
    told = [entry["token"] for entry in choice["logprobs"]["content"]]
    assert [entry["token"] for entry in choice["steering"]["trace"]] == told
    chunks = streamed(host_with(reply=TWO), **asked)
    each = [c["steering"]["trace"] for c in chunks if "content" in c["delta"] and "steering" in c]
    assert [entry["token"] for trace in each for entry in trace] == told


def test_a_score_has_no_tokens_to_trace() -> None:
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "steering": TRACE}
    response = post(asked, path="/v1/steering/score")
    assert response.status_code == 400
    assert error_of(response)["param"] == "steering.trace"
