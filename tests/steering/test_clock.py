from __future__ import annotations

from collections.abc import Iterator

import pytest

from steering.clock import Clock, peak_memory


def test_the_outermost_phase_gets_the_seconds_and_an_error_does_not_stop_the_clock() -> None:
    ticks: Iterator[float] = iter(range(100))
    clock = Clock(lambda: next(ticks))
    with clock.timed("selecting"), clock.timed("generating"):
        pass
    with pytest.raises(RuntimeError), clock.timed("selecting"):
        raise RuntimeError
    with clock.timed("collecting"):
        next(ticks)
    assert clock.seconds == {"selecting": 2, "collecting": 2}


def test_the_peak_of_memory_stays_when_what_was_needed_is_free_again() -> None:
    if peak_memory() is None:
        pytest.skip("this system does not say")
    block = bytearray(b"x") * (64 << 20)
    held = peak_memory()
    del block
    after = peak_memory()
    assert held is not None and after is not None
    assert held > 64 and after > held - 32  # the kernel counts roughly
