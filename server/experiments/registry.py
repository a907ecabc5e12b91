"""The experiments of one server: defined in the settings or by the admin API, changed by versions,
ended, and stopped arm by arm.

Used on the event loop, and before it runs. With a folder for it (`--experiments-state`), what the
API made and whatever was stopped or ended survives a restart; without one it does not.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from server.errors import ConflictError, InvalidRequestError, NotFoundError
from server.experiments.definitions import Experiment
from server.profiles import ProfileStore
from server.whole_file import replace_file

logger = logging.getLogger(__name__)

STATE_FILE = "experiments.json"
MOST_EXPERIMENTS = 64
"""Known at once: each has series of metrics and an entry in `GET /v1/models`."""

Status = Literal["scheduled", "running", "ended"]


@dataclass(frozen=True)
class Stop:
    """Why an arm gets no more units.

    Args:
        kind: `guard_rail`, `stopped` (by hand) or `profile_missing`.
        detail: figures for people.
    """

    time: float
    kind: str
    detail: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """An experiment and what became of it.

    Args:
        experiment: the latest version.
        stopped: arms of this version whose units went back to control.
        ended: when somebody ended it, before its own end or without one.
        past: earlier versions, oldest first.
    """

    experiment: Experiment
    from_settings: bool = False
    stopped: Mapping[str, Stop] = field(default_factory=dict)
    ended: float | None = None
    past: tuple[Experiment, ...] = ()

    def status(self, now: float) -> Status:
        moment, experiment = datetime.fromtimestamp(now, UTC), self.experiment
        over = experiment.end is not None and moment >= experiment.end
        # With one arm left there is nothing to compare.
        left = sum(arm.name not in self.stopped for arm in experiment.arms)
        if self.ended is not None or over or left < 2:
            return "ended"
        early = experiment.start is not None and moment < experiment.start
        return "scheduled" if early else "running"

    @property
    def shares(self) -> dict[str, float]:
        """Expected share of each arm among exposed units; stopped ones get none any more."""
        left = {a.name: 0.0 if a.name in self.stopped else a.weight for a in self.experiment.arms}
        total = math.fsum(left.values())
        return {name: weight / total for name, weight in left.items()}

    @property
    def versions(self) -> tuple[Experiment, ...]:
        """Oldest first."""
        return (*self.past, self.experiment)

    def version(self, number: int | None) -> Experiment:
        """The latest version, or the one of this number. Raises NotFoundError."""
        versions = {each.version: each for each in self.versions}
        if number is None:
            return self.experiment
        if number in versions:
            return versions[number]
        known = ", ".join(map(str, versions))
        raise NotFoundError(
            f"The experiment {self.experiment.name!r} has no version {number}; there is {known}.",
            param="version",
            code="not_found",
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "experiment": self.experiment.model_dump(mode="json"),
            "from_settings": self.from_settings,
            "stopped": {arm: asdict(stop) for arm, stop in self.stopped.items()},
            "ended": self.ended,
            "past": [experiment.model_dump(mode="json") for experiment in self.past],
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Entry:
        return cls(
            Experiment.model_validate(values["experiment"]),
            values["from_settings"],
            {arm: Stop(**stop) for arm, stop in values["stopped"].items()},
            values["ended"],
            tuple(Experiment.model_validate(each) for each in values["past"]),
        )


class Registry:
    """Experiments by name.

    Args:
        profiles: those that arms may name; the ones in use cannot be removed.
        definitions: of the settings.
        default: takes in requests that name neither a profile nor an experiment.
        folder: for what must survive a restart.
        allow_red_team: let the settings and the local user name red-team profiles in arms.

    Raises ValueError, in one line, for definitions that cannot be served as they are.
    """

    def __init__(
        self,
        profiles: ProfileStore,
        definitions: Iterable[Experiment] = (),
        *,
        default: str | None = None,
        folder: Path | None = None,
        allow_red_team: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.profiles = profiles
        self.default = default
        self.allow_red_team = allow_red_team
        self.clock = clock
        self._file = None if folder is None else folder / STATE_FILE
        self._entries: dict[str, Entry] = {}
        self._dormant: dict[str, Entry] = {}
        """Once in the settings and now not: kept, in case they come back."""
        self._claimed: set[str] = set()
        kept = {} if self._file is None else _read(self._file)
        for experiment in definitions:
            self._check_defined(experiment)
            entry = _continued(kept.pop(experiment.name, None), experiment)
            if experiment.name in self._entries:
                raise ValueError(f"two experiments of the settings are named {experiment.name}")
            self._entries[experiment.name] = entry
        for name, entry in kept.items():
            if entry.from_settings:
                self._dormant[name] = entry
            else:
                self._entries[name] = self._without_missing_profiles(entry)
        if default is not None and default not in self._entries:
            raise ValueError(
                f"--default-experiment {default}: there is {', '.join(self._entries) or 'none'}; "
                "define it as [[experiments]] in the --config file"
            )
        if self._file is not None:
            self.save()
        self.claim()

    def __iter__(self) -> Iterator[Entry]:
        return iter(list(self._entries.values()))

    def find(self, name: str, *, param: str = "name") -> Entry:
        """Raises NotFoundError."""
        try:
            return self._entries[name]
        except KeyError:
            raise unknown_experiment(name, param) from None

    def running(self) -> list[Entry]:
        return [entry for entry in self if self.status(entry) == "running"]

    def status(self, entry: Entry) -> Status:
        return entry.status(self.clock())

    def knows(self, name: str) -> bool:
        """Whether there is one of this name, be it one that the settings once had."""
        return name in self._entries or name in self._dormant

    def next_version(
        self, asked: Experiment, *, version_given: bool, first: int = 1
    ) -> Entry | None:
        """What defining this experiment now comes to; None where that changes nothing.

        Args:
            first: version of one whose name is not known.

        Raises ConflictError where the settings define it, or for a version that is not the next.
        """
        old = self._entries.get(asked.name) or self._dormant.get(asked.name)
        if old is None:
            if version_given and asked.version != first:
                before = f": there are records of {first - 1} before it" if first > 1 else ""
                raise ConflictError(
                    f"{asked.name!r} begins with version {first} here{before}.", param="version"
                )
            self._check_room()
            return Entry(asked.model_copy(update={"version": first}))
        if old.from_settings:
            raise ConflictError(
                f"The experiment {asked.name!r} is defined in the settings; change it there, with "
                "its next version, or choose another name.",
                param="name",
            )
        number = old.experiment.version
        if version_given and asked.version not in (number, number + 1):
            raise ConflictError(
                f"The version of {asked.name!r} is {number}, so the next one is {number + 1}.",
                param="version",
            )
        new_one = version_given and asked.version == number + 1
        same = old.experiment.digest == asked.digest
        if same and self.status(old) != "ended" and not new_one:
            return None
        if version_given and not new_one and not same:
            raise ConflictError(
                f"Version {number} of {asked.name!r} cannot change: what it records would mean "
                f"two things. Send version {number + 1}, or none.",
                param="version",
            )
        changed = asked.model_copy(update={"version": number + 1})
        return Entry(changed, past=(*old.past, old.experiment))

    def ended(self, name: str) -> Entry:
        """The entry as it is once ended now. Raises NotFoundError, or ConflictError if it is."""
        entry = self.find(name)
        if entry.ended is not None:
            raise ConflictError(f"The experiment {name!r} has ended already.", param="name")
        return replace(entry, ended=self.clock())

    def put(self, entry: Entry) -> None:
        """Let this be the entry of its experiment."""
        self._entries[entry.experiment.name] = entry
        self.claim()

    def stop(self, name: str, version: int, arm: str, stop: Stop) -> bool:
        """Send an arm's units back to control; False if they are there already."""
        entry = self._entries.get(name)
        if entry is None or entry.experiment.version != version or arm in entry.stopped:
            return False
        if arm == entry.experiment.control.name:
            return False
        self.put(replace(entry, stopped={**entry.stopped, arm: stop}))
        return True

    def check_stop(self, name: str, arm: str) -> Entry:
        """The experiment whose arm can be stopped by hand. Raises ApiError."""
        entry = self.find(name)
        names = [each.name for each in entry.experiment.arms]
        if arm not in names:
            raise NotFoundError(
                f"The experiment {name!r} has no arm {arm[:64]!r}; there is {', '.join(names)}.",
                param="arm",
                code="not_found",
            )
        if arm == names[0]:
            raise InvalidRequestError(
                f"{arm!r} is the control, to which the others' units go back; end the experiment "
                f"instead: DELETE /v1/experiments/{name}.",
                param="arm",
            )
        return entry

    def save(self, changed: Entry | None = None) -> None:
        """Write the state, with an entry that is about to be `put`. Raises OSError.

        Any thread may call this, one at a time.
        """
        if self._file is None:
            return
        entries = {**self._dormant, **self._entries}
        if changed is not None:
            entries[changed.experiment.name] = changed
        data = {"format": 1, "experiments": [entry.to_json() for entry in entries.values()]}
        self._file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self._file, json.dumps(data, indent=1))

    def _check_defined(self, experiment: Experiment) -> None:
        for arm in experiment.arms:
            where = f"experiment {experiment.name}, arm {arm.name}"
            if arm.profile not in self.profiles.names:
                raise ValueError(
                    f"{where}: there is no profile {arm.profile}; there is "
                    f"{', '.join(self.profiles.names)}"
                )
            if self.profiles.resolve(arm.profile).red_team and not self.allow_red_team:
                raise ValueError(
                    f"{where}: {arm.profile} removes refusals (red_team); start the server with "
                    "--allow-red-team-arms if that is meant"
                )
        if experiment.creator:
            raise ValueError(
                f"experiment {experiment.name}: 'creator' is for experiments that a key makes; "
                "leave it out"
            )

    def _without_missing_profiles(self, entry: Entry) -> Entry:
        """Profiles registered at run time are gone after a restart."""
        gone = [a for a in entry.experiment.arms if a.profile not in self.profiles.names]
        if not gone or entry.ended is not None:
            return entry
        for arm in gone:
            logger.error(
                "experiment %s: the profile %s of its arm %s is not served; the arm is stopped",
                entry.experiment.name, arm.profile, arm.name,
            )  # fmt: skip
        now = self.clock()
        if entry.experiment.control in gone:
            return replace(entry, ended=now)
        stops = {arm.name: Stop(now, "profile_missing") for arm in gone}
        return replace(entry, stopped={**stops, **entry.stopped})

    def _check_room(self) -> None:
        """Make room for one more, or raise ConflictError."""
        if len(self._entries) < MOST_EXPERIMENTS:
            return
        over = [n for n, e in self._entries.items() if self.status(e) == "ended"]
        over = [name for name in over if not self._entries[name].from_settings]
        if not over:
            raise ConflictError(
                f"There are {MOST_EXPERIMENTS} experiments already; end one first.",
                code="too_many_experiments",
            )
        del self._entries[over[0]]

    def claim(self) -> None:
        """Keep the profiles in use from being removed, and no others. Where an experiment ends by
        the clock, nobody says so: whoever is about to remove a profile does."""
        kept = self.profiles.kept
        used = {
            arm.profile: f"{self._called(entry.experiment)} uses it"
            for entry in self
            if self.status(entry) != "ended"
            for arm in entry.experiment.arms
        }
        for name in self._claimed - used.keys():
            del kept[name]
        self._claimed = {n for n in used if n in self._claimed or n not in kept}
        kept.update({name: used[name] for name in self._claimed})

    def _called(self, experiment: Experiment) -> str:
        """Its name, unless that is a secret to some who are told."""
        red = self.profiles.red_team_names
        secret = any(arm.profile in red for arm in experiment.arms)
        return "an experiment" if secret else f"the experiment {experiment.name}"


def unknown_experiment(name: str, param: str) -> NotFoundError:
    shown = name if len(name) <= 100 else name[:100] + "..."
    code = "model_not_found" if param == "model" else "not_found"
    return NotFoundError(f"There is no experiment {shown!r} here.", param=param, code=code)


def _continued(kept: Entry | None, defined: Experiment) -> Entry:
    """What the settings define now, with what became of it before the restart."""
    if kept is None:
        return Entry(defined, from_settings=True)
    if kept.from_settings and kept.experiment == defined:
        return kept
    if defined.version <= kept.experiment.version:
        raise ValueError(
            f"experiment {defined.name} has changed since its version {kept.experiment.version} "
            f"ran; write version = {kept.experiment.version + 1}"
        )
    return Entry(defined, from_settings=True, past=(*kept.past, kept.experiment))


def _read(file: Path) -> dict[str, Entry]:
    try:
        data = json.loads(file.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read --experiments-state {file}: {error}") from None
    try:
        if data["format"] != 1:
            raise ValueError(f"its format is {data['format']}")
        entries = [Entry.from_json(values) for values in data["experiments"]]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        told = "it is damaged" if isinstance(error, ValidationError) else repr(error)
        raise ValueError(
            f"--experiments-state {file} is not what this server wrote: {told}"
        ) from None
    return {entry.experiment.name: entry for entry in entries}
