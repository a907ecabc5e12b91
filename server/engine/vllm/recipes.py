"""Which row of coefficients holds what a request asks for."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from server.engine.vllm.columns import PlacedEdit
from server.engine.vllm.wire import AskedEdit

FIRST, PROMPT, REPLY = range(3)
"""A recipe's slots: for a request's first token, the rest of its prompt, and its reply."""


@dataclass(frozen=True, eq=False)
class Recipe:
    """The edits of requests with their strengths and phases; there is one of a kind."""

    edits: tuple[AskedEdit, ...]


class Recipes:
    """The table of coefficients of one worker's sites.

    Args:
        table: `[sites, S, C]`; the programs' coefficients are views of it.
        places: a site's index in the table.
    """

    def __init__(self, table: Tensor, places: Mapping[str, int]) -> None:
        self._table = table
        self._places = places
        self._known: WeakValueDictionary[tuple[AskedEdit, ...], Recipe] = WeakValueDictionary()
        self._slots: OrderedDict[Recipe, int] = OrderedDict()
        """The first slot of each, the one used last at the end."""
        self._free = list(range(1, table.shape[1] - 2, 3))

    def recipe(self, edits: tuple[AskedEdit, ...]) -> Recipe | None:
        """The recipe of these edits, None of none."""
        return self._known.setdefault(edits, Recipe(edits)) if edits else None

    def slot(
        self, recipe: Recipe, placed: Mapping[int, PlacedEdit], in_use: Collection[Recipe | None]
    ) -> int:
        """The first of the recipe's slots, filled. `in_use` are those that this step needs.

        Raises KeyError if it names an edit that is not there.
        """
        if (known := self._slots.get(recipe)) is not None:
            self._slots.move_to_end(recipe)
            return known
        rows = self._coefficients(recipe.edits, placed)
        if not self._free:
            oldest = next(known for known in self._slots if known not in in_use)
            self._free.append(self._slots.pop(oldest))
        start = self._slots[recipe] = self._free.pop()
        self._table[:, start : start + 3] = rows.to(self._table.device)
        return start

    def _coefficients(
        self, recipe: Sequence[AskedEdit], placed: Mapping[int, PlacedEdit]
    ) -> Tensor:
        """`[sites, 3, C]`."""
        rows = torch.zeros(self._table.shape[0], 3, self._table.shape[2])
        for asked in recipe:
            one = placed[asked.number]
            place = self._places.get(str(one.edit.site))
            if place is None:  # another stage's
                continue
            columns = list(one.columns)
            # Added up: a request may ask for an edit twice.
            if asked.phase != "generation":
                rows[place, PROMPT, columns] += asked.strength
                if not one.edit.skip_first_token:
                    rows[place, FIRST, columns] += asked.strength
            if asked.phase != "prompt":
                rows[place, REPLY, columns] += asked.strength
        return rows
