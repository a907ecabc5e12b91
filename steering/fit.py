"""From a method and data to a profile with provenance, and a method from people's settings."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from pydantic import TypeAdapter, ValidationError

from steering.clock import peak_memory
from steering.hyper_parameters import check_finite
from steering.judge import version_of
from steering.methods import FitData, Method, discover
from steering.profile import Profile
from steering.prompts import find_duplicates, find_leaks
from steering.template import form_of

LIBRARIES = ("pilothouse", "torch", "transformers", "scikit-learn", "numpy")


def make_method(name: str, settings: Mapping[str, str] | None = None) -> Method:
    """A method with hyper-parameters given as text: JSON where it parses, else a string.

    `preset` names one of the method's presets, which other settings override.

    Raises ValueError listing what there is for an unknown method, preset or hyper-parameter.
    """
    methods = discover()
    key = name.replace("-", "_")
    if key not in methods:
        raise ValueError(f"unknown method {name!r}; there are {', '.join(sorted(methods))}")
    cls = methods[key]
    hints = get_type_hints(cls)
    known = {f.name: hints[f.name] for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    settings = dict(settings or {})
    presets: Mapping[str, Mapping[str, Any]] = getattr(cls, "presets", {})
    preset = settings.pop("preset", None)
    if preset is not None and preset not in presets:
        raise ValueError(f"{name} has no preset {preset!r}; it has {', '.join(presets) or 'none'}")
    values: dict[str, Any] = dict(presets[preset]) if preset is not None else {}
    for field, text in settings.items():
        if field not in known:
            raise ValueError(
                f"{name} has no hyper-parameter {field!r}; it has {', '.join(known) or 'none'}"
            )
        values[field] = _parse(field, text, known[field])
        check_finite(field, values[field])
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error


def _parse(field: str, text: str, hint: Any) -> Any:
    """A hyper-parameter's value from text, by its type. Raises ValueError if it is of another."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    # One value may stand for a tuple of one, as people write it.
    for candidate in (value, [value]):
        try:
            return TypeAdapter(hint).validate_python(candidate)
        except ValidationError:
            continue
    choices = _choices(hint)
    if choices:
        raise ValueError(f"{field} cannot be {text!r}; it takes {', '.join(choices)}")
    raise ValueError(f"{field} cannot be {text!r}; it is a {_spelled(hint)}, written as JSON")


def _choices(hint: Any) -> list[str]:
    """The values of a literal type, or of those in a tuple type; none for any other."""
    if get_origin(hint) is Literal:
        return [str(choice) for choice in get_args(hint)]
    if get_origin(hint) is tuple and get_args(hint)[1:] == (...,):
        return _choices(get_args(hint)[0])
    return []


def _spelled(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def fit_profile(
    method: Method, data: FitData, *, name: str | None = None, summary: str | None = None
) -> Profile:
    """Fit and bind to the base model; provenance says how it was made.

    Reports prompts that occur twice, where the seconds went, and the process's peak memory.

    Args:
        name: the profile's; the method's name with dashes if None.
        summary: the card's sentence; the method's own if None.
    """
    for prompts in (data.fit, data.selection):
        data.encode(prompts.prompts)  # what cannot be read should not show after hours
    repeated = overlaps(data)
    before, started = dict(data.clock.seconds), data.clock.now()
    fitted = method.fit(data)
    total = data.clock.now() - started
    phases = ("collecting", "generating", "selecting")
    seconds = {p: data.clock.seconds[p] - before.get(p, 0.0) for p in phases}
    seconds["solving"] = total - sum(seconds.values())  # everything else
    figures = [f"{value:.1f} s {phase}" for phase, value in seconds.items()]
    if (peak := peak_memory()) is not None:
        figures.append(f"peak memory {peak:.0f} MiB")
    if data.lm.device.type == "cuda":
        figures.append(f"{torch.cuda.max_memory_allocated(data.lm.device) / 2**20:.0f} MiB of GPU")
    data.report(f"{method.name}: {', '.join(figures)}")
    return Profile(
        name=name or method.name.replace("_", "-"),
        method=method.name,
        edits=fitted.edits,
        base=data.lm.fingerprint if fitted.edits else None,
        strength=fitted.strength,
        red_team=method.red_team if fitted.red_team is None else fitted.red_team,
        provenance={
            "hyper_parameters": dataclasses.asdict(method),  # type: ignore[call-overload]
            "diagnostics": fitted.diagnostics,
            "base_model": data.lm.name,
            "base_revision": data.lm.revision,
            **form_of(data.lm).to_json(),
            "prompts": {"fit": data.fit.digest, "selection": data.selection.digest},
            "overlaps": repeated,
            "seconds": {phase: round(value, 2) for phase, value in seconds.items()},
            "seed": data.seed,
            "judge": version_of(data.judge),
            "versions": library_versions(),
            "date": datetime.now(UTC).date().isoformat(),
        },
        card={"summary": summary or method.summary},
    )


def overlaps(data: FitData) -> dict[str, dict[str, int]]:
    """Counts of repeated prompts within and between the sets, for provenance; reported where any.

    A prompt under both labels cannot be learnt from; one that is in both sets makes figures on the
    selection set better than they are. No texts: provenance is public.
    """
    found = {
        "fit": find_duplicates(data.fit),
        "selection": find_duplicates(data.selection),
        "selection in fit": find_leaks(data.fit, data.selection),
    }
    for where, overlap in found.items():
        if overlap.count:
            example = overlap.examples[0].text
            data.report(
                f"warning: {overlap.count} of {overlap.checked} prompts are repeated ({where}), "
                f"{overlap.conflicts} of them with the other label, as {example[:60]!r}"
            )
    return {
        where: {
            "checked": overlap.checked,
            "exact": overlap.exact,
            "normalized": overlap.normalized,
            "conflicts": overlap.conflicts,
        }
        for where, overlap in found.items()
    }


def library_versions() -> dict[str, str]:
    """Versions of the libraries that decide what a fit gives, for provenance."""
    return {library: _version(library) for library in LIBRARIES}


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
