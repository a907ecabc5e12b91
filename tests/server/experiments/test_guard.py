"""Guard-rails: late enough to be sure, and no later."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from server.experiments.definitions import GuardRail
from server.experiments.guard import Fired, Guard, Watch
from server.experiments.sequential import rate_bounds, running_mean
from tests.server.experiments.samples import answer, experiment, traffic

RAIL = GuardRail(metric="over_refusal", limit=0.2, minimum=50)


def first_firing(rates: list[float], rail: GuardRail = RAIL) -> tuple[int, Fired] | None:
    guard = Guard(experiment(guard_rails=(rail,)))
    for i, record in enumerate(traffic(rates, 3000)):
        if fired := guard.feed(record):
            return i, fired[0]
    return None


def test_an_arm_above_the_limit_is_stopped_once() -> None:
    guard = Guard(experiment(guard_rails=(RAIL,)))
    fired = [found for record in traffic([0.1, 0.4], 3000) for found in guard.feed(record)]
    assert [found.arm for found in fired] == ["a"]
    assert fired[0].low > 0.2 and fired[0].n < 500


def test_control_is_never_stopped_nor_an_arm_below_the_limit() -> None:
    assert first_firing([0.9, 0.15]) is None


def test_it_waits_for_the_minimum() -> None:
    rail = RAIL.model_copy(update={"minimum": 400})
    soon, late = first_firing([0.1, 0.9]), first_firing([0.1, 0.9], rail)
    assert soon is not None and late is not None
    assert soon[1].n == 50 and late[1].n == 400


@pytest.mark.parametrize("limit", [0.02, 0.2, 0.9])
def test_a_rate_at_the_limit_seldom_sets_it_off(limit: float) -> None:
    rng, fired, runs = np.random.default_rng(0), 0, 200
    for _ in range(runs):
        watch = Watch.make(GuardRail(metric="refusal", limit=limit, minimum=20), 0.05)
        for i, value in enumerate(rng.random(600) < limit):
            watch.add(str(i), float(value))
            if value and watch.fires:  # the bound rises with refusals only
                fired += 1
                break
    assert fired / runs <= 0.05


def test_one_user_cannot_stop_an_arm() -> None:
    guard = Guard(experiment(guard_rails=(RAIL,)))
    others = [answer(i, "a") for i in range(100)]
    one = [answer(1000 + i, "a", "refusal", unit="angry") for i in range(500)]
    assert not [found for record in (*others, *one) for found in guard.feed(record)]


def test_shadows_other_versions_and_unjudged_answers_do_not_count() -> None:
    guard = Guard(experiment(guard_rails=(RAIL,)))
    for i in range(300):
        record = answer(i, "a", "refusal")
        for ignored in (
            dataclasses.replace(record, kind="shadow"),
            dataclasses.replace(record, version=2),
            dataclasses.replace(record, outcome=None),
            dataclasses.replace(record, prompt_class="harmful"),
        ):
            assert not guard.feed(ignored)


def test_it_counts_as_the_report_does() -> None:
    rng = np.random.default_rng(0)
    values, units = (rng.random(200) < 0.3).astype(float), rng.integers(0, 40, 200)
    watch = Watch.make(RAIL, 0.05)
    for value, unit in zip(values, units, strict=True):
        watch.add(str(unit), value)
    found = running_mean(values, units, extremes=(0, 1))
    factor = watch.boundary.factor(found.n)
    wilson, _ = rate_bounds(found.mean, found.se, found.n, factor)
    plain = found.mean - factor * found.se
    assert watch.low == pytest.approx(min(wilson[-1], plain[-1]))
