"""Compare arms fairly on a busy machine: interleave them, and take medians of paired ratios."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Paired:
    """Times of each arm by round; round `i` of every arm ran side by side.

    Args:
        seconds: what arms are compared by. Processor seconds of the whole process: with one thread
            and nothing to wait for they are the wall clock of an idle machine, whatever else runs
            on this one. After `by_wall`, the wall clock.
    """

    seconds: Mapping[str, list[float]]
    wall: Mapping[str, list[float]]

    def median(self, arm: str) -> float:
        return statistics.median(self.seconds[arm])

    def speeds(self, arm: str, baseline: str) -> list[float]:
        """How many times as fast as the baseline the arm was, by round, sorted."""
        pairs = zip(self.seconds[baseline], self.seconds[arm], strict=True)
        return sorted(b / a for b, a in pairs)

    def by_wall(self) -> Paired:
        """Compared by wall clock, where part of the work is done in other processes."""
        return Paired(self.wall, self.wall)

    def wall_speed(self, arm: str, baseline: str) -> float:
        pairs = zip(self.wall[baseline], self.wall[arm], strict=True)
        return statistics.median(b / a for b, a in pairs)


def measure(
    arms: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    warmup: int = 1,
) -> Paired:
    """Time every arm in every round. The order turns, so that no arm always comes first."""
    names = list(arms)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    wall: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    for i in range(-warmup, rounds):
        shift = i % len(names)
        for name in names[shift:] + names[:shift]:
            start, start_wall = time.process_time(), time.perf_counter()
            arms[name]()
            if i >= 0:
                seconds[name].append(time.process_time() - start)
                wall[name].append(time.perf_counter() - start_wall)
    return Paired(seconds, wall)


class Table:
    """Results, printed as they come."""

    def __init__(self) -> None:
        self.note(f"{'':66} speed  [quartiles]     wall    time                 rounds")

    def add(
        self, what: str, paired: Paired, arm: str, baseline: str, target: float | None = None
    ) -> None:
        speeds = paired.speeds(arm, baseline)
        ratio, quarter = statistics.median(speeds), len(speeds) // 4
        verdict = ""
        if target is not None:
            verdict = f"target {target:.2f} {'met' if ratio >= target else 'MISSED'}"
        self.note(
            f"{what:64} {ratio:6.3f}x  [{speeds[quarter]:.3f}, {speeds[-1 - quarter]:.3f}]  "
            f"{paired.wall_speed(arm, baseline):6.3f}x  {1000 * paired.median(arm):7.0f} ms vs "
            f"{1000 * paired.median(baseline):7.0f} ms  n={len(speeds)}  {verdict}"
        )

    def note(self, line: str) -> None:
        print(line, flush=True)
