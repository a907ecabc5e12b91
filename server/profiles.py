"""The profiles a server offers, and which one a request means."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from server.errors import ConflictError, InvalidRequestError, NotFoundError
from server.redact import RESTRICTED
from server.responses import ModelCard, ProfileCard
from steering.edit import Edit
from steering.models import LanguageModel
from steering.monitor import MONITOR_FILE
from steering.profile import RAW, Profile, ProfileError

COMPOSED = "composed"
"""Stands for all compositions of several profiles where metrics name a profile."""
RESERVED = (COMPOSED, RESTRICTED)
"""Names that mean something else in metrics."""


class ProfileStore:
    """Profiles by name, checked against one model. `raw` is always among them.

    Any thread may read, add and remove at any time: a reader sees all of a change or none of it.
    `red_team_names` are those of all red-team profiles there ever were.

    Args:
        served_name: what clients call the model.
        profiles, files: what to offer besides `raw`.
        default: the profile of requests that name none.
        folded: the one profile that is part of the weights, if any; no other can be served then.

    Raises ProfileError for a file or profile that cannot be served as asked.
    """

    def __init__(
        self,
        lm: LanguageModel,
        served_name: str,
        profiles: Iterable[Profile] = (),
        *,
        files: Iterable[Path] = (),
        default: str | None = None,
        folded: str | None = None,
        allow_derived: bool = False,
    ) -> None:
        self._lm = lm
        self.served_name = served_name
        self.folded = folded
        self._allow_derived = allow_derived
        # Never changed in place, so that readers need no lock.
        self._profiles: Mapping[str, Profile] = {RAW.name: RAW}
        self._writing = threading.Lock()
        self.red_team_names: set[str] = set()
        for profile in profiles:
            self.add(profile)
        for file in files:
            self.add(Profile.load(file), file)
        self.default_name = default or folded or RAW.name
        for role, name in (("--default-profile", default), ("--fold", folded)):
            if name is not None and name not in self._profiles:
                raise ProfileError(f"{role} {name}: there is only {', '.join(self._profiles)}")
        if folded is not None and self.default_name != folded:
            raise ProfileError(
                f"--fold {folded} serves that profile only, so it must be the default one too; "
                "drop --default-profile"
            )
        if self._profiles[self.default_name].red_team and folded is None:
            raise ProfileError(
                f"profile {self.default_name} removes refusals (red_team) and cannot be the "
                "default; clients must ask for it by name"
            )
        self.kept = {RAW.name: "it is built in", self.default_name: "it is the default"}
        """Profiles that cannot be removed, with the reason."""
        if folded is not None:
            self.kept[folded] = "it is part of the weights"

    def add(self, profile: Profile, source: Path | None = None) -> None:
        """Offer a profile. Raises ProfileError if it does not fit the model or its name is taken.

        A profile without edits may take the place of the built-in `raw`, for its card.
        """
        where = f"{source}: " if source is not None else ""
        try:
            self.check(profile)
        except ProfileError as error:
            raise ProfileError(f"{where}{error}") from error
        with self._writing:
            replaces_raw = self._profiles.get(profile.name) is RAW and not profile.edits
            if profile.name in self._profiles and not replaces_raw:
                raise ProfileError(
                    f"{where}there is a profile named {profile.name} already; rename one of them"
                )
            self._profiles = {**self._profiles, profile.name: profile}
            if profile.red_team:
                self.red_team_names.add(profile.name)

    def check(self, profile: Profile) -> None:
        """Raise ProfileError if the profile does not fit the model, or its name is reserved."""
        if profile.name in RESERVED:
            raise ProfileError(f"a profile cannot be named {profile.name}; rename it")
        profile.check_base(self._lm, allow_derived=self._allow_derived)

    def remove(self, name: str) -> Profile:
        """Offer a profile no more, and return it; requests that have it keep it.

        Raises NotFoundError, or ConflictError for a profile that is `kept`.
        """
        with self._writing:
            profile = self.resolve(name, param="name")
            if name in self.kept:
                raise ConflictError(
                    f"The profile {name!r} cannot be removed: {self.kept[name]}.", param="name"
                )
            self._profiles = {k: v for k, v in self._profiles.items() if k != name}
            return profile

    def seen_by(self, permits: Callable[[Iterable[Profile]], bool]) -> ProfileStore:
        """This store for somebody for whom only permitted profiles exist.

        Whatever it says, lists and errors alike, is what a store would say that never had others.
        """
        view = copy.copy(self)
        view._profiles = {profile.name: profile for profile in self if permits((profile,))}
        view.folded = self.folded if self.folded in view._profiles else None
        return view

    def __iter__(self) -> Iterator[Profile]:
        """The profiles that can be asked for."""
        return iter(p for p in self._profiles.values() if self.folded in (None, p.name))

    @property
    def names(self) -> list[str]:
        return [profile.name for profile in self]

    def resolve(self, name: str, *, param: str = "model") -> Profile:
        """The profile of that name. Raises NotFoundError, which lists what there is."""
        if self.folded is not None and name != self.folded:
            raise NotFoundError(
                f"This server was started with --fold {self.folded}: it serves that profile only "
                f"and cannot serve {name!r}.",
                param=param,
            )
        try:
            return self._profiles[name]
        except KeyError:
            raise NotFoundError(
                f"There is no profile {_short(name)!r}.{_there_is(self.names)}",
                param=param,
            ) from None

    def choose(self, model: str, wanted: str | None = None) -> Profile:
        """The profile that a request means by its `model` and its `steering.profile`.

        A served name may hold `:` and `@` itself, so only what follows it is looked at.
        """
        named = self.named_by(model)
        profile = None if named is None else self.resolve(named)
        if wanted is None:
            if profile is None and self.default_name not in self._profiles:
                raise self._no_model(model)
            return profile or self.resolve(self.default_name)
        asked = self.resolve(wanted, param="steering.profile")
        if profile not in (None, asked):
            raise InvalidRequestError(
                f"'model' asks for the profile {named!r} and 'steering.profile' for {wanted!r}; "
                "name one, or the same twice.",
                param="steering.profile",
            )
        return asked

    def named_by(self, model: str) -> str | None:
        """The profile that `model` names after the served name, if any. Raises NotFoundError."""
        rest = model.removeprefix(self.served_name)
        if model.startswith(self.served_name):
            if not rest:
                return None
            if rest[0] == ":":
                return rest[1:]
            if rest[0] == "@":
                raise NotFoundError(
                    f"There is no experiment {_short(rest[1:])!r}; this server runs none.",
                    param="model",
                )
        raise self._no_model(model)

    def _no_model(self, model: str) -> NotFoundError:
        there_is = _there_is(self.model_ids)
        return NotFoundError(f"There is no model {_short(model)!r}.{there_is}", param="model")

    @property
    def model_ids(self) -> list[str]:
        """Every value of `model` that can be asked for."""
        default = [self.served_name] if self.default_name in self._profiles else []
        return [*default, *(f"{self.served_name}:{name}" for name in self.names)]

    def model_card(self, model: str, *, created: int, max_model_len: int) -> ModelCard:
        """What `GET /v1/models` says of a model. Raises NotFoundError."""
        return ModelCard(
            id=model,
            created=created,
            root=self._root,
            parent=None if model == self.served_name else self.served_name,
            profile=self.choose(model).name,
            max_model_len=max_model_len,
        )

    def experiment_card(self, experiment: str, *, created: int, max_model_len: int) -> ModelCard:
        """What `GET /v1/models` says of an experiment."""
        return ModelCard(
            id=f"{self.served_name}@{experiment}",
            created=created,
            root=self._root,
            parent=self.served_name,
            profile=None,
            experiment=experiment,
            max_model_len=max_model_len,
        )

    @property
    def _root(self) -> str:
        return self._lm.name if not Path(self._lm.name).exists() else self.served_name

    def derived_base(self, profile: Profile) -> bool:
        """True for a profile fitted on other weights than the ones served."""
        base = profile.base
        return base is not None and base.weights != self._lm.fingerprint.weights

    def card(self, profile: Profile) -> ProfileCard:
        """What people are told about a profile."""
        return ProfileCard(
            name=profile.name,
            model=f"{self.served_name}:{profile.name}",
            method=profile.method,
            fingerprint=profile.fingerprint,
            strength=profile.strength,
            default=profile.name == self.default_name,
            identity=not profile.edits,
            folded=profile.name == self.folded,
            red_team=profile.red_team,
            derived_base=self.derived_base(profile),
            layers=len(self._lm.sites.blocks),
            edits=[describe_edit(edit) for edit in profile.edits],
            card=finite(profile.card),
            provenance=finite(profile.provenance),
        )


def profile_files(path: Path) -> list[Path]:
    """The profile files at a path: itself, or those in a directory. Raises ProfileError."""
    if not path.is_dir():
        return [path]
    files = [file for file in sorted(path.glob("*.safetensors")) if file.name != MONITOR_FILE]
    if not files:
        raise ProfileError(f"there is no profile (*.safetensors) in {path}")
    return files


def describe_edit(edit: Edit) -> dict[str, Any]:
    """An edit in JSON, without its numbers."""
    gate = edit.gate
    return {
        "site": str(edit.site),
        "rank": edit.rank,
        "shift": edit.has_shift,
        "phase": edit.phase,
        "gate": gate and {"site": str(gate.site), "reduce": gate.reduce, "kind": gate.comparator},
    }


def finite(value: Any) -> Any:
    """A copy with null for numbers that JSON has no word for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def _there_is(names: Iterable[str]) -> str:
    listed = ", ".join(names)
    return f" There is {listed}." if listed else ""


def _short(name: str) -> str:
    return name if len(name) <= 100 else name[:100] + "..."
