"""Experiments on the scripted host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from server.experiments.assignment import assign
from server.experiments.definitions import Experiment
from server.experiments.interfaces import MemoryRecords
from server.experiments.records import AnswerRecord, EventRecord
from server.experiments.registry import Registry
from server.hosting import Host
from tests.server.fakes import make_host

ARMS = [{"name": "control", "profile": "raw"}, {"name": "treated", "profile": "bold"}]


def definition(**changes: Any) -> dict[str, Any]:
    return {"name": "trial", "arms": ARMS, **changes}


def experiment(**changes: Any) -> Experiment:
    return Experiment.model_validate(definition(**changes))


def hosting(*experiments: Experiment, host: Host | None = None, **options: Any) -> Host:
    """A host that runs these experiments."""
    host = host or make_host()
    host.experiments = Registry(host.profiles, experiments, **options)
    return host


def unit_in(experiment: Experiment, arm: str | None) -> str:
    """A user who is in this arm; None: in none."""
    for i in range(10_000):
        found = assign(experiment, f"user-{i}")
        if (found and found.name) == arm:
            return f"user-{i}"
    raise AssertionError("nobody is")


def answers(host: Host, name: str = "trial", version: int = 1) -> list[AnswerRecord]:
    return list(host.records.answers(name, version))


def events_of(host: Host, name: str = "trial", version: int = 1) -> list[EventRecord]:
    return list(host.records.events(name, version))


class BrokenRecords(MemoryRecords):
    def append(self, record: AnswerRecord | EventRecord, /) -> None:
        raise OSError("no space left on device")


@dataclass(frozen=True)
class Alarm:
    arm: str
    rate: float


class Tripwire:
    """A guard that fires for an arm after so many of its answers."""

    def __init__(self, arm: str, after: int) -> None:
        self.arm, self.after = arm, after
        self.fed: list[AnswerRecord] = []

    def feed(self, record: AnswerRecord) -> Sequence[Alarm]:
        self.fed.append(record)
        count = sum(r.arm == self.arm for r in self.fed)
        return [Alarm(self.arm, 0.75)] if count >= self.after else []

    @property
    def maker(self) -> Callable[[Experiment], Tripwire]:
        return lambda experiment: self
