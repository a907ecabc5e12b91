"""Which arm a unit is in: a hash, so that replicas agree without talking.

    u = first 8 bytes of SHA-256("name:salt:unit") / 2**64,  uniform in [0, 1)

Arm i owns the range that begins where the shares of the arms before it end; with coverage c only
its first part, c times as long, takes part. So raising the coverage brings units in and moves none,
and neither does a new version with the same weights and salt.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Protocol

from server.experiments.definitions import Arm, Experiment


class UnitFields(Protocol):
    """What a request's body says of who asks."""

    @property
    def safety_identifier(self) -> str | None: ...

    @property
    def user(self) -> str | None: ...

    @property
    def metadata(self) -> dict[str, str] | None: ...


@dataclass(frozen=True)
class Unit:
    """Who asks.

    Args:
        sticky: False where the request is its own unit.
    """

    id: str
    sticky: bool = True


def find_unit(
    experiment: Experiment,
    body: UnitFields,
    headers: Mapping[str, str],
    *,
    key: str,
    request: str,
) -> Unit:
    """The first of the experiment's sources that the request sets; empty text is none.

    Args:
        key: id of the caller's key, if any.
        request: id that the server gave the request, which no client can choose.
    """
    for source in experiment.unit:
        if found := _look_up(source, body, headers, key):
            return Unit(found)
        if source == "request":
            break
    return Unit(request, sticky=False)


def _look_up(source: str, body: UnitFields, headers: Mapping[str, str], key: str) -> str | None:
    kind, _, name = source.partition(":")
    if kind == "header":
        return headers.get(name)
    kind, _, name = source.partition(".")
    if kind == "metadata":
        return (body.metadata or {}).get(name)
    return {"safety_identifier": body.safety_identifier, "user": body.user, "key": key}.get(source)


def salt_of(experiment: Experiment) -> str:
    return experiment.salt or experiment.name


def fraction(experiment: Experiment, unit: str) -> float:
    """Where a unit lies in [0, 1); the same in every version with the same salt."""
    digest = sha256(_bytes(f"{experiment.name}:{salt_of(experiment)}:{unit}")).digest()
    # Of 64 bits a float keeps 53, and the largest values would round up to 1.
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def assign(experiment: Experiment, unit: str) -> Arm | None:
    """The arm of a unit, None for one that takes no part."""
    u, start = fraction(experiment, unit), 0.0
    for arm, share in zip(experiment.arms, experiment.shares, strict=True):
        if start <= u < start + share * experiment.coverage:
            return arm
        start += share
    # Rounding may leave a crack of 1e-16 before 1.
    return experiment.arms[-1] if experiment.coverage == 1 else None


def hashed(experiment: Experiment, unit: str) -> str:
    """What is stored of a unit: 32 hex digits, an HMAC keyed by the salt, so that without it
    nobody can look for a known user. Independent of `fraction`."""
    key = _bytes(f"{experiment.name}:{salt_of(experiment)}")
    return hmac.new(key, _bytes(unit), sha256).hexdigest()[:32]


def sampled(experiment: Experiment, request: str, share: float) -> bool:
    """True for this share of requests, the same ones wherever it is asked."""
    digest = sha256(_bytes(f"{experiment.name}:{salt_of(experiment)}:shadow:{request}")).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53 < share


def _bytes(text: str) -> bytes:
    # JSON may hold halves of surrogate pairs, which are no text but fine to hash.
    return text.encode("utf-8", "surrogatepass")
