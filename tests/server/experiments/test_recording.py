"""What is kept of answers in experiments, their shadows, guard-rails and late judgements."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI

from server.audit import AuditLog
from server.engine.base import EngineRequest, QueueFullError, StepFailedError
from server.experiments import api
from server.experiments.assignment import hashed
from server.experiments.interfaces import JUDGED_LATER, MemoryRecords, with_judgements
from server.experiments.judging import JudgeCard
from server.experiments.reading import MOST_READERS
from server.experiments.recording import Recorder
from server.experiments.records import AnswerRecord, EventRecord
from server.experiments.shadow import CLIENT
from server.hosting import Host
from server.settings import Settings
from steering.judge import Outcome, PhraseJudge, version_of
from tests.server.experiments.trials import (
    ARMS,
    BrokenRecords,
    Tripwire,
    answers,
    events_of,
    experiment,
    hosting,
    unit_in,
)
from tests.server.fakes import FakeEngine, body, events, make_host, post, running_app

TRIAL = experiment()
TREATED = unit_in(TRIAL, "treated")
CONTROL = unit_in(TRIAL, "control")


@asynccontextmanager
async def serving(host: Host) -> AsyncIterator[tuple[httpx2.AsyncClient, Recorder, FastAPI]]:
    async with running_app(host) as app:
        transport = httpx2.ASGITransport(app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
            yield client, app.state.recorder, app


async def ask(client: httpx2.AsyncClient, user: str = TREATED, **changes: Any) -> httpx2.Response:
    payload = body(model="tiny@trial", user=user, **changes)
    return await client.post("/v1/chat/completions", json=payload)


def sample(app: FastAPI, name: str, **labels: str) -> float | None:
    value = app.state.metrics.registry.get_sample_value(name, labels)
    return None if value is None else float(value)


def test_a_record_holds_what_happened_and_no_text() -> None:
    host = hosting(TRIAL)
    response = post(
        body(model="tiny@trial", user=TREATED), host=host, headers={"X-Request-Id": "mine"}
    )
    [record] = answers(host)
    whole, receipt = response.json(), response.json()["steering"]
    assert record.id == record.pair == whole["id"]
    assert (record.kind, record.arm, record.request_id) == ("exposure", "treated", "mine")
    assert (record.profile, record.fingerprint) == ("bold", receipt["fingerprint"])
    assert (record.outcome, record.finish_reason) == ("answer", "stop")
    assert record.unit == hashed(TRIAL, TREATED) and record.sticky
    assert TREATED not in json.dumps(record.to_json())
    assert record.prompt is None and record.reply is None
    assert record.benign_probability == receipt["benign_probability"] == 0.8
    assert record.prompt_tokens == whole["usage"]["prompt_tokens"]
    assert record.completion_tokens == whole["usage"]["completion_tokens"]
    assert record.ttft_seconds is not None
    assert 0 <= record.ttft_seconds <= record.duration_seconds
    assert (record.model, record.weights) == ("tiny", host.lm.fingerprint.weights)
    assert AnswerRecord.from_json(json.loads(json.dumps(record.to_json()))) == record


def test_text_is_kept_where_the_operator_wants_it() -> None:
    host = hosting(TRIAL)
    host.keep_text = True
    post(body(model="tiny@trial", user=TREATED), host=host)
    [record] = answers(host)
    assert (record.prompt, record.reply) == ("Hi", "Hello, wörld! 🙂")


def test_every_choice_has_a_record_of_its_own() -> None:
    host = hosting(TRIAL)
    whole = post(body(model="tiny@trial", user=TREATED, n=3), host=host).json()
    assert {r.id for r in answers(host)} == {f"{whole['id']}-{i}" for i in range(3)}


def test_a_request_without_a_unit_is_its_own_and_not_sticky() -> None:
    host = hosting(TRIAL)
    for _ in range(2):
        post(body(model="tiny@trial"), host=host, headers={"X-Request-Id": "same"})
    first, second = answers(host)
    assert not first.sticky and first.unit != second.unit


def test_the_record_is_there_before_the_end_is_told() -> None:
    class Checking(MemoryRecords):
        def append(self, record: AnswerRecord | EventRecord, /) -> None:
            order.append("record")
            super().append(record)

    order: list[str] = []
    host = hosting(TRIAL)
    host.records = Checking()

    async def run() -> None:
        async with serving(host) as (_, _, app):
            order.clear()
            scope = {
                "type": "http", "method": "POST", "path": "/v1/chat/completions",
                "raw_path": b"", "query_string": b"", "http_version": "1.1", "scheme": "http",
                "headers": [(b"content-type", b"application/json")], "client": None,
                "server": ("test", 80), "root_path": "",
            }  # fmt: skip
            payload = json.dumps(body(model="tiny@trial", user=TREATED, stream=True)).encode()
            inbox = [{"type": "http.request", "body": payload, "more_body": False}]

            async def receive() -> Any:
                return inbox.pop() if inbox else await asyncio.Event().wait()

            async def send(message: Any) -> None:
                if b'"finish_reason":"stop"' in message.get("body", b""):
                    order.append("end")

            await app(scope, receive, send)

    asyncio.run(run())
    assert order == ["record", "end"]


def test_a_failed_answer_is_recorded() -> None:
    engine = FakeEngine(error=StepFailedError("broken"), fail_after=2)
    host = hosting(TRIAL, host=make_host(engine))
    events(post(body(model="tiny@trial", user=TREATED, stream=True), host=host))
    assert post(body(model="tiny@trial", user=TREATED), host=host).status_code == 500
    assert [(r.finish_reason, r.outcome, r.completion_tokens) for r in answers(host)] == [
        ("error", None, 2)
    ] * 2


def test_what_was_turned_down_is_no_exposure() -> None:
    host = hosting(TRIAL, host=make_host(FakeEngine(error=QueueFullError("full"))))
    assert post(body(model="tiny@trial", user=TREATED), host=host).status_code == 429
    assert answers(host) == []


def test_an_answer_whose_client_left_is_recorded_as_cancelled() -> None:
    host = hosting(TRIAL, host=make_host(FakeEngine(delay=0.02)))

    async def run() -> None:
        async with serving(host) as (client, _, _):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(ask(client), 0.1)

    asyncio.run(run())
    [record] = answers(host)
    assert (record.finish_reason, record.outcome) == ("cancelled", None)


def test_a_store_that_fails_fails_no_answer() -> None:
    host = hosting(TRIAL)
    host.records = BrokenRecords()
    response = post(body(model="tiny@trial", user=TREATED), host=host)
    assert response.status_code == 200 and response.json()["steering"]["arm"] == "treated"


def test_exposures_are_counted_from_zero() -> None:
    async def run() -> None:
        async with serving(hosting(TRIAL)) as (client, _, app):
            name = "steering_experiment_exposures_total"
            assert sample(app, name, experiment="trial", arm="treated") == 0
            await ask(client)
            assert sample(app, name, experiment="trial", arm="treated") == 1
            assert sample(app, name, experiment="trial", arm="control") == 0

    asyncio.run(run())


# Shadows.

THREE = [*ARMS, {"name": "third", "profile": "shy"}]


def test_shadows_ask_the_other_arms_the_same_unseen(tmp_path: Path) -> None:
    engine = FakeEngine()
    host = hosting(experiment(shadow=1.0, arms=THREE), host=make_host(engine))
    host.access.audit = AuditLog(tmp_path / "audit.jsonl")
    user = unit_in(experiment(arms=THREE), "treated")

    async def run() -> None:
        async with serving(host) as (client, recorder, app):
            whole = (await ask(client, user, seed=7, temperature=0.5, stop="!")).json()
            await recorder.shadows.drained()
            seen, *shadows = answers(host)
            assert [r.arm for r in shadows] == ["control", "third"]
            for record in shadows:
                assert record.id == f"{whole['id']}/{record.arm}"
                assert (record.kind, record.pair) == ("shadow", seen.id)
                assert (record.unit, record.prompt_tokens) == (seen.unit, seen.prompt_tokens)
                assert record.outcome == "answer" and record.request_id == seen.request_id
            first, *others = engine.requests
            for request in others:
                assert (request.priority, request.client) == (1, CLIENT)
                assert request.prompt_ids == first.prompt_ids
                assert request.sampling == first.sampling
            assert [len(request.edits) for request in engine.requests] == [1, 0, 1]
            # Nothing of it in the metrics of the profiles, nor among the exposures.
            name = "steering_requests_total"
            assert sample(app, name, profile="bold", finish_reason="stop") == 1
            assert sample(app, name, profile="raw", finish_reason="stop") == 0
            name = "steering_experiment_exposures_total"
            assert sample(app, name, experiment="trial", arm="control") == 0
            name = "steering_experiment_shadows_total"
            assert sample(app, name, experiment="trial", result="answered") == 2

    asyncio.run(run())
    lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert [(line["arm"], line.get("shadow")) for line in lines] == [
        ("treated", None), ("control", True), ("third", True),
    ]  # fmt: skip


def test_a_sampled_share_of_answers_has_shadows() -> None:
    host = hosting(experiment(shadow=0.5))

    async def run() -> None:
        async with serving(host) as (client, recorder, _):
            for _ in range(60):
                await ask(client)
            await recorder.shadows.drained()

    asyncio.run(run())
    kinds = [r.kind for r in answers(host)]
    assert kinds.count("exposure") == 60
    assert 10 < kinds.count("shadow") < 50


def test_shadows_that_find_no_room_are_dropped_and_counted() -> None:
    class Full(FakeEngine):
        def generate(self, request: EngineRequest) -> Any:
            if request.priority:
                raise QueueFullError("the queue is more than half full")
            return super().generate(request)

    host = hosting(experiment(shadow=1.0), host=make_host(Full()))

    async def run() -> None:
        async with serving(host) as (client, recorder, app):
            assert (await ask(client)).status_code == 200
            await recorder.shadows.drained()
            name = "steering_experiment_shadows_total"
            assert sample(app, name, experiment="trial", result="dropped") == 1

    asyncio.run(run())
    assert [r.kind for r in answers(host)] == ["exposure"]


def test_shadows_end_with_the_server() -> None:
    class Slow(FakeEngine):
        def generate(self, request: EngineRequest) -> Any:
            self.delay = 5.0 if request.priority else 0.0
            return super().generate(request)

    engine = Slow()
    host = hosting(experiment(shadow=1.0), host=make_host(engine))

    async def run() -> None:
        async with serving(host) as (client, _, _):
            await ask(client)
            while len(engine.requests) < 2:
                await asyncio.sleep(0)
            await asyncio.sleep(0)

    asyncio.run(run())
    assert [r.kind for r in answers(host)] == ["exposure"]
    assert engine.cancelled == [engine.requests[1].request_id]


def test_choices_of_completions_have_shadows_of_their_own_prompts() -> None:
    engine = FakeEngine()
    host = hosting(experiment(shadow=1.0), host=make_host(engine))
    host.keep_text = True

    async def run() -> None:
        async with serving(host) as (client, recorder, _):
            payload = {"model": "tiny@trial", "prompt": ["a", "b"], "user": TREATED}
            response = await client.post("/v1/completions", json=payload)
            assert response.status_code == 200
            await recorder.shadows.drained()

    asyncio.run(run())
    pairs = {r.pair: [] for r in answers(host)}  # type: ignore[var-annotated]
    for record in answers(host):
        pairs[record.pair].append((record.kind, record.prompt))
    assert sorted(pairs.values()) == [
        [("exposure", "a"), ("shadow", "a")], [("exposure", "b"), ("shadow", "b")],
    ]  # fmt: skip


# Guard-rails.

RAILED = experiment(guard_rails=[{"metric": "refusal", "limit": 0.1}])


def test_a_guard_rail_stops_its_arm_at_once_and_for_good(tmp_path: Path) -> None:
    guard = Tripwire("treated", after=2)
    arms = [*ARMS, {"name": "third", "profile": "shy"}]
    railed = experiment(guard_rails=[{"metric": "refusal", "limit": 0.1}], arms=arms)
    host = hosting(railed, folder=tmp_path)
    host.make_guard = guard.maker
    user = unit_in(railed, "treated")

    async def run() -> None:
        async with serving(host) as (client, _, app):
            told = [(await ask(client, user)).json()["steering"] for _ in range(4)]
            assert [t["profile"] for t in told] == ["bold", "bold", "raw", "raw"]
            assert [t["arm"] for t in told] == ["treated", "treated", None, None]
            name = "steering_guardrail_stops_total"
            assert sample(app, name, experiment="trial", arm="treated") == 1
            card = (await client.get("/v1/experiments/trial")).json()
            stopped = {arm["name"]: arm["stopped"] for arm in card["arms"]}
            assert stopped["treated"]["kind"] == "guard_rail"
            assert stopped["treated"]["detail"]["rate"] == 0.75
            assert stopped["third"] is None and card["status"] == "running"

    asyncio.run(run())
    assert len(answers(host)) == 2 == len(guard.fed)
    [event] = [e for e in events_of(host) if e.kind == "guard_rail"]
    assert (event.arm, event.detail["rate"]) == ("treated", 0.75)
    again = hosting(railed, folder=tmp_path)
    assert post(body(model="tiny@trial", user=user), host=again).json()["steering"]["arm"] is None


def test_a_restart_takes_up_stops_and_what_the_guard_has_seen() -> None:
    first = hosting(RAILED)
    first.make_guard = Tripwire("treated", after=100).maker
    for _ in range(3):
        post(body(model="tiny@trial", user=TREATED), host=first)
    guard = Tripwire("treated", after=3)
    second = hosting(RAILED)
    second.records, second.make_guard = first.records, guard.maker
    told = post(body(model="tiny@trial", user=TREATED), host=second).json()["steering"]
    assert len(guard.fed) == 3 and told["arm"] is None
    # And one that has no guard, but the records of the event.
    third = hosting(RAILED)
    third.records, third.make_guard = first.records, Tripwire("nobody", after=1).maker
    assert (
        post(body(model="tiny@trial", user=TREATED), host=third).json()["steering"]["arm"] is None
    )


def test_a_guard_rail_on_the_control_is_an_event_and_stops_nothing() -> None:
    host = hosting(RAILED)
    host.make_guard = Tripwire("control", after=1).maker
    for _ in range(2):
        told = post(body(model="tiny@trial", user=CONTROL), host=host).json()["steering"]
        assert told["arm"] == "control"
    [event] = [e for e in events_of(host) if e.kind == "guard_rail"]
    assert event.arm == "control"


def test_a_broken_guard_costs_no_answer() -> None:
    class Broken:
        def feed(self, record: AnswerRecord) -> Sequence[Any]:
            raise RuntimeError("broken")

    host = hosting(RAILED)
    host.make_guard = lambda experiment: Broken()
    assert post(body(model="tiny@trial", user=TREATED), host=host).status_code == 200
    assert len(answers(host)) == 1


# Judgements that come later.


class Classifier:
    """Calls everything a refusal, when it is let."""

    version = "classifier-1"

    def __init__(self, outcome: Outcome = "refusal") -> None:
        self.outcome = outcome
        self.asked: list[tuple[str, str | None]] = []
        self.free = threading.Event()
        self.free.set()

    def __call__(self, reply: str, prompt: str | None = None) -> Outcome:
        self.free.wait(10)
        self.asked.append((reply, prompt))
        return self.outcome

    def card(self, on_done: Any = None) -> Any:
        raise NotImplementedError


async def until(condition: Any) -> None:
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it did not happen")


def test_a_classifier_judges_after_the_answer_for_records_metrics_and_guards() -> None:
    host, guard, classifier = hosting(RAILED), Tripwire("nobody", after=1), Classifier()
    host.make_guard, host.classifier = guard.maker, classifier
    classifier.free.clear()

    async def run() -> None:
        async with serving(host) as (client, _, app):
            whole = (await ask(client)).json()
            # The answer did not wait, and has the light judge's outcome.
            assert whole["steering"]["outcome"] == "answer" and guard.fed == []
            assert whole["steering"]["judge"] == version_of(host.judge)  # not the classifier's
            name, profile = "steering_responses_judged_total", {"profile": "bold"}
            labels = {**profile, "prompt_class": "unknown"}
            arm = {"experiment": "trial", "arm": "treated", "prompt_class": "unknown"}
            of_arm = "steering_experiment_responses_judged_total"
            assert sample(app, name, **labels, outcome="answer") == 0
            assert sample(app, of_arm, **arm, outcome="answer") == 0
            classifier.free.set()
            await until(lambda: guard.fed)
            assert sample(app, name, **labels, outcome="answer") == 0
            assert sample(app, name, **labels, outcome="refusal") == 1
            assert sample(app, "steering_refusals_total", **labels) == 1
            assert sample(app, of_arm, **arm, outcome="answer") == 0
            assert sample(app, of_arm, **arm, outcome="refusal") == 1
            await client.post("/v1/chat/completions", json=body())  # no experiment
            await until(lambda: len(classifier.asked) == 2)

    asyncio.run(run())
    assert classifier.asked == [("Hello, wörld! 🙂", "Hi")] * 2
    light, later = answers(host)
    assert (light.outcome, later.id) == ("answer", light.id + JUDGED_LATER)
    [record] = with_judgements([light, later])
    assert record == dataclasses.replace(light, outcome="refusal", judge="classifier-1")
    assert [r.outcome for r in guard.fed] == ["refusal"]


@pytest.mark.parametrize("broken", [True, False])
def test_a_classifier_without_a_verdict_leaves_the_light_judges(broken: bool) -> None:
    class Broken(Classifier):
        def __call__(self, reply: str, prompt: str | None = None) -> Outcome:
            raise RuntimeError("out of memory")

    host, guard = hosting(RAILED), Tripwire("nobody", after=1)
    host.classifier = Broken() if broken else Classifier("error")
    host.make_guard = guard.maker

    async def run() -> None:
        async with serving(host) as (client, _, app):
            await ask(client)
            await until(lambda: guard.fed)
            assert sample(app, "steering_judgements_lost_total") == 1

    asyncio.run(run())
    [record] = answers(host)
    assert record.outcome == "answer" and [r.outcome for r in guard.fed] == ["answer"]


class Card(Classifier):
    """Is measured when it is let; the first time, it fails."""

    def __init__(self) -> None:
        super().__init__()
        self.measured = 0

    def card(self, on_done: Any = None) -> Any:
        self.free.wait(10)
        self.measured += 1
        if self.measured == 1:
            raise RuntimeError("out of memory")
        return PhraseJudge().card()


def test_a_judge_that_hangs_or_fails_leaves_reports_uncorrected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(api, "CARD_SECONDS", 0.05)
    host, classifier = hosting(TRIAL), Card()
    host.classifier = classifier
    classifier.free.clear()

    async def run() -> None:
        async with serving(host) as (client, _, _app):

            async def warned() -> list[str]:
                response = await client.get("/v1/experiments/trial/report")
                assert response.status_code == 200
                return [w for w in response.json()["warnings"] if "not corrected" in w]

            for _ in range(MOST_READERS + 1):  # none of them is kept
                assert "ask again later" in (await warned())[0]
            classifier.free.set()
            await until(lambda: classifier.measured)
            monkeypatch.setattr(api, "CARD_SECONDS", 10.0)
            assert await warned() == []
            assert classifier.measured == 2
            host.judge_card = JudgeCard(Card())
            assert "the judge failed" in (await warned())[0]

    asyncio.run(run())


def test_the_judge_setting_names_one() -> None:
    assert Settings(judge="hf:some/model").judge == "hf:some/model"
    with pytest.raises(ValueError, match="judge"):
        Settings(judge="gpt")
