"""What the methods' hyper-parameters have in common, checked before anything is computed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, get_args

from steering.edit import Phase


def check_hyper_parameters(method: Any, *axes: str) -> None:
    """Check what can be checked without a model, by field name; for a method's `__post_init__`.

    Args:
        method: a dataclass.
        axes: its fields that hold one value or several to try; they become tuples.

    Raises ValueError for an axis without values, a number that is not finite, a count below 1, a
    depth range that is none, an unknown phase, and a strength or block below its range.
    """
    for axis in axes:
        object.__setattr__(method, axis, as_tuple(getattr(method, axis)))
        if not getattr(method, axis):
            raise ValueError(f"{axis} needs at least one value")
    for field in dataclasses.fields(method):
        name, value = field.name, getattr(method, field.name)
        check_finite(name, value)
        if (name == "candidates" or name.endswith("_per_kind")) and value < 1:
            raise ValueError(f"{name} is at least 1; got {value}")
        if name in ("depth", "condition_depth"):
            check_depth(*value)
        if name == "phases" and not set(value) <= set(get_args(Phase)):
            raise ValueError(f"phases are of {', '.join(get_args(Phase))}; got {value}")
        if name == "strengths" and min(value) <= 0:
            raise ValueError(f"strengths are above 0; got {value}")
        if name in ("blocks", "condition_blocks") and value is not None:
            ordered = sorted(set(value))
            if not ordered or len(ordered) < len(value) or ordered[0] < 0:
                raise ValueError(f"{name} are distinct and count from 0; got {list(value)}")


def check_finite(name: str, value: Any) -> None:
    """Raise ValueError if a value, or one inside a tuple, is no finite number."""
    if not all(map(math.isfinite, _numbers(value))):
        raise ValueError(f"{name} holds a number that is not finite: {value}")


def check_depth(low: float, high: float) -> None:
    """Raise ValueError unless these are two shares of the depth in order."""
    if not 0 <= low <= high <= 1:
        raise ValueError(
            f"a depth range is two shares in order, from 0 to 1; got {low:g}, {high:g}"
        )


def as_tuple(value: Any) -> tuple[Any, ...]:
    """A hyper-parameter that may hold several values, given as one or as several."""
    if isinstance(value, tuple):
        return value
    return tuple(value) if isinstance(value, list) else (value,)


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, int | float):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _numbers(item)
