"""What becomes of an answer in an experiment: its record, its shadows, the guard-rails.

A record is appended when all is known of a reply and before its end is told, however it ended. The
guard of an experiment sees each answer that a client got once, with the judgement that counts: the
classifier's where there is one and it keeps up, else the light judge's.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Coroutine, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

from server.experiments.definitions import Arm, Experiment
from server.experiments.interfaces import JUDGED_LATER, Fired, Guard, with_judgements
from server.experiments.judging import Job, LaterJudge
from server.experiments.reading import Reading
from server.experiments.records import (
    DEFINITION,
    AnswerRecord,
    EventRecord,
    Kind,
    definitions_of,
)
from server.experiments.registry import Entry, Stop
from server.experiments.shadow import Shadows
from server.hosting import Host
from server.logs import current_request
from server.metrics import Metrics
from server.profiles import finite
from server.protocol import ChatRequest, CompletionRequest
from server.reply import Reply
from steering.judge import Outcome, version_of

logger = logging.getLogger(__name__)

FOLLOW_SECONDS = 10.0
"""How often other replicas' events are looked for."""
START_SECONDS = 10.0
"""How long a start waits for the database to say what happened before; else it is heard later."""
DEFINING_SECONDS = 10.0
"""How long a new experiment waits for the database to say which version it is."""
STOPPING = frozenset({"guard_rail", "stopped"})


class Recorder:
    """Keeps the records of one app's experiments. Used on the event loop."""

    def __init__(self, host: Host, metrics: Metrics) -> None:
        self.host = host
        self.metrics = metrics
        self.shadows = Shadows(host, metrics, self._shadow_ended)
        self._guards: dict[tuple[str, int], Guard] = {}
        self.reading = Reading()
        self._fired: set[str] = set()
        self._reused: set[tuple[str, int]] = set()
        self._unseen: set[tuple[str, int]] = set()
        """Versions whose guard has not seen yet what was on record at the start."""
        self._blind = False
        self._judge: LaterJudge | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.changing = asyncio.Lock()
        """Held by whoever changes the registry and writes its state."""
        for entry in host.experiments:
            self._announce(entry)

    async def start(self) -> None:
        """Take up what is on record: arms that were stopped, and what guards have seen."""
        self._loop = asyncio.get_running_loop()
        if self.host.classifier is not None:
            self._judge = LaterJudge(self.host.classifier)
        lasting = []
        for entry in self.host.experiments:
            for arm, stop in entry.stopped.items():
                self._record_event(entry.experiment, stop.kind, arm, dict(stop.detail), stop.time)
            if self.host.experiments.status(entry) != "ended":
                self._record_registered(entry.experiment)
                lasting.append(entry)
                if entry.experiment.guard_rails:
                    self._unseen.add(_key(entry.experiment))
        with suppress(TimeoutError):
            async with asyncio.timeout(START_SECONDS):
                for entry in lasting:
                    await self._catch_up(entry)
        self._spawn(self._follow())

    async def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await self.shadows.close()
        if self._judge is not None:
            await asyncio.to_thread(self._judge.close)

    def defined(self, entry: Entry) -> None:
        """A version has begun."""
        self._announce(entry)
        self._record_registered(entry.experiment, by=entry.experiment.creator)

    async def first_version(self, asked: Experiment) -> int:
        """The version with which an experiment begins whose name is not known here: the one on
        record, if it is this definition and not over, as on another replica or before a restart,
        else the next. Raises UnavailableError."""
        registry, records, name = self.host.experiments, self.host.records, asked.name

        def find() -> int:
            latest = records.latest_version(name)
            if latest == 0:
                return 1
            events = list(records.events(name, latest))
            over = registry.status(_as_recorded(asked, events)) == "ended"
            return latest if asked.digest in definitions_of(events) and not over else latest + 1

        return await self.reading.run(find, DEFINING_SECONDS)

    def removed(self, entry: Entry, by: str) -> None:
        """An experiment was ended."""
        self._record_event(entry.experiment, "removed", None, {"by": by})

    def ended(self, reply: Reply) -> None:
        """A reply to a client has ended. Raises nothing: the answer does not depend on it."""
        try:
            record = None
            if reply.prepared.exposure is not None:
                record = self._answer_record(reply, "exposure", reply.request.request_id)
                self._append(record)
                self.metrics.exposed(record)
            self._judge_later_or_feed(reply, record)
            if record is not None and reply.outcome is not None:
                self.shadows.offer(reply)
        except Exception:
            logger.exception("%s was not recorded", reply.prepared.id)

    def stop(self, experiment: Experiment, arm: str, stop: Stop) -> bool:
        """Send an arm's units back to control, and say so; False if they are there already."""
        if not self.host.experiments.stop(experiment.name, experiment.version, arm, stop):
            return False
        logger.warning("experiment %s: the arm %s was stopped", experiment.name, arm)
        self._announce(self.host.experiments.find(experiment.name))
        if stop.kind == "guard_rail":
            self.metrics.guardrail_stops.labels(experiment.name, arm).inc()
        self._record_event(experiment, stop.kind, arm, dict(stop.detail))
        self._spawn(self._save())
        return True

    async def _save(self) -> None:
        async with self.changing:
            try:
                await asyncio.to_thread(self.host.experiments.save)
            except OSError as error:
                logger.error("--experiments-state cannot be written: %s", error)

    def _announce(self, entry: Entry) -> None:
        self.metrics.add_experiment(entry.experiment.name, entry.shares)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # Records.

    def _append(self, record: AnswerRecord | EventRecord) -> None:
        try:
            self.host.records.append(record)
        except Exception:  # an answer is worth more than its record
            logger.exception("the record %s was lost", record.id)

    def _record_event(
        self,
        experiment: Experiment,
        kind: str,
        arm: str | None,
        detail: dict[str, object],
        at: float | None = None,
    ) -> None:
        # The same on every replica, so that it is one event wherever it is noticed.
        id = f"{experiment.name}@{experiment.version}/{kind}" + (f"/{arm}" if arm else "")
        self._append(
            EventRecord(
                id, at or time.time(), experiment.name, experiment.version, kind, arm, detail
            )
        )

    def _record_registered(self, experiment: Experiment, **detail: object) -> None:
        self._record_event(
            experiment, "registered", None, {**detail, DEFINITION: experiment.digest}
        )

    def _answer_record(self, reply: Reply, kind: Kind, pair: str) -> AnswerRecord:
        host, prepared, exposure = self.host, reply.prepared, reply.prepared.exposure
        assert exposure is not None
        receipt, composition = reply.receipt, prepared.composition
        calls = reply.ended_by == "stop" and reply.calls
        prompt = prompt_text(reply) if host.keep_text else None
        return AnswerRecord(
            id=reply.request.request_id,
            time=time.time(),
            experiment=exposure.experiment.name,
            version=exposure.experiment.version,
            arm=exposure.arm.name,
            unit=exposure.unit,
            sticky=exposure.sticky,
            kind=kind,
            pair=pair,
            request_id=current_request.get(),
            profile=composition.name,
            fingerprint=composition.fingerprint,
            strength=composition.strength,
            model=host.profiles.served_name,
            weights=host.lm.fingerprint.weights,
            prompt_class=reply.prompt_class,
            benign_probability=finite(receipt.benign_probability),
            refusal_score=finite(receipt.refusal_score),
            answer_probability=finite(receipt.answer_probability),
            outcome=reply.outcome,
            judge=version_of(host.judge),
            finish_reason="tool_calls" if calls else reply.ended_by,
            prompt_tokens=len(reply.request.prompt_ids),
            completion_tokens=reply.completion_tokens,
            ttft_seconds=reply.ttft_seconds,
            duration_seconds=reply.duration_seconds,
            prompt=prompt,
            reply=reply.text if host.keep_text else None,
        )

    def _shadow_ended(self, reply: Reply, arm: Arm, seen: Reply) -> None:
        record = self._answer_record(reply, "shadow", seen.request.request_id)
        self._append(record)
        self._judge_later_or_feed(reply, record)

    # Judgements that come later.

    def _judge_later_or_feed(self, reply: Reply, record: AnswerRecord | None) -> None:
        judged = reply.outcome is not None and not reply.calls
        if self._judge is not None and judged:
            # What the reply holds, and so its profile's series, lives until it is judged.
            done = partial(self._judged_on_thread, reply, record)
            if self._judge.submit(Job(reply.text, prompt_text(reply), done)):
                return
            self.metrics.judgements_lost.inc()
        else:
            self._count(record)
        self._feed(record)

    def _count(self, record: AnswerRecord | None) -> None:
        if record is not None and record.kind == "exposure":
            self.metrics.exposure_judged(record)

    def _judged_on_thread(
        self, reply: Reply, record: AnswerRecord | None, outcome: Outcome | None, seconds: float
    ) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._judged, reply, record, outcome, seconds)

    def _judged(
        self, reply: Reply, record: AnswerRecord | None, outcome: Outcome | None, seconds: float
    ) -> None:
        if outcome is None:
            self.metrics.judgements_lost.inc()
        else:
            reply.count(outcome, seconds)
            if record is not None:
                assert self.host.classifier is not None
                version = version_of(self.host.classifier)
                record = replace(record, outcome=outcome, judge=version)
                update = replace(record, id=record.id + JUDGED_LATER, time=time.time())
                self._append(update)
            self._count(record)
        self._feed(record)

    # Guard-rails.

    def _feed(self, record: AnswerRecord | None) -> None:
        if record is None or record.kind != "exposure":
            return
        entry = next((e for e in self.host.experiments if _is_of(e, record)), None)
        if entry is None or not entry.experiment.guard_rails:
            return
        for fired in self._guard(entry.experiment).feed(record):
            self._fire(entry.experiment, fired)

    def _guard(self, experiment: Experiment) -> Guard:
        key = _key(experiment)
        if key not in self._guards:
            for old in [k for k in self._guards if k[0] == experiment.name]:
                del self._guards[old]
            self._guards[key] = self.host.make_guard(experiment)
        return self._guards[key]

    def _fire(self, experiment: Experiment, fired: Fired) -> None:
        detail: dict[str, Any] = {}
        if dataclasses.is_dataclass(fired) and not isinstance(fired, type):
            detail = dataclasses.asdict(fired)
        if self.stop(experiment, fired.arm, Stop(time.time(), "guard_rail", detail)):
            return
        key = f"{experiment.name}@{experiment.version}/{fired.arm}"
        if fired.arm == experiment.control.name and key not in self._fired:
            # There is nothing to send its units back to; somebody must decide.
            self._fired.add(key)
            logger.error("experiment %s: a guard-rail fired on the control", experiment.name)
            self._record_event(experiment, "guard_rail", fired.arm, detail)

    # Other replicas, and this one before a restart.

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(FOLLOW_SECONDS)
            # Without a database nobody else writes what this process reads.
            if self.host.records.state != "off" or self._unseen:
                for entry in self.host.experiments.running():
                    await self._catch_up(entry)

    async def _catch_up(self, entry: Entry) -> None:
        """Do what the events on record say was done, and show a new guard the answers on record, so
        that a restart gives no arm a second chance."""
        experiment, records = entry.experiment, self.host.records
        name, version = key = _key(experiment)
        try:
            self._adopt(
                experiment, await self.reading.run(lambda: list(records.events(name, version)))
            )
            if key in self._unseen:
                answers = await self.reading.run(
                    lambda: with_judgements(records.answers(name, version))
                )
                self._unseen.discard(key)
                self._guards.pop(key, None)  # it has seen some of these
                for record in answers:
                    self._feed(record)
        except Exception as error:
            if not self._blind:  # once, not at each attempt
                logger.warning("experiment %s: its records cannot be read: %s", name, error)
            self._blind = True
        else:
            self._blind = False

    def _adopt(self, experiment: Experiment, events: Sequence[EventRecord]) -> None:
        registry = self.host.experiments
        if definitions_of(events) - {experiment.digest} and _key(experiment) not in self._reused:
            self._reused.add(_key(experiment))
            logger.error(
                "experiment %s: version %d is on record with another definition, whose answers are "
                "counted as this one's; give it the next version",
                experiment.name, experiment.version,
            )  # fmt: skip
        recorded = _as_recorded(experiment, events)
        for arm, stop in recorded.stopped.items():
            if registry.stop(experiment.name, experiment.version, arm, stop):
                logger.warning(
                    "experiment %s: the arm %s is stopped, as is on record", experiment.name, arm
                )
                self._announce(registry.find(experiment.name))
        if recorded.ended is not None:
            current = registry.find(experiment.name)
            if current.experiment == experiment and current.ended is None:
                logger.warning("experiment %s: it has ended, as is on record", experiment.name)
                registry.put(replace(current, ended=recorded.ended))


def _as_recorded(experiment: Experiment, events: Iterable[EventRecord]) -> Entry:
    """What became of an experiment, by its events."""
    stopped: dict[str, Stop] = {}
    ended = None
    for event in events:
        # A guard-rail may have fired on the control, which nothing stops.
        on_control = event.arm == experiment.control.name
        if event.kind in STOPPING and event.arm is not None and not on_control:
            stopped.setdefault(event.arm, Stop(event.time, event.kind, event.detail))
        elif event.kind == "removed":
            ended = event.time
    return Entry(experiment, stopped=stopped, ended=ended)


def _key(experiment: Experiment) -> tuple[str, int]:
    return experiment.name, experiment.version


def prompt_text(reply: Reply) -> str | None:
    """What a reply answers, as text: the last turn of a conversation, or the prompt."""
    body = reply.prepared.body
    if isinstance(body, ChatRequest):
        return str(body.messages[-1].rendered()["content"])
    if isinstance(body, CompletionRequest):
        prompts = body.prompts
        prompt = prompts[reply.index // body.choices]
        return prompt if isinstance(prompt, str) else None
    return None


def _is_of(entry: Entry, record: AnswerRecord) -> bool:
    return _key(entry.experiment) == (record.experiment, record.version)
