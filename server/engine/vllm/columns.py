"""Which columns hold which edit, while profiles come and go."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from server.engine.base import RankLimitError
from server.engine.vllm.layout import Layout, gate_identity
from steering.edit import Edit, Gate, Site


@dataclass(eq=False)
class PlacedGate:
    """A gate and where it is read: the `index`-th at its site, with a column of its own.

    Args:
        number: never given twice, as an edit's.
    """

    gate: Gate
    number: int
    index: int
    column: int
    users: int = 0


@dataclass(eq=False)
class PlacedEdit:
    """A registered edit and where it is.

    Args:
        edit: as it was registered; requests may ask for it in another phase.
        number: never given twice, so that nothing kept under one can be mistaken for another's.
        columns: one per rank, and one for a shift.
        requests: under way that use it.
        wanted: whether a profile needs it.
    """

    edit: Edit
    number: int
    columns: tuple[int, ...]
    gate: PlacedGate | None
    requests: int = 0
    wanted: bool = True


@dataclass
class _SitePlaces:
    free: set[int]
    gates: dict[object, PlacedGate] = field(default_factory=dict)
    gate_numbers: set[int] = field(default_factory=set)


class Columns:
    """Places edits and takes them out again. Not safe for threads.

    Edits are known by the identity of their tensors, which variants of one in other phases share.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._sites = {
            site: _SitePlaces(set(range(layout.columns)), gate_numbers=set(range(gates)))
            for site, gates in layout.edits.items()
        }
        self._placed: dict[object, PlacedEdit] = {}
        self._next = 1
        self.removed: list[int] = []
        """Numbers of edits that the workers need not remember; whoever tells them empties it."""

    def find(self, edit: Edit) -> PlacedEdit | None:
        return self._placed.get(_identity(edit))

    def place(self, edits: Iterable[Edit]) -> list[PlacedEdit]:
        """Find room for those of these edits that have none, all or none of them, and return
        them. Raises RankLimitError."""
        new: list[PlacedEdit] = []
        try:
            for edit in edits:
                if (known := self.find(edit)) is not None:
                    known.wanted = True
                elif edit.rank + edit.has_shift:  # else it changes nothing
                    new.append(self._place(edit))
        except RankLimitError:
            self.take_out(new)
            raise
        return new

    def take_out(self, placed: Sequence[PlacedEdit]) -> None:
        """Undo `place`; no request may use them."""
        for one in placed:
            self._remove(one)

    def keep_only(self, edits: Iterable[Edit]) -> None:
        """Free what holds other edits, each when no request uses it any more."""
        wanted = {_identity(edit) for edit in edits}
        for identity, placed in self._placed.items():
            placed.wanted = identity in wanted
        self._sweep()

    def use(self, placed: Sequence[PlacedEdit]) -> None:
        for one in placed:
            one.requests += 1

    def release(self, placed: Sequence[PlacedEdit]) -> None:
        for one in placed:
            one.requests -= 1
        self._sweep()

    def _sweep(self) -> None:
        for placed in [p for p in self._placed.values() if not (p.wanted or p.requests)]:
            self._remove(placed)

    def _place(self, edit: Edit) -> PlacedEdit:
        gate = None if edit.gate is None else self._place_gate(edit.gate)
        try:
            columns = self._take(edit.site, edit.rank + edit.has_shift)
        except RankLimitError:
            self._drop_gate(gate)
            raise
        placed = PlacedEdit(edit, self._number(), columns, gate)
        self._placed[_identity(edit)] = placed
        return placed

    def _number(self) -> int:
        number, self._next = self._next, self._next + 1
        return number

    def _remove(self, placed: PlacedEdit) -> None:
        del self._placed[_identity(placed.edit)]
        self.removed.append(placed.number)
        self._sites[str(placed.edit.site)].free.update(placed.columns)
        self._drop_gate(placed.gate)

    def _place_gate(self, gate: Gate) -> PlacedGate:
        """Edits with equal gates share one."""
        places, identity = self._site(gate.site), gate_identity(gate)
        if identity not in places.gates:
            if not places.gate_numbers:
                raise RankLimitError(
                    f"there is no room for another gate at {gate.site}; start the server with this "
                    f"profile, or with --steer-site {gate.site}"
                )
            [column] = self._take(gate.site, 1)
            index = min(places.gate_numbers)
            places.gate_numbers.remove(index)
            places.gates[identity] = PlacedGate(gate, self._number(), index, column)
        placed = places.gates[identity]
        placed.users += 1
        return placed

    def _drop_gate(self, placed: PlacedGate | None) -> None:
        if placed is None:
            return
        placed.users -= 1
        if not placed.users:
            places = self._sites[str(placed.gate.site)]
            del places.gates[gate_identity(placed.gate)]
            places.gate_numbers.add(placed.index)
            places.free.add(placed.column)

    def _site(self, site: Site) -> _SitePlaces:
        try:
            return self._sites[str(site)]
        except KeyError:
            raise RankLimitError(
                f"vLLM was started without columns at {site}; start the server with this profile, "
                f"or with --steer-site {site}"
            ) from None

    def _take(self, site: Site, width: int) -> tuple[int, ...]:
        free = self._site(site).free
        if width > len(free):
            raise RankLimitError(
                f"{width} more columns are needed at {site}, where {len(free)} of "
                f"{self.layout.columns} are free: serve fewer profiles, or start the server with a "
                "larger --max-site-rank"
            )
        columns = tuple(sorted(free)[:width])
        free.difference_update(columns)
        return columns


def _identity(edit: Edit) -> object:
    # The tensors are kept alive by whoever keeps this.
    tensors = (edit.read, edit.write, edit.shift, edit.gate)
    return (edit.site, edit.skip_first_token, *map(id, tensors))
