"""Which profile answers a request, where experiments have a say.

    model                       steering            answered by
    name:profile, or any        profile, profiles   that profile; no exposure
    name@experiment             none                the unit's arm
    name                        none                the unit's arm of the default experiment,
                                                    else the default profile
    name@experiment             strength, phase     400: arms have their own

An experiment that has not begun or is over answers nobody: the default profile does. Units outside
the coverage are answered as without the experiment. The control answers, without an exposure, in
place of an arm that was stopped, and for callers and prompts for which not every arm may or can
answer: else the arms would differ in whom they see.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from server.access import Access, Caller
from server.composition import Composition, compose
from server.errors import InvalidRequestError, NotFoundError
from server.experiments.assignment import UnitFields, assign, find_unit, hashed
from server.experiments.definitions import Arm, Experiment
from server.experiments.registry import Entry, Registry, unknown_experiment
from server.profiles import ProfileStore
from server.protocol import SteeringChoice


@dataclass(frozen=True)
class Exposure:
    """One unit that meets one arm.

    Args:
        unit: its hash.
        others: what the other arms would answer with, by their names.
        control: what answers if this comes to nothing.
    """

    experiment: Experiment
    arm: Arm
    unit: str
    sticky: bool
    others: Mapping[str, Composition]
    control: Composition


@dataclass(frozen=True)
class Visit:
    """What a request says of who asks.

    Args:
        id: that the server gave the request.
    """

    id: str
    body: UnitFields
    headers: Mapping[str, str]


def experiment_named(profiles: ProfileStore, model: str) -> str | None:
    """What follows `<served name>@`, if `model` is of that form."""
    rest = model.removeprefix(profiles.served_name)
    return rest[1:] if rest != model and rest.startswith("@") else None


def visible(experiment: Experiment, profiles: ProfileStore) -> bool:
    """True if the caller, who sees these profiles, may use every arm."""
    return all(arm.profile in profiles.names for arm in experiment.arms)


def as_seen(entry: Entry, caller: Caller, profiles: ProfileStore) -> Entry | None:
    """What there is of an experiment for a caller, who learns nothing of a version with an arm
    that they may not use; None where the latest one is such. The local user sees all, those whose
    profiles have gone too.

    Args:
        profiles: all that are served.
    """
    if caller.local:
        return entry
    mine = caller.sees(profiles)
    if not visible(entry.experiment, mine):
        return None
    return replace(entry, past=tuple(each for each in entry.past if visible(each, mine)))


def enterable(entry: Entry, profiles: ProfileStore) -> bool:
    """True if the caller may be answered by the control, and so ask for the experiment."""
    return entry.experiment.control.profile in profiles.names


def choose(
    registry: Registry,
    access: Access,
    caller: Caller,
    model: str,
    steering: SteeringChoice | None,
    visit: Visit | None,
) -> tuple[Composition, Exposure | None]:
    """Who answers, and as which arm of what.

    Args:
        visit: None for requests that take no part in experiments.

    Raises ApiError.
    """
    profiles = caller.sees(registry.profiles)
    named = experiment_named(profiles, model)
    if named is not None:
        entry = find_enterable(registry, profiles, named)
        model = profiles.served_name
    if steering is not None and (steering.profile is not None or steering.profiles is not None):
        return compose(profiles, model, steering), None
    if named is None:
        found = _default(registry, profiles, model)
        if found is None or visit is None:
            return compose(profiles, model, steering), None
        entry = found
    elif visit is None:
        raise InvalidRequestError(
            "An experiment answers requests and does nothing else with them; name a profile here.",
            param="model",
        )
    if registry.status(entry) != "running":
        return compose(profiles, model, steering), None
    experiment = entry.experiment
    for name in ("strength", "phase"):
        if steering is not None and getattr(steering, name) is not None:
            raise InvalidRequestError(
                f"'steering.{name}' cannot be set where an experiment chooses the profile; name a "
                "profile too, or leave it out.",
                param=f"steering.{name}",
            )
    unit = find_unit(experiment, visit.body, visit.headers, key=caller.id, request=visit.id)
    arm = assign(experiment, unit.id)
    if arm is None:
        return compose(profiles, model, None), None
    control = _composition(profiles, experiment.control)
    open_arms = [a for a in experiment.arms if a.name not in entry.stopped]
    everywhere = visible(experiment, profiles) and all(
        _red_team_allowed(registry, access, experiment, a) for a in experiment.arms
    )
    if arm not in open_arms or not everywhere:
        return control, None
    by_arm = {a.name: _composition(profiles, a) for a in open_arms}
    chosen = by_arm.pop(arm.name)
    hash = hashed(experiment, unit.id)
    return chosen, Exposure(experiment, arm, hash, unit.sticky, by_arm, control)


def find_enterable(registry: Registry, profiles: ProfileStore, name: str) -> Entry:
    """The experiment that `model` names. Raises NotFoundError, also where it exists for others."""
    try:
        entry = registry.find(name, param="model")
    except NotFoundError:
        entry = None
    if entry is None or not enterable(entry, profiles):
        raise unknown_experiment(name, "model")
    return entry


def _default(registry: Registry, profiles: ProfileStore, model: str) -> Entry | None:
    """The default experiment, for requests that name nothing else."""
    if registry.default is None or profiles.named_by(model) is not None:
        return None
    entry = registry.find(registry.default)
    return entry if enterable(entry, profiles) else None


def _composition(profiles: ProfileStore, arm: Arm) -> Composition:
    own = None
    if arm.strength is not None:
        own = SteeringChoice.model_validate({"strength": arm.strength})
    return compose(profiles, f"{profiles.served_name}:{arm.profile}", own)


def _red_team_allowed(registry: Registry, access: Access, experiment: Experiment, arm: Arm) -> bool:
    """A red-team arm needs a creator who still names its profile, whoever asks."""
    profile = registry.profiles.resolve(arm.profile)
    if not profile.red_team:
        return True
    if not experiment.creator:
        return registry.allow_red_team
    creator = next((key for key in access.keys or () if key.id == experiment.creator), None)
    return creator is not None and creator.permits((profile,))
