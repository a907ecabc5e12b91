"""A report: what an experiment has shown so far, as it is told. `report_making` finds it out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from server.experiments.analysis import Score
from server.experiments.definitions import Experiment, Metric
from server.experiments.records import EventRecord
from server.experiments.verdict import Decision

if TYPE_CHECKING:
    from server.experiments.report_plots import Plot


@dataclass(frozen=True)
class Interval:
    """A figure and its confidence sequence's latest interval; None where there is none yet.

    Args:
        n, units: judged answers (or pairs), and units that they are of.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    units: int


@dataclass(frozen=True)
class Bounds:
    """A figure that was corrected for the judge's errors."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Look:
    """One look at a difference, for plots."""

    time: float
    n: int
    units: int
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Latency:
    """Seconds of exposures that were answered; None of none."""

    ttft_median: float | None
    ttft_p95: float | None
    duration_median: float | None
    duration_p95: float | None


@dataclass(frozen=True)
class ArmReport:
    """One arm.

    Args:
        units: with a name, that were exposed.
        answers: exposures of those units; `unjudged` of them have no outcome.
        rates, scores: of those units.
        corrected: rates, corrected for the judge's errors, where they can be.
        unsticky: rates of requests without a unit, as if each came from somebody else.
        unsticky_answers: how many there are.
    """

    name: str
    profile: str
    strength: float | None
    control: bool
    expected_share: float
    stopped: float | None
    units: int
    answers: int
    unjudged: int
    rates: Mapping[Metric, Interval]
    corrected: Mapping[Metric, Bounds]
    scores: Mapping[Score, Interval]
    latency: Latency
    unsticky_answers: int
    unsticky: Mapping[Metric, Interval]


@dataclass(frozen=True)
class McNemarReport:
    """McNemar's exact test at the declared end, on the first pair of each unit."""

    control_only: int
    arm_only: int
    p: float
    holm_p: float


@dataclass(frozen=True)
class Comparison:
    """One arm less control, of different units (`exposures`) or on the same prompts (`shadows`).

    Args:
        differences: of rates and mean scores, as the judge saw them, and of mean latencies.
        corrected: of rates, where each profile has its own figures of the judge's errors.
        p: of the experiment's metric against zero, anytime-valid; `holm_p` adjusted for the arms.
        looks: at the experiment's metric, over time.
    """

    arm: str
    differences: Mapping[str, Interval]
    corrected: Mapping[Metric, Bounds]
    p: float
    holm_p: float
    decision: Decision
    looks: Sequence[Look]
    mcnemar: McNemarReport | None = None


@dataclass(frozen=True)
class SampleRatio:
    """Are units spread over the arms as the weights say? Below `alpha` no verdict stands."""

    p: float
    alpha: float
    expected: Mapping[str, float]
    units: Mapping[str, int]

    @property
    def mismatch(self) -> bool:
        return self.p <= self.alpha


@dataclass(frozen=True)
class Report:
    """What is known about one version of an experiment.

    Args:
        time: of the report, seconds since 1970.
        ended: the declared end has passed.
        left_out: records that do not count, by reason.
        warnings: what a reader must know.
        shadows: comparisons on the same prompts, of arms that have pairs.
    """

    experiment: Experiment
    time: float
    ended: bool
    sample_ratio: SampleRatio
    arms: Sequence[ArmReport]
    comparisons: Sequence[Comparison]
    shadows: Sequence[Comparison]
    left_out: Mapping[str, int]
    events: Sequence[EventRecord]
    warnings: Sequence[str]

    def to_json(self) -> dict[str, Any]:
        """Plain values; what is not finite is None."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        found = {name: _plain(value) for name, value in fields.items()}
        found["sample_ratio"]["mismatch"] = self.sample_ratio.mismatch
        return found

    def to_text(self) -> str:
        from server.experiments.report_text import lines

        return "\n".join(lines(self)) + "\n"

    def to_html(self) -> str:
        """One page that needs nothing else, with the plots in it."""
        from server.experiments.report_page import page

        return page(self)

    def plots(self) -> list[Plot]:
        """As PNG; none without matplotlib (extra `eval`)."""
        if find_spec("matplotlib") is None:
            return []
        from server.experiments.report_plots import draw

        return draw(self)


def _plain(value: Any) -> Any:
    if isinstance(value, Experiment):
        return value.model_dump(mode="json")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def when(seconds: float) -> str:
    """A time for people."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
