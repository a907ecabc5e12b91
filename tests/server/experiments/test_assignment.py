"""Units fall into arms uniformly, independently across salts, and stay when coverage grows."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from scipy.stats import chi2_contingency, chisquare

from server.experiments.assignment import Unit, assign, find_unit, fraction, hashed, sampled
from server.experiments.definitions import Arm, Experiment
from server.protocol import ChatRequest

UNITS = [f"user-{i}" for i in range(100_000)]


def experiment(**changes: Any) -> Experiment:
    arms = (Arm(name="control", profile="raw"), Arm(name="bold", profile="bold"))
    return Experiment(**{"name": "e", "arms": arms, **changes})


def weighted(*weights: float) -> tuple[Arm, ...]:
    return tuple(Arm(name=f"a{i}", profile="raw", weight=w) for i, w in enumerate(weights))


def arm_names(e: Experiment) -> list[str | None]:
    arms = [assign(e, unit) for unit in UNITS]
    return [None if arm is None else arm.name for arm in arms]


@pytest.mark.parametrize("weights", [(1, 1), (1, 2, 3, 4), (0.9, 0.05, 0.05)])
def test_100_000_units_fall_into_arms_as_their_weights_say(weights: tuple[float, ...]) -> None:
    e = experiment(arms=weighted(*weights))
    counts = Counter(arm_names(e))
    expected = [share * len(UNITS) for share in e.shares]
    assert chisquare([counts[arm.name] for arm in e.arms], expected).pvalue > 0.001


def test_the_hash_is_uniform() -> None:
    e = experiment()
    counts = Counter(int(100 * fraction(e, unit)) for unit in UNITS)
    assert chisquare([counts[i] for i in range(100)]).pvalue > 0.001


@pytest.mark.parametrize("other", [experiment(salt="other"), experiment(name="f")])
def test_experiments_with_other_salts_or_names_are_independent(other: Experiment) -> None:
    table = Counter(zip(arm_names(experiment()), arm_names(other), strict=True))
    rows = [[table[a, b] for b in ("control", "bold")] for a in ("control", "bold")]
    assert chi2_contingency(rows).pvalue > 0.001


def test_ramping_up_moves_nobody() -> None:
    before: list[str | None] = [None] * len(UNITS)
    for step, coverage in enumerate((0.01, 0.1, 0.5, 0.9, 1.0)):
        after = arm_names(experiment(version=step + 1, coverage=coverage, arms=weighted(1, 2, 1)))
        moved = [1 for b, a in zip(before, after, strict=True) if b is not None and a != b]
        assert not moved
        share = sum(a is not None for a in after) / len(UNITS)
        assert share == pytest.approx(coverage, abs=0.01)
        before = after
    assert None not in before


def test_a_known_assignment_never_changes() -> None:
    """Another program, or the next release, must agree."""
    e = experiment(salt="s")
    # From `printf e:s:alice | sha256sum`.
    assert fraction(e, "alice") == (0x503A6C2E0663893B >> 11) / 2**53


def test_shadows_are_sampled_by_request_whatever_the_arm() -> None:
    e = experiment()
    chosen = [sampled(e, unit, 0.2) for unit in UNITS]
    assert sum(chosen) / len(UNITS) == pytest.approx(0.2, abs=0.005)
    assert not any(sampled(e, unit, 0.0) for unit in UNITS)
    assert all(sampled(e, unit, 1.0) for unit in UNITS[:1000])


def test_units_are_stored_hashed_and_keyed_by_the_salt() -> None:
    stored = hashed(experiment(salt="a"), "alice")
    assert len(stored) == 32 and "alice" not in stored
    assert stored == hashed(experiment(salt="a", version=7), "alice")
    assert stored != hashed(experiment(salt="b"), "alice")
    assert hashed(experiment(), "\ud800") != hashed(experiment(), "\ud801")


def request(**fields: Any) -> ChatRequest:
    return ChatRequest.model_validate(
        {"model": "m", "messages": [{"role": "user", "content": "Hi"}], **fields}
    )


@pytest.mark.parametrize(
    ("sources", "fields", "headers", "found"),
    [
        (("user", "key"), {"user": "u"}, {}, Unit("u")),
        (("user", "key"), {}, {}, Unit("k")),
        (("safety_identifier", "user"), {"user": "u", "safety_identifier": "s"}, {}, Unit("s")),
        (("metadata.a.b",), {"metadata": {"a.b": "m"}}, {}, Unit("m")),
        (("header:X-Unit",), {}, {"X-Unit": "h"}, Unit("h")),
        (("user",), {"user": ""}, {}, Unit("r", sticky=False)),
        (("request", "user"), {"user": "u"}, {}, Unit("r", sticky=False)),
    ],
)
def test_the_unit_is_the_first_source_that_the_request_sets(
    sources: tuple[str, ...], fields: dict[str, Any], headers: dict[str, str], found: Unit
) -> None:
    e = experiment(unit=sources)
    assert find_unit(e, request(**fields), headers, key="k", request="r") == found
