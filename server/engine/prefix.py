"""The prefix cache: keys and values that outlive their request, for prompts that begin alike.

Keys and values at a position follow from the tokens up to it and from the edits they met. So a
block of tokens is found by the digest of the row's ordered effective edits (`edits_digest`) and by
all tokens from the prompt's first to its own last, never by a hash of them: blocks form a tree
whose branches are compared token by token. Nothing is shared between rows of different edits.

What may be kept, and of which pass over the prompt, is `Row.reusable`.

Shapes: H key-value heads, D head size.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from server.engine.cache import LayerShape, SlotCache

BLOCK = 16
"""Tokens that are kept together; a shorter rest is computed again."""

_Key = tuple[int | str, ...]
"""A block's tokens; for a prompt's first block with the digest before them."""


@dataclass(eq=False)
class _Block:
    """A node of the tree."""

    index: int
    key: _Key
    siblings: dict[_Key, _Block]
    """Where it hangs, itself included."""
    children: dict[_Key, _Block] = field(default_factory=dict)


class PrefixCache:
    """Blocks copied from slots and back into them, the least recently used one leaving first.

    Used by the engine's thread alone, between forward calls.

    Args:
        capacity: blocks it holds at most, in memory of its own; 0 keeps nothing.
    """

    def __init__(self, cache: SlotCache, capacity: int) -> None:
        self.capacity = capacity
        self._device = cache.device
        # Beside each tensor of the slot cache `[slots, H, max_len, D]` its blocks, `[capacity, H,
        # BLOCK, D]`.
        self._stores = [
            (slots, slots.new_empty(capacity, slots.shape[1], BLOCK, slots.shape[3]))
            for slots in cache.stores()
        ]
        self._first: dict[_Key, _Block] = {}
        self._free = list(range(capacity))[::-1]
        # By index, the one to leave next first. A block is used whenever one below it is, and
        # counted as used after it, so the first in line has none below it.
        self._used: OrderedDict[int, _Block] = OrderedDict()

    def load(self, digest: str, tokens: Sequence[int], slot: int, known: int = 0) -> int:
        """Copy the longest beginning of `tokens` that is kept into a slot.

        Args:
            digest: of the edits under which the slot's row reads its prompt.
            known: positions that the slot holds already.

        Returns the positions that it holds now, of the same tokens under the same edits.
        """
        path = self._path(digest, tokens)
        end = BLOCK * len(path)
        if end <= known:
            return known
        first = known // BLOCK
        index = torch.tensor([block.index for block in path[first:]], device=self._device)
        for slots, blocks in self._stores:
            _in_blocks(slots[slot, :, BLOCK * first : end]).copy_(blocks[index])
        self._use(path)
        return end

    def save(self, digest: str, tokens: Sequence[int], slot: int) -> None:
        """Keep whole blocks of a slot whose first positions hold `tokens`, those not kept yet.

        Values that are not finite are never kept.
        """
        path = self._path(digest, tokens)
        have, want = len(path), min(len(tokens) // BLOCK, self.capacity)
        if have >= want:
            return
        fresh = [
            _in_blocks(slots[slot, :, BLOCK * have : BLOCK * want]) for slots, _ in self._stores
        ]
        sums = torch.stack([part.sum(dtype=torch.float32) for part in fresh])
        if not torch.isfinite(sums).all():
            return
        self._use(path)  # so that nothing of it makes room for what hangs on it
        taken = [self._take() for _ in range(want - have)]
        try:
            where = torch.tensor(taken, device=self._device)
            for part, (_, blocks) in zip(fresh, self._stores, strict=True):
                blocks[where] = part
        except BaseException:
            self._free += taken
            raise
        for at, index in enumerate(taken, start=have):
            siblings = path[-1].children if path else self._first
            block = _Block(index, _key(digest, tokens, at), siblings)
            siblings[block.key] = self._used[index] = block
            path.append(block)
        self._use(path)

    def _path(self, digest: str, tokens: Sequence[int]) -> list[_Block]:
        """The blocks that hold the longest beginning of `tokens`."""
        path: list[_Block] = []
        children = self._first
        for at in range(len(tokens) // BLOCK):
            block = children.get(_key(digest, tokens, at))
            if block is None:
                break
            path.append(block)
            children = block.children
        return path

    def _use(self, path: list[_Block]) -> None:
        for block in reversed(path):
            self._used.move_to_end(block.index)

    def _take(self) -> int:
        """A block that holds nothing, or what was not used for the longest time."""
        if self._free:
            return self._free.pop()
        index, block = self._used.popitem(last=False)
        assert not block.children
        del block.siblings[block.key]
        return index


def blocks_within(shapes: Sequence[LayerShape], mebibytes: int) -> int:
    """Blocks that fit. Raises ValueError where not one does but some memory was given."""
    size = BLOCK * sum(shape.bytes_per_token for shape in shapes)
    if 0 < mebibytes * 2**20 < size:
        raise ValueError(
            f"--prefix-cache-mib {mebibytes} does not hold one block of {BLOCK} tokens "
            f"({size / 2**20:.1f} MiB); raise it, or switch the prefix cache off with 0"
        )
    return mebibytes * 2**20 // size


def _key(digest: str, tokens: Sequence[int], at: int) -> _Key:
    block = tokens[BLOCK * at : BLOCK * (at + 1)]
    return tuple(block) if at else (digest, *block)


def _in_blocks(part: Tensor) -> Tensor:
    """Whole blocks of a slot `[H, n * BLOCK, D]` as a view `[n, H, BLOCK, D]`."""
    heads, _, size = part.shape
    return part.view(heads, -1, BLOCK, size).transpose(0, 1)
