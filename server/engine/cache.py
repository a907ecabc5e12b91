"""The slot cache: keys and values of every request in preallocated, right-growing rows.

A request owns one slot of each layer's `[slots, Hkv, max_len, D]` tensors from admission to its
last token, and its position `p` is always stored at column `p`. Nobody else's row is copied when
it joins or leaves. Every position is kept: a sliding window is a mask (`masks`), not a shorter row.

Shapes: B rows of a call, T its columns, Hkv key-value heads, D head size.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer


@dataclass(frozen=True)
class LayerShape:
    """What one layer stores per position."""

    heads: int
    key_size: int
    value_size: int
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes_per_token(self) -> int:
        return self.heads * (self.key_size + self.value_size) * self.dtype.itemsize


def layer_shapes(model: Any) -> list[LayerShape]:
    """Find out what each layer stores by running one token through the model.

    Raises ValueError where a layer keeps something other than keys and values of attention.
    """
    cache = DynamicCache(config=model.config)
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    with torch.inference_mode():
        model(input_ids=token, past_key_values=cache, use_cache=True)
    shapes = []
    for index, layer in enumerate(cache.layers):
        if not isinstance(layer, DynamicLayer) or layer.keys is None or layer.values is None:
            raise ValueError(
                f"{type(model).__name__}: layer {index} keeps a {type(layer).__name__}, and the "
                "local engine serves only models whose layers all keep attention keys and values"
            )
        k, v = layer.keys, layer.values
        shapes.append(LayerShape(k.shape[1], k.shape[3], v.shape[3], k.dtype, k.device))
    return shapes


def available_memory(device: torch.device) -> int:
    """Bytes free for new tensors on the device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo") as lines:  # counts reclaimable page cache as available
            fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_memory(
    shapes: Sequence[LayerShape],
    slots: int,
    max_len: int,
    available: int,
    prefix_mebibytes: int = 0,
) -> int:
    """Bytes the caches take. Raises ValueError, naming the flags to lower, if they do not fit."""
    per_token = sum(shape.bytes_per_token for shape in shapes)
    needed = per_token * slots * max_len + prefix_mebibytes * 2**20
    if needed > available:
        prefixes = f" and {prefix_mebibytes} MiB of prefixes" if prefix_mebibytes else ""
        raise ValueError(
            f"the cache of {slots} sequences of {max_len} tokens{prefixes} needs "
            f"{needed / 2**30:.2f} GiB ({per_token / 2**10:.1f} KiB per token) and "
            f"{available / 2**30:.2f} GiB are available; lower --max-num-seqs or --max-model-len"
            + (" or --prefix-cache-mib" if prefix_mebibytes else "")
        )
    return needed


class _Window:
    """Which rows and columns the forward call under way writes and reads. Shared by all layers."""

    def __init__(
        self, slots: Sequence[int], starts: Sequence[int], lengths: Sequence[int], device: Any
    ) -> None:
        self.slots, self.starts, self.lengths = list(slots), list(starts), list(lengths)
        self.end = max(s + n for s, n in zip(starts, lengths, strict=True))
        first = self.slots[0]
        contiguous = self.slots == list(range(first, first + len(self.slots)))
        self.range = slice(first, first + len(self.slots)) if contiguous else None
        self.index = torch.tensor(self.slots, device=device)
        self.positions = torch.tensor(self.starts, device=device)

    def write(self, store: Tensor, new: Tensor) -> None:
        """Put `new` `[B, H, T, D]` at its rows' positions; padding columns are left out."""
        if new.shape[2] == 1:
            store[self.index, :, self.positions] = new[:, :, 0]
            return
        for i, (slot, start, n) in enumerate(
            zip(self.slots, self.starts, self.lengths, strict=True)
        ):
            store[slot, :, start : start + n] = new[i, :, :n]

    def read(self, store: Tensor) -> Tensor:
        """`[B, H, end, D]` up to the longest row: a view where the slots are neighbours."""
        store = store[:, :, : self.end]
        return store.index_select(0, self.index) if self.range is None else store[self.range]


class _SlotLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]  # its __init_subclass__
    """One layer of a `SlotCache`, as transformers' attention modules see it."""

    is_sliding = False
    keys: Tensor
    values: Tensor

    def __init__(self, shape: LayerShape, slots: int, max_len: int, cache: SlotCache) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # Zeros, not empty: a masked column still meets a weight of 0, and 0 * NaN is NaN.
        size = (slots, shape.heads, max_len)
        self.keys = torch.zeros(*size, shape.key_size, dtype=shape.dtype, device=shape.device)
        self.values = torch.zeros(*size, shape.value_size, dtype=shape.dtype, device=shape.device)
        self.is_initialized = True
        self._cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        window = self._cache.window
        window.write(self.keys, key_states)
        window.write(self.values, value_states)
        return window.read(self.keys), window.read(self.values)

    def get_seq_length(self) -> int:
        return self._cache.window.end

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cache.window.end, 0

    def get_max_length(self) -> int:
        return self.keys.shape[2]


class SlotCache(Cache):
    """Keys and values of up to `slots` requests of at most `max_len` tokens.

    Call `select` before each forward call; `move`, `swap` and `clear` between calls.
    """

    window: _Window

    def __init__(self, shapes: Sequence[LayerShape], slots: int, max_len: int) -> None:
        self.device = shapes[0].device
        self._own = [_SlotLayer(shape, slots, max_len, self) for shape in shapes]
        super().__init__(layers=list(self._own))

    def select(
        self, slots: Sequence[int], starts: Sequence[int], lengths: Sequence[int]
    ) -> _Window:
        """Say where row `i` of the next call lives: its slot, first position and token count."""
        self.window = _Window(slots, starts, lengths, self.device)
        return self.window

    def stores(self) -> list[Tensor]:
        """Keys and values of every layer, each `[slots, H, max_len, D]`."""
        return [t for layer in self._own for t in (layer.keys, layer.values)]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of a slot over another one."""
        for store in self.stores():
            store[target, :, :length] = store[source, :, :length]

    def swap(self, one: int, other: int, length: int) -> None:
        """Exchange the first `length` positions of two slots."""
        for store in self.stores():
            kept = store[one, :, :length].clone()
            store[one, :, :length] = store[other, :, :length]
            store[other, :, :length] = kept

    def clear(self, slot: int) -> None:
        """Zero a slot that may hold NaN, which would reach its next owner through the mask."""
        for store in self.stores():
            store[slot].zero_()
