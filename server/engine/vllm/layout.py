"""Where edits, gates and probes have their columns: decided here, obeyed by every worker.

The `Layout` is what a compiled graph depends on: which sites are hooked, and how wide. It is fixed
at the start. `Columns` places edits in it and takes them out again while the server runs; a worker
is told places, and decides nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from steering.edit import Edit, Gate, Site
from steering.monitor import Monitor, Probe

PROGRAM_VERSION = 3
"""Raise it with every change of `program.py`: compiled graphs of another one must not be used."""
CONFIG_KEY = "steering"
"""Where the layout is in vLLM's `additional_config`, which is part of its compile cache's key."""
_SPARE_GATES = 8


@dataclass(frozen=True)
class Layout:
    """The hooked sites: all that a compiled graph depends on, but no edit's values. Sites are
    written as in `Site.parse`, in the order of a forward pass.

    Args:
        columns: at every site that can be edited.
        edits: the sites that can be edited, and how many gates can be read at each.
        probes: the sites with probes, and how many.
        slots: rows of coefficients: one of zeros, and three per request that can run, which bounds
            the different edits in one step.
        latches: places that hold a request's gates over its prompt; the first is nobody's.
        refusal_token_ids: the tokens that open a refusal, whose log-odds are the refusal score;
            none without a monitor.
    """

    hidden_size: int
    columns: int
    edits: Mapping[str, int]
    probes: Mapping[str, int]
    slots: int
    latches: int
    refusal_token_ids: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {"version": PROGRAM_VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Layout:
        """Raises ValueError where another version of this package made it."""
        fields = dict(data)
        if (version := fields.pop("version", None)) != PROGRAM_VERSION:
            raise ValueError(
                f"the workers' pilothouse speaks version {PROGRAM_VERSION} of the edits' layout, "
                f"the server's {version}; install the same release everywhere"
            )
        return cls(**{**fields, "refusal_token_ids": tuple(fields["refusal_token_ids"])})

    @cached_property
    def sites(self) -> list[Site]:
        """Every hooked site, in the order of a forward pass."""
        return _ordered(map(Site.parse, {*self.edits, *self.probes}))


def plan_layout(
    edits: Iterable[Edit],
    monitor: Monitor | None,
    *,
    hidden_size: int,
    columns: int,
    more: Collection[Site] = (),
    max_num_seqs: int,
) -> Layout:
    """Columns at the sites that these edits and their gates use, and at `more`."""
    edits = list(edits)
    gates = Counter(site for site, *_ in {gate_identity(e.gate) for e in edits if e.gate})
    used = {e.site for e in edits} | set(gates) | set(more)
    # Where a gate is read there is room for others; elsewhere reading them would cost for nothing.
    room = {s: gates[s] + _SPARE_GATES if gates[s] or s in more else 0 for s in used}
    probes = Counter(p.site for p in probes_of(monitor).values())
    return Layout(
        hidden_size=hidden_size,
        columns=columns,
        edits={str(site): room[site] for site in _ordered(used)},
        probes={str(site): probes[site] for site in _ordered(probes)},
        slots=3 * max_num_seqs + 1,
        # Preempted requests keep theirs.
        latches=4 * max_num_seqs + 1 if any(room.values()) else 1,
        refusal_token_ids=monitor.refusal_token_ids if monitor is not None else (),
    )


def probes_of(monitor: Monitor | None) -> dict[str, Probe]:
    """The monitor's probes by name, in the order in which they are reported: `benign.I`, and
    `answer.FINGERPRINT` of a profile."""
    if monitor is None:
        return {}
    benign = {f"benign.{i}": probe for i, probe in enumerate(monitor.benign)}
    answer = {f"answer.{key}": probe for key, probe in monitor.answer.items()}
    return dict(sorted({**benign, **answer}.items(), key=lambda item: item[1].site.order))


def gate_identity(gate: Gate) -> tuple[Site, str, str, float, bytes]:
    """Equal for gates that always have the same value."""
    direction = gate.direction.numpy().tobytes()
    return gate.site, gate.reduce, gate.comparator, gate.threshold, direction


def _ordered(sites: Iterable[Site]) -> list[Site]:
    return sorted(set(sites), key=lambda site: site.order)
