"""Over a real socket: streaming as it happens, and clients that go away."""

from __future__ import annotations

import time
from typing import Any

import httpx2
import openai
import pytest

from server.engine.local import LocalEngine
from tests.conftest import make_model
from tests.server.fakes import FakeEngine, body, make_host, make_profile
from tests.server.live import live_server, wait_until


def cancelled(address: str, profile: str = "raw") -> float:
    wanted = f'steering_requests_total{{finish_reason="cancelled",profile="{profile}"}} '
    lines = httpx2.get(f"{address}/metrics").text.splitlines()
    return next(float(line.removeprefix(wanted)) for line in lines if line.startswith(wanted))


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_cancels_its_request(stream: bool) -> None:
    engine = FakeEngine("x" * 150, delay=0.05)
    with live_server(make_host(engine)) as address:
        with (
            pytest.raises(httpx2.TimeoutException),
            httpx2.stream(
                "POST",
                f"{address}/v1/chat/completions",
                json=body(stream=stream, max_tokens=100),
                timeout=0.5,
            ) as response,
        ):
            for _ in response.iter_lines():
                raise httpx2.TimeoutException("enough")
        wait_until(lambda: len(engine.cancelled) == 1)
        wait_until(lambda: cancelled(address) == 1)


def test_a_client_that_goes_away_while_it_waits_for_its_first_token_cancels_too() -> None:
    engine = FakeEngine(delay=60)
    with live_server(make_host(engine)) as address:
        for stream in (False, True):
            with (
                pytest.raises(httpx2.TimeoutException),
                httpx2.stream(
                    "POST",
                    f"{address}/v1/chat/completions",
                    json=body(stream=stream),
                    timeout=0.3,
                ) as response,
            ):
                for _ in response.iter_lines():
                    pass
        wait_until(lambda: len(engine.cancelled) == 2)
        wait_until(lambda: cancelled(address) == 2)


def test_tokens_arrive_while_the_reply_is_computed() -> None:
    with live_server(make_host(FakeEngine("abcdefgh", delay=0.05))) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        stream = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "Hi"}], stream=True
        )
        times = [time.monotonic() for _ in stream]
    assert times[-1] - times[0] > 0.2


def test_the_real_engine_answers_under_every_profile() -> None:
    lm = make_model("llama")
    engine = LocalEngine(lm, max_num_seqs=4, max_model_len=200)
    host = make_host(engine, profiles=[make_profile("bold", strength=4.0), make_profile("idle")])
    with live_server(host) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)

        def ask(model: str, **extra: object) -> str:
            completion = client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": "Hi"}],
                temperature=0,
                max_tokens=12,
                extra_body=extra,
            )
            return completion.choices[0].message.content or ""

        raw = ask("tiny")
        assert ask("tiny:bold") != raw
        assert ask("tiny:bold", steering={"strength": 0}) == raw
        assert ask("tiny:raw") == raw
        pieces = client.chat.completions.create(
            model="tiny:bold",
            messages=[{"role": "user", "content": "Hi"}],
            temperature=0,
            max_tokens=12,
            stream=True,
        )
        streamed = "".join(p.choices[0].delta.content or "" for p in pieces if p.choices)
        assert streamed == ask("tiny:bold")
        assert httpx2.get(f"{address}/ready").status_code == 200
    assert not engine.healthy()


def test_usage_and_metrics_tell_what_the_prefix_cache_saved() -> None:
    engine = LocalEngine(make_model("llama"), max_model_len=250, prefix_cache_mib=4)
    with live_server(make_host(engine)) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)

        def ask(question: str, model: str) -> openai.types.CompletionUsage:
            # A token a character, and one more for each role.
            system = {"role": "system", "content": "s" * 100}
            messages: Any = [system, {"role": "user", "content": question}]
            *_, last = client.chat.completions.create(
                model=model,
                messages=messages,
                max_tokens=2,
                stream=True,
                stream_options={"include_usage": True},
            )
            assert last.usage is not None
            return last.usage

        def hits() -> list[str]:
            lines = httpx2.get(f"{address}/metrics").text.splitlines()
            return [line for line in lines if line.startswith("steering_cache_hits_total")]

        for model in ("tiny", "tiny:bold"):
            saved = [ask(question, model).prompt_tokens_details for question in "abc"]
            assert [s and s.cached_tokens for s in saved] == [0, 96, 96]
        assert hits() == [
            'steering_cache_hits_total{profile="raw"} 2.0',
            'steering_cache_hits_total{profile="bold"} 2.0',
            'steering_cache_hits_total{profile="shy"} 0.0',
            'steering_cache_hits_total{profile="composed"} 0.0',
        ]


def test_a_disconnect_frees_the_real_engines_slot() -> None:
    engine = LocalEngine(make_model("llama"), max_num_seqs=1, max_model_len=250)
    with live_server(make_host(engine)) as address:
        with httpx2.stream(
            "POST",
            f"{address}/v1/chat/completions",
            json=body(stream=True, max_tokens=200, temperature=2.0),
        ) as response:
            next(response.iter_lines())
        wait_until(lambda: engine.stats().slots_used == 0)


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/v1/chat/completions", body(stream=True)),
        ("/v1/steering/compare", {"messages": body()["messages"], "arms": [{"profile": "raw"}]}),
    ],
)
def test_a_stream_that_is_silent_for_long_is_kept_alive_by_comments(
    path: str, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.sse.SILENCE_SECONDS", 0.1)
    with live_server(make_host(FakeEngine("abc", delay=0.4))) as address:
        text = httpx2.post(f"{address}{path}", json=asked, timeout=20).text
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        chunks = client.chat.completions.create(
            model="tiny", messages=body()["messages"], stream=True
        )
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == "abc"
    blocks = text.split("\n\n")
    assert blocks.count(": keep-alive") >= 3 and blocks[-2:] == ["data: [DONE]", ""]
    assert all(block.startswith(("data: ", ": keep-alive")) for block in blocks[:-1])
