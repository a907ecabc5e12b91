"""Where records go and come from, and what watches them: the seams of `server.experiments`.

`MemoryRecords` is for servers without a database: reports work, and a restart forgets all.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol, TypeVar

from server.experiments.definitions import Experiment
from server.experiments.records import AnswerRecord, EventRecord
from steering.judge_set import Card

T = TypeVar("T", AnswerRecord, EventRecord)
State = Literal["ok", "behind", "failing", "off"]

MOST_IN_MEMORY = 100_000
JUDGED_LATER = "#judge"
"""Ends the id of an update: the same answer with the outcome and version of a slower judge."""


class Records(Protocol):
    """Where records are kept. Any thread may call any method."""

    def append(self, record: AnswerRecord | EventRecord, /) -> None:
        """Keep a record. Quick, and raises nothing: no answer waits for a disk or fails by one.
        A record whose id is known is the same record."""
        ...

    def answers(self, experiment: str, version: int) -> Iterable[AnswerRecord]:
        """All answers of a version, by time; for a database, call it off the event loop."""
        ...

    def events(self, experiment: str, version: int) -> Iterable[EventRecord]:
        """All events of a version, by time."""
        ...

    def latest_version(self, experiment: str) -> int:
        """The highest version of which there are answers or events; 0 without any."""
        ...

    @property
    def state(self) -> State:
        """How the way to the database fares."""
        ...

    @property
    def pending(self) -> int:
        """Records that wait for the database."""
        ...

    def on_lost(self, callback: Callable[[], None], /) -> None:
        """Have this called, in any thread, for each record that is lost from now on."""
        ...

    def start(self) -> None: ...

    def close(self) -> None: ...


class MemoryRecords:
    """The latest records, in this process."""

    def __init__(self, most: int = MOST_IN_MEMORY) -> None:
        self._records: deque[AnswerRecord | EventRecord] = deque(maxlen=most)
        self._lock = threading.Lock()

    def append(self, record: AnswerRecord | EventRecord, /) -> None:
        with self._lock:
            self._records.append(record)

    def answers(self, experiment: str, version: int) -> list[AnswerRecord]:
        found = self._of(experiment, version)
        return _once(r for r in found if isinstance(r, AnswerRecord))

    def events(self, experiment: str, version: int) -> list[EventRecord]:
        found = self._of(experiment, version)
        return _once(r for r in found if isinstance(r, EventRecord))

    def latest_version(self, experiment: str) -> int:
        with self._lock:
            return max((r.version for r in self._records if r.experiment == experiment), default=0)

    state: State = "off"
    pending = 0

    def on_lost(self, callback: Callable[[], None], /) -> None:
        pass

    def start(self) -> None:
        pass

    def close(self) -> None:
        pass

    def _of(self, experiment: str, version: int) -> list[AnswerRecord | EventRecord]:
        with self._lock:
            kept = list(self._records)
        return [r for r in kept if r.experiment == experiment and r.version == version]


def _once(records: Iterable[T]) -> list[T]:
    first: dict[str, T] = {}
    for record in records:
        first.setdefault(record.id, record)
    return list(first.values())


def with_judgements(records: Iterable[AnswerRecord]) -> list[AnswerRecord]:
    """Each answer once, with its latest judgement: updates (`JUDGED_LATER`) replace the outcome of
    the record they belong to. An update without its record is left out."""
    answers: dict[str, AnswerRecord] = {}
    updates: list[AnswerRecord] = []
    for record in records:
        if record.id.endswith(JUDGED_LATER):
            updates.append(record)
        else:
            answers[record.id] = record
    for update in updates:
        id = update.id.removesuffix(JUDGED_LATER)
        if id in answers:
            answers[id] = dataclasses.replace(
                answers[id], outcome=update.outcome, judge=update.judge
            )
    return list(answers.values())


class Fired(Protocol):
    """A guard-rail that fired; a dataclass, whose fields people read in the event."""

    @property
    def arm(self) -> str: ...


class Guard(Protocol):
    """Watches one version of an experiment, answer by answer."""

    def feed(self, record: AnswerRecord) -> Sequence[Fired]:
        """Take in an answer; what fires now."""
        ...


class GuardMaker(Protocol):
    def __call__(self, experiment: Experiment, /) -> Guard: ...


class Plot(Protocol):
    """A PNG, and the name of a file for it."""

    @property
    def file(self) -> str: ...

    @property
    def png(self) -> bytes: ...


class Report(Protocol):
    """What an experiment has shown so far."""

    def to_json(self) -> Mapping[str, Any]: ...

    def to_text(self) -> str: ...

    def to_html(self) -> str: ...

    def plots(self) -> Sequence[Plot]: ...


class ReportMaker(Protocol):
    def __call__(
        self,
        experiment: Experiment,
        records: Sequence[AnswerRecord],
        events: Sequence[EventRecord],
        /,
        *,
        judge_card: Card | None = None,
        notes: Sequence[str] = (),
    ) -> Report: ...
