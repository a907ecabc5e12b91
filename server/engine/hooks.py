"""Which sites of the model are hooked, while profiles come and go."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from server.engine.rows import Row
from steering.edit import Site
from steering.plan import Steering, sites_of


class Hooks:
    """Keeps the sites hooked that are pinned or that a request in a slot uses.

    Used by the engine's thread alone, between steps, and before that thread starts.
    """

    def __init__(self, steering: Steering) -> None:
        self.steering = steering
        self._ours: set[Site] = set()  # `steering` may be shared
        self._pinned: set[Site] = set()
        self._sweeping = False

    def pin(self, sites: Iterable[Site]) -> None:
        """Hook these sites until told otherwise. Raises ValueError if the model lacks one."""
        wanted = set(sites)
        self._attach(wanted)
        self._pinned |= wanted

    def keep_only(self, sites: Collection[Site]) -> None:
        """Let go all other sites, each when no request uses it any more."""
        self._pinned &= set(sites)
        self._sweeping = True

    def use(self, row: Row) -> None:
        """Hook what a request needs. Raises ValueError if the model lacks it."""
        self._attach(_sites(row))

    def sweep(self, rows: Iterable[Row]) -> None:
        """Unhook what is neither pinned nor used by these rows, once `keep_only` was called."""
        if self._sweeping and not self._ours <= self._pinned:
            unneeded = self._ours.difference(self._pinned, *map(_sites, rows))
            self.steering.detach(unneeded)
            self._ours -= unneeded

    def _attach(self, sites: set[Site]) -> None:
        new = sites - self.steering.attached
        self.steering.attach(new)
        self._ours |= new


def _sites(row: Row) -> set[Site]:
    return sites_of(applied.edit for applied in row.asked.edits)
