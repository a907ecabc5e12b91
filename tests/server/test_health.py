"""What orchestrators and people look at first: probes, request ids, the API's page."""

from __future__ import annotations

import asyncio
import logging
import re

import httpx2
import pytest

from server.engine.local import LocalEngine
from server.engine.scheduler import Scheduler
from tests.conftest import make_model
from tests.server.fakes import FakeEngine, body, error_of, get, http_client, make_host, post
from tests.server.live import live_server, wait_until


def test_when_the_engines_thread_dies_health_says_so_and_nobody_waits_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = LocalEngine(make_model("llama"), max_num_seqs=1, max_model_len=200)
    steps = 0

    def step(scheduler: Scheduler) -> None:
        nonlocal steps
        steps += 1
        if steps == 5:
            raise SystemExit("the device is gone")
        run(scheduler)

    run = Scheduler.step
    monkeypatch.setattr(Scheduler, "step", step)
    with live_server(make_host(engine)) as address:
        assert httpx2.get(f"{address}/health").json()["status"] == "ok"
        assert httpx2.get(f"{address}/ready").json() == {"status": "ready"}

        async def ask() -> list[httpx2.Response]:
            async with httpx2.AsyncClient(base_url=address, timeout=60) as client:
                # One has begun its answer, the others wait for its slot.
                asked = body(temperature=2, max_tokens=100)
                bodies = [asked | {"stream": stream} for stream in (True, False, True, False)]
                return await asyncio.gather(
                    *[client.post("/v1/chat/completions", json=b) for b in bodies]
                )

        for response in asyncio.run(ask()):
            assert response.status_code in (200, 503)
            assert "engine_stopped" in response.text
        wait_until(lambda: httpx2.get(f"{address}/health").status_code == 503, 20)
        for path in ("/health", "/ready"):
            broken = httpx2.get(f"{address}{path}")
            assert broken.status_code == 503 and error_of(broken)["code"] == "engine_stopped"
        late = httpx2.post(f"{address}/v1/chat/completions", json=body())
        assert late.status_code == 503 and error_of(late)["code"] == "engine_stopped"
        assert httpx2.get(f"{address}/metrics").status_code == 200


def test_a_server_that_is_about_to_stop_is_alive_but_not_ready() -> None:
    host = make_host()

    async def run() -> tuple[int, int]:
        async with http_client(host) as client:
            host.draining = True
            health, ready = await client.get("/health"), await client.get("/ready")
            return health.status_code, ready.status_code

    assert asyncio.run(run()) == (200, 503)


def test_a_request_has_an_id_in_its_answer_its_error_and_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    given = {"X-Request-Id": "trace/42:a"}
    for response in (post(headers=given), post(headers=given, temperature=9)):
        assert response.headers["X-Request-Id"] == "trace/42:a"
    for odd in ("", "a b", "x" * 129, "<script>"):
        made = post(headers={"X-Request-Id": odd})
        assert re.fullmatch("req-[0-9a-f]{32}", made.headers["X-Request-Id"])

    class BrokenEngine(FakeEngine):
        def check(self, request: object) -> None:
            raise ZeroDivisionError

    with caplog.at_level(logging.ERROR):
        broken = post(host=make_host(BrokenEngine()), headers=given)
    assert broken.status_code == 500 and error_of(broken)["code"] == "internal_error"
    assert broken.headers["X-Request-Id"] == "trace/42:a"
    assert "trace/42:a" in caplog.text


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
def test_the_page_of_the_api_loads_and_may_run_its_scripts(path: str) -> None:
    page = get(path)
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    assert "/openapi.json" in page.text
    policy = page.headers["content-security-policy"]
    allowed = {d.split()[0]: d.split()[1:] for d in policy.split(";") if d.strip()}
    for tag, kind in (("script", "script-src"), ("link", "style-src")):
        for url in re.findall(rf"<{tag}[^>]*(?:src|href)=\"(https?://[^\"/]+)", page.text):
            assert url in allowed[kind] + allowed["font-src"] + allowed["img-src"], url
