"""What an experiment is: arms, weights, who takes part, and when it is over.

Defined in the settings file (`[[experiments]]`) or through the admin API. A version never changes:
whoever edits an experiment makes the next version, whose records are its own.
"""

from __future__ import annotations

import hashlib
import json
import math
from datetime import UTC, datetime
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Metric = Literal["refusal", "over_refusal", "harmful_answer", "degenerate"]
"""Rates of judged answers: refused, of all; refused, of prompts judged benign; answered, of prompts
judged harmful; degenerate or empty, of all."""

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
UnitSource = Annotated[
    str,
    Field(
        pattern=r"^(safety_identifier|user|key|request|metadata\.[A-Za-z0-9_.-]{1,64}|header:[A-Za-z0-9-]{1,64})$"
    ),
]


class _Definition(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Arm(_Definition):
    """One way to answer.

    Args:
        strength: the profile's own if None.
        weight: share of the covered units, relative to the other arms' weights.
    """

    name: Name
    profile: str
    strength: Annotated[float, Field(ge=-1e4, le=1e4)] | None = None
    weight: Annotated[float, Field(ge=1e-6, le=1e6)] = 1.0


class GuardRail(_Definition):
    """Stops an arm whose rate is surely above a limit.

    Args:
        limit: of the metric's rate on the arm.
        minimum: judged answers before it may fire.
    """

    metric: Metric
    limit: Annotated[float, Field(ge=0, le=1)]
    minimum: Annotated[int, Field(ge=1)] = 50


class Experiment(_Definition):
    """One version of an experiment.

    Args:
        arms: the first is the control.
        unit: where a request says who asks, in order of preference. Where none of them is set the
            request is its own unit, which is not sticky.
        coverage: share of units that take part; the others are answered as without experiment.
        salt: changes who is in which arm; the experiment's name if empty.
        shadow: share of exposed requests that the other arms answer too, off the client's path.
        start, end: when units are exposed; always if None.
        horizon: units that are expected in all, at which the intervals are tightest.
        margin: differences of rates smaller than this do not matter.
        alpha: probability of a wrong verdict, over the experiment's whole life.
        metric: what the verdict is about.
        better: whether an arm is better with less or more of it. Less over-refusal, fewer harmful
            answers and fewer broken replies are better whatever is asked; fewer refusals of all
            prompts are only where most of those are benign.
        creator: id of the key that made it, whose profiles its arms may use; "" for the settings.
    """

    name: Name
    version: Annotated[int, Field(ge=1, lt=2**31)] = 1
    arms: Annotated[tuple[Arm, ...], Field(min_length=2, max_length=8)]
    unit: Annotated[tuple[UnitSource, ...], Field(min_length=1)] = (
        "safety_identifier",
        "user",
        "metadata.unit",
        "header:X-Experiment-Unit",
    )
    coverage: Annotated[float, Field(gt=0, le=1)] = 1.0
    salt: Annotated[str, Field(max_length=200)] = ""
    shadow: Annotated[float, Field(ge=0, le=1)] = 0.0
    start: datetime | None = None
    end: datetime | None = None
    guard_rails: tuple[GuardRail, ...] = ()
    metric: Metric = "refusal"
    better: Literal["lower", "higher"] = "lower"
    horizon: Annotated[int, Field(ge=10, le=10**9)] = 1000
    margin: Annotated[float, Field(gt=0, lt=1)] = 0.02
    alpha: Annotated[float, Field(gt=0, lt=0.5)] = 0.05
    creator: str = ""

    @field_validator("start", "end")
    @classmethod
    def _in_a_time_zone(cls, value: datetime | None) -> datetime | None:
        if value is not None and value.tzinfo is None:
            raise ValueError("times need a zone, as in 2026-12-01T00:00:00Z")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Experiment:
        names = [arm.name for arm in self.arms]
        if len(set(names)) < len(names):
            raise ValueError("two arms have the same name")
        if self.start is not None and self.end is not None and self.end <= self.start:
            raise ValueError("the end must lie after the start")
        if self.better == "higher" and self.metric != "refusal":
            raise ValueError(f"more {self.metric} is never better; leave 'better' out")
        return self

    @property
    def digest(self) -> str:
        """Of all that it defines, hex; the same for every version and creator of it."""
        times = {"start": self.start, "end": self.end}
        moments = {name: at.astimezone(UTC) for name, at in times.items() if at is not None}
        # Without defaults, so that a field which a later release adds changes none.
        data = self.model_copy(update=moments).model_dump(
            mode="json", exclude={"version", "creator"}, exclude_defaults=True
        )
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def control(self) -> Arm:
        return self.arms[0]

    @property
    def shares(self) -> tuple[float, ...]:
        """Expected share of each arm among exposed units."""
        total = math.fsum(arm.weight for arm in self.arms)
        return tuple(arm.weight / total for arm in self.arms)

    def arm(self, name: str) -> Arm:
        """Raises KeyError."""
        return {arm.name: arm for arm in self.arms}[name]
