"""A server with keys: who gets in, what exists for them, what they may use up, what is noted."""

from __future__ import annotations

import asyncio
import json
import logging
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from server.access import Access, scopes_needed
from server.app import create_app
from server.audit import AuditLog
from server.auth import Key, hash_secret
from server.engine.base import QueueFullError, StepFailedError
from server.hosting import Host, Limits
from server.logs import JsonFormatter, TextFormatter, current_key, current_request
from server.settings import SettingsError, load_settings
from tests.server.fakes import FakeEngine, body, error_of, get, http_client, make_host, make_profile
from tests.server.live import live_server, wait_until

RED = "unbound"
KEYS: dict[str, dict[str, Any]] = {
    "user": {},
    "red": {"profiles": ["*", RED]},
    "only": {"profiles": ["shy"]},
    "admin": {"scopes": ["admin"]},
    "scraper": {"scopes": ["metrics"]},
    "red-scraper": {"scopes": ["metrics"], "profiles": [RED]},
    "late": {"expires": "2020-01-01T00:00:00Z"},
    "slow": {"requests_per_minute": 2},
    "short": {"tokens_per_minute": 100},
}


def inline(keys: dict[str, dict[str, Any]] = KEYS) -> str:
    return json.dumps(
        [{"id": id, "sha256": hash_secret(f"ph-{id}"), **fields} for id, fields in keys.items()]
    )


def guarded(
    engine: Any = None, *, red: bool = True, audit: Path | None = None, **access: Any
) -> Host:
    """A host with `KEYS` and, with `red`, a red-team profile and another."""
    profiles = [make_profile("bold"), make_profile("shy")]
    if red:
        profiles += [
            make_profile(RED, red_team=True, strength=1.5),
            make_profile("unbound-2", red_team=True, strength=3.0),
        ]
    host = make_host(engine, profiles=profiles)
    host.access = Access(inline(), audit=AuditLog(audit), **access)
    return host


def as_key(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer ph-{name}"}


def ask(host: Host, *requests: tuple[str, str, str | None, Any]) -> list[httpx2.Response]:
    """Send (method, path, key, JSON) to a host, one after the other."""

    async def run() -> list[httpx2.Response]:
        async with http_client(host) as client:
            return [
                await client.request(method, path, json=data, headers=as_key(key) if key else {})
                for method, path, key, data in requests
            ]

    return asyncio.run(run())


def chat(host: Host, key: str | None, **changes: Any) -> httpx2.Response:
    return ask(host, ("POST", "/v1/chat/completions", key, body(**changes)))[0]


def test_without_a_key_that_is_valid_nothing_is_done() -> None:
    engine = FakeEngine()
    host = guarded(engine)
    for key in (None, "", "none", "late", "user ph-user"):
        for method, path in (
            ("POST", "/v1/chat/completions"),
            ("GET", "/v1/models"),
            ("GET", "/v1/steering/profiles"),
            ("DELETE", "/v1/steering/profiles/bold"),
            ("GET", "/v1/nothing"),
            ("POST", "/health/"),
            ("GET", "http://test//health"),
        ):
            (response,) = ask(host, (method, path, key, body()))
            assert response.status_code == 401, (key, path)
            assert error_of(response)["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"].startswith("Bearer")
            assert response.headers["x-request-id"]
    assert not engine.requests


def test_probes_and_documentation_are_open() -> None:
    for path in ("/health", "/ready", "/version", "/openapi.json", "/docs"):
        for headers in ({}, as_key("none")):
            assert get(path, guarded(), **headers).status_code == 200, path


def test_no_endpoint_is_open_that_was_not_meant_to_be() -> None:
    document = create_app(make_host()).openapi()
    is_open = {
        path
        for path, operations in document["paths"].items()
        for method in operations
        if not scopes_needed(method.upper(), path, protect_metrics=True)
    }
    assert is_open == {"/health", "/ready", "/version"}


@pytest.mark.parametrize(
    ("key", "method", "path", "status"),
    [
        ("user", "POST", "/v1/chat/completions", 200),
        ("user", "GET", "/v1/models", 200),
        ("admin", "GET", "/v1/models", 200),
        ("admin", "POST", "/v1/chat/completions", 403),
        ("scraper", "POST", "/v1/chat/completions", 403),
        ("scraper", "GET", "/v1/models", 403),
        ("user", "DELETE", "/v1/steering/profiles/bold", 403),
        ("user", "POST", "/v1/steering/profiles", 403),
        ("scraper", "GET", "/health", 200),
    ],
)
def test_a_key_does_what_its_scopes_allow(key: str, method: str, path: str, status: int) -> None:
    (response,) = ask(guarded(), (method, path, key, body()))
    assert response.status_code == status
    if status == 403:
        assert error_of(response)["code"] == "insufficient_scope"
        assert "insufficient_scope" in response.headers["www-authenticate"]


def test_the_engine_is_told_who_asks() -> None:
    engine = FakeEngine()
    assert chat(guarded(engine), "user").status_code == 200
    assert chat(make_host(engine), None).status_code == 200
    assert [request.client for request in engine.requests] == ["user", ""]


# Red team


def without_names(response: httpx2.Response, *names: str) -> Any:
    """A response but for what every response has of its own, and for the names asked for."""
    text = response.text
    for name in names:
        text = text.replace(name, "NAME")
    return response.status_code, text, set(response.headers) - {"x-request-id"}


def probes(name: str) -> list[tuple[str, str, str | None, Any]]:
    """Every way to ask for a profile."""
    messages = body()["messages"]
    return [
        ("POST", "/v1/chat/completions", "user", {"model": f"tiny:{name}", "messages": messages}),
        ("POST", "/v1/chat/completions", "user", body(steering={"profile": name})),
        (
            "POST",
            "/v1/chat/completions",
            "user",
            body(model="tiny:bold", steering={"profile": name, "strength": 0}),
        ),
        (
            "POST",
            "/v1/chat/completions",
            "user",
            body(model=f"tiny:{name}", steering={"profile": "bold"}, stream=True),
        ),
        ("GET", f"/v1/models/tiny:{name}", "user", None),
        ("GET", f"/v1/steering/profiles/{name}", "user", None),
    ]


def test_a_red_team_profile_is_to_others_as_one_that_does_not_exist() -> None:
    engine = FakeEngine()
    hidden = ask(guarded(engine), *probes(RED))
    unknown = ask(guarded(engine), *probes("unreal7"))
    absent = ask(guarded(engine, red=False), *probes(RED))
    for a, b, c in zip(hidden, unknown, absent, strict=True):
        assert a.status_code == 404
        assert without_names(a, RED) == without_names(b, "unreal7") == without_names(c, RED)
    assert not engine.requests


@pytest.mark.parametrize("key", ["user", "admin", "only"])
@pytest.mark.parametrize("path", ["/v1/models", "/v1/steering/profiles", "/v1/models/none"])
def test_no_list_and_no_error_names_it(key: str, path: str) -> None:
    response = get(path, guarded(), **as_key(key))
    assert RED not in response.text and "shy" in response.text
    assert ("bold" in response.text) is (key != "only")


def test_keys_that_name_it_see_and_use_it() -> None:
    host = guarded()
    answers = ask(
        host,
        ("GET", "/v1/models", "red", None),
        ("GET", f"/v1/steering/profiles/{RED}", "red", None),
        ("POST", "/v1/chat/completions", "red", body(model=f"tiny:{RED}")),
        ("POST", "/v1/chat/completions", "red", body(model="tiny:unbound-2")),
    )
    assert [answer.status_code for answer in answers] == [200, 200, 200, 404]
    assert RED in answers[0].text and "unbound-2" not in answers[0].text
    assert answers[2].json()["steering"]["profile"] == RED


def test_a_key_without_the_default_profile_must_name_one() -> None:
    host = guarded()
    missing = chat(host, "only")
    assert missing.status_code == 404
    assert error_of(missing)["message"] == "There is no model 'tiny'. There is tiny:shy."
    assert chat(host, "only", model="tiny:shy").status_code == 200
    assert chat(host, "only", model="tiny:raw").status_code == 404
    listed = get("/v1/models", host, **as_key("only")).json()["data"]
    assert [model["id"] for model in listed] == ["tiny:shy"]


def test_a_folded_red_team_profile_leaves_others_nothing_and_tells_them_nothing() -> None:
    host = make_host(profiles=[make_profile(RED, red_team=True), make_profile("bold")], folded=RED)
    host.access = Access(inline())
    for model in ("tiny", "tiny:bold", f"tiny:{RED}", "tiny:raw"):
        response = chat(host, "user", model=model)
        assert response.status_code == 404
        assert RED not in response.text.replace(model.partition(":")[2] or model, "")
    assert get("/v1/models", host, **as_key("user")).json()["data"] == []
    assert chat(host, "red").json()["steering"]["profile"] == RED


def samples(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.mark.parametrize("accept", ["text/plain", "application/openmetrics-text; version=1.0.0"])
def test_metrics_sum_red_team_profiles_as_restricted_for_all_but_scrapers_that_name_them(
    accept: str,
) -> None:
    host = guarded()
    host.access = Access(inline({**KEYS, "both": {"profiles": [RED, "unbound-2"]}}))

    async def run() -> dict[str | None, str]:
        async with http_client(host) as client:
            used = ((RED, "both"), (RED, "both"), ("unbound-2", "both"), ("bold", "user"))
            for name, key in used:
                await client.post(
                    "/v1/chat/completions", json=body(model=f"tiny:{name}"), headers=as_key(key)
                )
            return {
                key: (
                    await client.get(
                        "/metrics", headers={"Accept": accept, **(as_key(key) if key else {})}
                    )
                ).text
                for key in (None, "user", "red", "scraper", "red-scraper")
            }

    pages = asyncio.run(run())
    for key in (None, "user", "red", "scraper"):
        page = pages[key]
        assert RED not in page and host.profiles.resolve(RED).fingerprint[:12] not in page
        if accept != "text/plain":
            continue
        found = samples(page)

        def value(name: str, found: Any = found, **labels: str) -> float:
            return float(found[f"steering_{name}", frozenset(labels.items())])

        assert value("requests_total", profile="restricted", finish_reason="stop") == 3
        assert value("requests_total", profile="bold", finish_reason="stop") == 1
        assert value("refusal_score_count", profile="restricted") == 3
        assert value("refusal_score_bucket", profile="restricted", le="-2.0") == 3
        assert value("edit_norm_ratio_sum", profile="restricted") == pytest.approx(0.06)
    page = pages["red-scraper"]
    assert f'profile="{RED}"' in page
    assert "unbound-2" not in page and 'profile="restricted"' in page  # it names one of two


def test_metrics_of_a_server_without_keys_are_whole() -> None:
    host = make_host(profiles=[make_profile(RED, red_team=True)])
    assert f'profile="{RED}"' in get("/metrics", host).text


def test_metrics_need_a_key_where_they_are_protected_and_never_take_a_wrong_one() -> None:
    for protected, key, status in (
        (False, None, 200),
        (False, "user", 200),
        (False, "none", 401),
        (False, "late", 401),
        (True, None, 401),
        (True, "user", 403),
        (True, "scraper", 200),
    ):
        headers = as_key(key) if key else {}
        response = get("/metrics", guarded(protect_metrics=protected), **headers)
        assert response.status_code == status, (protected, key)


# Limits


def test_requests_beyond_a_keys_minute_wait_their_turn() -> None:
    engine = FakeEngine()
    first, second, third, listed = ask(
        guarded(engine),
        *[("POST", "/v1/chat/completions", "slow", body())] * 2,
        ("POST", "/v1/chat/completions", "slow", b"not read".decode()),
        ("GET", "/v1/models", "slow", None),
    )
    assert (first.status_code, second.status_code, third.status_code) == (200, 200, 429)
    assert first.headers["x-ratelimit-limit-requests"] == "2"
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    assert first.headers["x-ratelimit-reset-requests"].endswith("s")
    assert "x-ratelimit-limit-tokens" not in first.headers
    assert error_of(third)["code"] == "rate_limit_exceeded"
    assert 0 < int(third.headers["retry-after"]) <= 30
    assert third.headers["x-ratelimit-remaining-requests"] == "0"
    assert listed.status_code == 200  # looking is free
    assert len(engine.requests) == 2


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_are_set_aside_and_what_was_not_used_comes_back(stream: bool) -> None:
    engine = FakeEngine("four")  # and the end: five tokens
    host = guarded(engine)
    first, second, third = ask(
        host,
        ("POST", "/v1/chat/completions", "short", body(max_tokens=80, stream=stream)),
        ("POST", "/v1/chat/completions", "short", body(max_tokens=80, stream=stream)),
        ("POST", "/v1/chat/completions", "short", body(max_tokens=80, stream=stream)),
    )
    prompt = len(engine.requests[0].prompt_ids)
    assert first.headers["x-ratelimit-limit-tokens"] == "100"
    # A stream's headers come before the reply, when what it may need is set aside.
    left = 100 - prompt - (80 if stream else 5)
    assert int(first.headers["x-ratelimit-remaining-tokens"]) in (left, left + 1)
    assert second.status_code == 200  # only 5 tokens and the prompt were used
    assert third.status_code == 429
    assert error_of(third)["code"] == "rate_limit_exceeded"
    assert int(third.headers["retry-after"]) >= 1


@pytest.mark.parametrize("error", [QueueFullError("full"), StepFailedError("broken")])
def test_a_request_that_fails_costs_no_tokens(error: Exception) -> None:
    engine = FakeEngine(error=error, fail_after=None)  # type: ignore[arg-type]
    host = guarded(engine)
    for _ in range(5):
        response = chat(host, "short", max_tokens=80)
        assert response.status_code in (429, 500)
        assert error_of(response)["code"] in ("queue_full", "internal_error")


@pytest.mark.parametrize("stream", [False, True])
def test_a_cancelled_request_pays_for_what_it_got(stream: bool, tmp_path: Path) -> None:
    engine = FakeEngine("x" * 150, delay=0.02)
    host = guarded(engine, audit=tmp_path / "audit.jsonl")
    host.access = Access(inline({"user": {"tokens_per_minute": 1000}}), audit=host.access.audit)
    with live_server(host) as address:
        with (
            pytest.raises(httpx2.TimeoutException),
            httpx2.stream(
                "POST",
                f"{address}/v1/chat/completions",
                json=body(stream=stream, max_tokens=150),
                headers=as_key("user"),
                timeout=0.6,
            ) as response,
        ):
            for _ in response.iter_lines():
                raise httpx2.TimeoutException("enough")
        wait_until(lambda: len(engine.cancelled) == 1)
        again = httpx2.post(
            f"{address}/v1/chat/completions",
            json=body(max_tokens=1),
            headers=as_key("user"),
        )
    left = int(again.headers["x-ratelimit-remaining-tokens"])
    prompt = len(engine.requests[0].prompt_ids)
    assert 1000 - 2 * prompt - 150 < left < 1000 - prompt
    (first, _) = noted(tmp_path / "audit.jsonl")
    assert first["outcome"] == first["finish_reason"] == "cancelled"
    assert 0 <= first["completion_tokens"] < 150


@pytest.mark.parametrize(
    ("limits", "changes", "param", "says"),
    [
        (Limits(messages=2), {"messages": body()["messages"] * 3}, "messages", "--max-messages"),
        (Limits(prompt_characters=1), {}, "messages", "--max-prompt-chars"),
        (Limits(), {"messages": body()["messages"] * 1025}, "messages", "--max-messages"),
        (Limits(), {"messages": body()["messages"] * 10_001}, "messages", "at most 10000"),
    ],
)
def test_prompts_beyond_the_limits_are_refused_before_they_are_rendered(
    limits: Limits, changes: dict[str, Any], param: str, says: str
) -> None:
    host = replace(make_host(), limits=limits)

    def reject(messages: Any) -> list[int]:
        raise AssertionError("rendered")

    object.__setattr__(host.lm, "encode_chat", reject)
    try:
        response = chat(host, None, **changes)
    finally:
        object.__delattr__(host.lm, "encode_chat")
    assert response.status_code == 400
    assert error_of(response)["param"] == param and says in error_of(response)["message"]


@pytest.mark.parametrize("depth", [10, 500, 950, 990, 5000, 100_000])
def test_json_nested_deeply_is_a_400_or_harmless(depth: int) -> None:
    sound = json.dumps(body())[:-1]
    for key in ("x", "steering", "metadata", "response_format", "messages"):
        for left, right in (("[", "]"), ('{"a":', "}")):
            raw = f'{sound}, "{key}": {left * depth}1{right * depth}}}'

            async def send(raw: str = raw) -> int:
                async with http_client(make_host()) as client:
                    return (await client.post("/v1/chat/completions", content=raw)).status_code

            assert asyncio.run(send()) in ((200, 400) if key == "x" else (400,))


@pytest.mark.parametrize(
    "changes",
    [
        {"messages": [1] * 300_000},
        {"messages": [{"role": "user", "content": [{}] * 300_000}]},
        {"steering": {str(i): 1 for i in range(20_000)}},
        {"metadata": {str(i): 1 for i in range(20_000)}},
        # No mistake, and yet nothing that anybody means.
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 30_000}]},
        {"messages": [{"role": "user", "content": "a", **{f"x{i}": 1 for i in range(30_000)}}]},
        {f"x{i}": 1 for i in range(30_000)},
    ],
)
def test_a_body_of_very_many_parts_or_mistakes_is_refused_without_listing_them(
    changes: dict[str, Any],
) -> None:
    response = chat(make_host(), None, **changes)
    assert response.status_code == 400 and len(response.text) < 1000


# Audit


def noted(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_request_for_an_answer_is_one_line_without_text(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    ask(
        guarded(audit=path),
        ("POST", "/v1/chat/completions", "red", body(model=f"tiny:{RED}")),
        ("POST", "/v1/chat/completions", "user", body(stream=True, max_tokens=3)),
        ("POST", "/v1/chat/completions", "user", body(model=f"tiny:{RED}")),
        ("POST", "/v1/chat/completions", None, body()),
        ("DELETE", "/v1/steering/profiles/bold", "user", None),
        ("GET", "/v1/models", "user", None),
    )
    red, streamed, denied, nobody, scope = noted(path)
    assert red["key"] == "red" and red["profile"] == RED and red["red_team"] is True
    assert red["fingerprint"] == make_profile(RED, strength=1.5).fingerprint
    assert (red["outcome"], red["finish_reason"], red["experiment"]) == ("answer", "stop", None)
    assert red["prompt_tokens"] > 0 and red["request_id"] and red["id"].startswith("chatcmpl-")
    assert datetime.fromisoformat(red["time"]).astimezone(UTC)
    assert (streamed["finish_reason"], streamed["completion_tokens"]) == ("length", 3)
    assert denied["outcome"] == "rejected" and denied["status"] == 404
    assert denied["asked"] == {"model": f"tiny:{RED}"} and denied["key"] == "user"
    assert (nobody["key"], nobody["status"]) == (None, 401)
    assert (scope["status"], scope["path"]) == (403, "/v1/steering/profiles/bold")
    assert "Hello" not in path.read_text() and "messages" not in path.read_text()


def test_text_is_noted_where_that_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    host = make_host()
    host.access = Access(audit=AuditLog(path, with_text=True))
    chat(host, None)
    (record,) = noted(path)
    assert record["messages"] == [{"role": "user", "content": "Hi"}]
    assert record["reply"] == FakeEngine().reply and record["key"] is None


def test_a_red_team_use_is_logged_even_without_an_audit_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        chat(guarded(), "red", model=f"tiny:{RED}")
    assert any(f'"{RED}"' in record.getMessage() for record in caplog.records)


def test_an_audit_log_that_fails_fails_no_answer_and_is_a_metric(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    host = guarded()
    folder = tmp_path / "logs"
    folder.mkdir()
    host.access = Access(inline(), audit=AuditLog(folder / "audit.jsonl"))
    (folder / "audit.jsonl").unlink()
    folder.rmdir()

    async def run() -> str:
        async with http_client(host) as client:
            for _ in range(3):
                response = await client.post(
                    "/v1/chat/completions", json=body(), headers=as_key("user")
                )
                assert response.status_code == 200
            assert host.access.audit.flush()
            return (await client.get("/metrics")).text

    assert "steering_audit_records_lost_total 3.0" in asyncio.run(run())
    assert any("lines are lost" in record.getMessage() for record in caplog.records)


# Browsers


def test_every_response_has_the_headers_that_keep_browsers_safe() -> None:
    host = guarded()
    for method, path, key in (
        ("GET", "/health", None),
        ("POST", "/v1/chat/completions", "user"),
        ("POST", "/v1/chat/completions", None),
        ("GET", "/v1/nothing", "user"),
        ("GET", "/docs", None),
        ("GET", "/metrics", None),
    ):
        (response,) = ask(host, (method, path, key, body()))
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["x-frame-options"] == "DENY"
        assert response.headers["referrer-policy"] == "no-referrer"
        assert response.headers["cache-control"] == "no-store"
        assert "default-src 'none'" in response.headers["content-security-policy"]
        assert ("cdn.jsdelivr.net" in response.headers["content-security-policy"]) is (
            path == "/docs"
        )
        assert "access-control-allow-origin" not in response.headers
    assert chat(host, "user", stream=True).headers["cache-control"] == "no-cache"


def test_pages_of_other_origins_may_ask_only_where_they_are_named() -> None:
    host = replace(guarded(), cors_origins=("https://a.example",))

    async def run() -> None:
        async with http_client(host) as client:
            preflight = {
                "Access-Control-Request-Method": "POST",
                "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
            }
            for origin, allowed in (("https://a.example", True), ("https://b.example", False)):
                asked = await client.options(
                    "/v1/chat/completions", headers={"Origin": origin, **preflight}
                )
                assert (asked.status_code == 200) is allowed
                response = await client.post(
                    "/v1/chat/completions",
                    json=body(),
                    headers={"Origin": origin, **as_key("user")},
                )
                for answer in (asked, response):
                    told = answer.headers.get("access-control-allow-origin")
                    assert told == (origin if allowed else None)
            refused = await client.post(
                "/v1/chat/completions", json=body(), headers={"Origin": "https://a.example"}
            )
            assert refused.status_code == 401
            assert refused.headers["access-control-allow-origin"] == "https://a.example"
            assert "X-Request-Id" in refused.headers["access-control-expose-headers"]

    asyncio.run(run())


# Settings and logs


@pytest.mark.parametrize("origin", ["https://a.example/", "a.example", "HTTPS://A.example", "null"])
def test_an_origin_that_no_browser_sends_is_refused(origin: str) -> None:
    with pytest.raises(SettingsError, match="--cors-origin"):
        load_settings({"cors_origin": [origin]})


def test_keys_open_the_way_beyond_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings({"host": "0.0.0.0", "keys": "keys.json"}).keys == "keys.json"
    monkeypatch.setenv("PILOTHOUSE_KEYS", inline())
    monkeypatch.setenv("PILOTHOUSE_CORS_ORIGIN", "https://a.example http://localhost:3000")
    settings = load_settings({"host": "0.0.0.0"})
    assert settings.keys == inline()
    assert settings.cors_origin == ["https://a.example", "http://localhost:3000"]


def test_a_server_with_an_empty_list_of_keys_lets_nobody_in() -> None:
    host = make_host()
    host.access = Access("[]")
    assert chat(host, None).status_code == 401


@pytest.mark.parametrize("form", ["text", "json"])
def test_log_lines_say_which_request_and_whose(form: str) -> None:
    record = logging.LogRecord("x", logging.INFO, __file__, 1, "a\n%s", ("b",), None)
    tokens = current_request.set("req-1"), current_key.set("ci")
    try:
        line = (JsonFormatter() if form == "json" else TextFormatter()).format(record)
    finally:
        current_request.reset(tokens[0])
        current_key.reset(tokens[1])
    if form == "text":
        assert line.endswith("INFO a\nb [req-1 ci]")
    else:
        told = json.loads(line)
        assert "\n" not in line
        assert (told["message"], told["request_id"], told["key"]) == ("a\nb", "req-1", "ci")
        assert told["level"] == "INFO"


# Whatever is sent


@settings(max_examples=60)
@given(
    st.one_of(
        st.binary(max_size=60),
        st.binary(max_size=60).map(lambda tail: b"Bearer " + tail),
        st.sampled_from([b"Bearer ph-user\x00", b"Bearer ph-use", b"Bearer\tph-user", b"bearer"]),
    )
)
def test_no_authorization_header_breaks_the_server_or_opens_it(value: bytes) -> None:
    app = APP

    async def run() -> int:
        statuses: list[int] = []
        scope = {
            "type": "http", "method": "GET", "path": "/v1/models", "raw_path": b"/v1/models",
            "query_string": b"", "headers": [(b"authorization", value)], "http_version": "1.1",
            "scheme": "http", "server": ("test", 80), "client": ("test", 1), "root_path": "",
        }  # fmt: skip

        async def receive() -> Any:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        await app(scope, receive, send)
        return statuses[0]

    assert asyncio.run(run()) == 401


APP = create_app(guarded())


def test_a_key_is_what_the_file_says_it_is() -> None:
    access = Access(inline())
    assert access.keys is not None
    assert {key.id for key in access.keys} == set(KEYS)
    assert all(isinstance(key, Key) for key in access.keys)
