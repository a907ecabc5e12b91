"""Per-token traces: what a forward call that chooses a token has to read for it, and reads.

Only rows of requests that ask for a trace are looked at, so that a call without any does nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from server.engine.base import TokenTrace
from server.engine.rows import Row
from steering.edit import Site
from steering.monitor import Probe
from steering.plan import Step


def any_traced(rows: Iterable[Row]) -> bool:
    return any(row.request.trace for row in rows)


def traced_sites(rows: Iterable[Row]) -> set[Site]:
    """Sites to capture for the traces of rows that choose a token next."""
    return {probe.site for row in rows for probe in row.trace_probes if probe is not None}


def read_traces(rows: Sequence[Row], step: Step, indices: Sequence[int]) -> list[TokenTrace | None]:
    """The trace of each row's next token, None for rows that want none.

    Args:
        step: the call, which captured `traced_sites` and measured the edits if a row is traced.
        indices: of the rows in that call.
    """
    traced = [k for k, row in enumerate(rows) if row.request.trace]
    if not traced:
        return [None] * len(rows)
    wanted = [row.trace_probes for row in rows]
    read: dict[tuple[int, Probe], float] = {}
    # A call per probe and not per row: each waits for the device.
    for probe in {probe for k in traced for probe in wanted[k] if probe is not None}:
        asking = [k for k in traced if probe in wanted[k]]
        states = step.captured[probe.site][[indices[k] for k in asking]]
        for k, value in zip(asking, probe.probability(states).tolist(), strict=True):
            read[k, probe] = value
    assert step.edit_norm is not None
    norms = step.edit_norm.tolist()
    traces: list[TokenTrace | None] = [None] * len(rows)
    for k in traced:
        answer, benign = (None if p is None else read[k, p] for p in wanted[k])
        traces[k] = TokenTrace(answer, benign, norms[indices[k]])
    return traces
