"""Experiments on the real engine: many users at once, with shadows in the same batches."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from datetime import UTC, datetime

import httpx2

from server.engine.local import LocalEngine
from server.experiments.assignment import assign, hashed
from server.hosting import Host
from tests.conftest import make_model
from tests.server.experiments.trials import answers, experiment, hosting
from tests.server.fakes import body, http_client, make_host, running_app

AA = [{"name": "control", "profile": "raw"}, {"name": "same", "profile": "raw"}]


def real_host(max_waiting: int = 64) -> Host:
    engine = LocalEngine(
        make_model("llama"), max_num_seqs=8, max_model_len=128, max_waiting=max_waiting
    )
    host = make_host(engine)
    for profile in host.profiles:
        engine.register(profile)
    return host


async def ask_all(host: Host, users: list[str]) -> list[httpx2.Response]:
    async with running_app(host) as app:
        transport = httpx2.ASGITransport(app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
            asked = [
                client.post(
                    "/v1/chat/completions",
                    json=body(model="tiny@trial", user=user, max_tokens=8, seed=i),
                )
                for i, user in enumerate(users)
            ]
            found = await asyncio.gather(*asked)
            await app.state.recorder.shadows.drained()
    return found


def test_shadows_of_the_same_profile_give_the_same_tokens() -> None:
    """Same prompt, sampling and seed: pairs differ by their arms alone."""
    trial = experiment(arms=AA, shadow=1.0)
    host = hosting(trial, host=real_host())
    host.keep_text = True
    users = [f"u{i}" for i in range(10)]
    responses = asyncio.run(ask_all(host, users))
    texts = {r.json()["id"]: r.json()["choices"][0]["message"]["content"] for r in responses}
    shadows = [r for r in answers(host) if r.kind == "shadow"]
    assert len(shadows) == 10
    assert {r.pair: r.reply for r in shadows} == texts
    assert len(set(texts.values())) > 1  # by chance none of this would show


def test_every_user_gets_the_arm_that_the_hash_says() -> None:
    trial = experiment(shadow=0.5)
    host = hosting(trial, host=real_host())
    users = [f"u{i % 6}" for i in range(24)]
    responses = asyncio.run(ask_all(host, users))
    for user, response in zip(users, responses, strict=True):
        arm = assign(trial, user)
        assert arm is not None
        receipt = response.json()["steering"]
        assert (receipt["arm"], receipt["profile"]) == (arm.name, arm.profile)
    seen = [r for r in answers(host) if r.kind == "exposure"]
    assert Counter(r.unit for r in seen) == Counter(hashed(trial, user) for user in users)
    arms_of: dict[str, set[str]] = {}
    for record in seen:
        arms_of.setdefault(record.unit, set()).add(record.arm)
    assert all(len(arms) == 1 for arms in arms_of.values())
    pairs = {r.id: r for r in seen}
    for shadow in (r for r in answers(host) if r.kind == "shadow"):
        mate = pairs[shadow.pair]
        assert shadow.arm != mate.arm and shadow.unit == mate.unit
        assert shadow.fingerprint != mate.fingerprint


def test_a_short_queue_drops_shadows_and_no_answer() -> None:
    host = hosting(experiment(shadow=1.0), host=real_host(max_waiting=8))
    responses = asyncio.run(ask_all(host, [f"u{i}" for i in range(16)]))
    served = [r for r in responses if r.status_code == 200]
    assert len([r for r in answers(host) if r.kind == "exposure"]) == len(served) >= 8
    assert json.dumps([r.to_json() for r in answers(host)])


def test_an_end_that_has_passed_lets_profiles_go() -> None:
    now = 1_000_000.0
    end = datetime.fromtimestamp(now + 60, UTC).isoformat()
    host = hosting(experiment(end=end), host=real_host(), clock=lambda: now)

    async def run() -> list[int]:
        nonlocal now
        async with http_client(host) as client:
            found = []
            for _ in range(2):
                removed = await client.delete("/v1/steering/profiles/bold")
                found.append(removed.status_code)
                now += 61
            return found

    assert asyncio.run(run()) == [409, 200]
