"""Read hidden states at sites for many prompts, in batches; nothing is kept here.

The caller consumes each batch and keeps what its method needs (sums, mostly), so memory does not
grow with the number of prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from steering.edit import AppliedEdit, Site
from steering.models import LanguageModel
from steering.plan import BatchPlan, Pool, RowEdits, Steering, last_token, sites_of


@dataclass(frozen=True)
class ActivationBatch:
    """States of some prompts.

    Args:
        indices: which of the prompts, `[b]`.
        states: float32 by site, after the edits there; `[b, d]`, at the last prompt token, or
            `[b, ...]` as another pool gives it.
        logits: `[b, V]` of the first position to be generated, or None if not asked for.
    """

    indices: list[int]
    states: dict[Site, Tensor]
    logits: Tensor | None


def prompt_mean(x: Tensor, lengths: Tensor) -> Tensor:
    """`[B, D]`: the mean over each row's tokens, template included, as `prompt_mean` gates read."""
    inside = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
    # Not a product with the mask: padding may hold values that are not finite.
    total = x.float().masked_fill(~inside[..., None], 0.0).sum(1)
    return total / lengths[:, None]


@dataclass(frozen=True)
class LastTokens:
    """A pool of each row's last `count` columns, `[B, count, D]`, in their order.

    Its caller sees to it that no row is shorter.
    """

    count: int

    def __call__(self, x: Tensor, lengths: Tensor) -> Tensor:
        columns = lengths[:, None] + torch.arange(-self.count, 0, device=x.device)
        return x[torch.arange(len(lengths), device=x.device)[:, None], columns]


def name_of(pool: Pool) -> str | None:
    """The same in every process for one pool; None for a pool that is not of this module."""
    if isinstance(pool, LastTokens):
        return repr(pool)
    return next((p.__name__ for p in (last_token, prompt_mean) if p is pool), None)


class Reader(Protocol):
    """Something that reads states: `read_activations` below, or one that remembers them."""

    def __call__(
        self,
        lm: LanguageModel,
        prompts: Sequence[Sequence[int]],
        sites: Collection[Site],
        *,
        edits: Sequence[AppliedEdit] = (),
        pool: Pool = last_token,
        on_done: Callable[[int], object] | None = None,
    ) -> Iterator[ActivationBatch]: ...


def batches_by_length(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices grouped so that similar lengths share a batch of at most `batch_tokens` tokens."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and lengths[index] * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


@torch.inference_mode()
def read_activations(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    sites: Collection[Site],
    *,
    edits: Sequence[AppliedEdit] = (),
    batch_tokens: int = 4096,
    logits: bool = False,
    pool: Pool = last_token,
    on_done: Callable[[int], object] | None = None,
) -> Iterator[ActivationBatch]:
    """Run prompts (token ids) through the model and yield their states batch by batch.

    Rows are right-padded: in a causal model no token sees what comes after it, so padding changes
    nothing and needs no mask. Batches come in order of length; use `indices` to place them.

    Args:
        edits: applied to every prompt, for states of an edited model.
        pool: which tokens' states to keep; the last one's by default.
        on_done: called with the number of prompts finished, for progress bars.
    """
    with Steering(lm.sites) as steering:
        steering.attach({*sites, *sites_of(applied.edit for applied in edits)})
        for indices in batches_by_length([len(ids) for ids in prompts], batch_tokens):
            lengths = [len(prompts[i]) for i in indices]
            ids = torch.zeros(len(indices), max(lengths), dtype=torch.long)
            for row, i in enumerate(indices):
                ids[row, : lengths[row]] = torch.tensor(prompts[i])
            plan = BatchPlan(
                [RowEdits(edits, length) for length in lengths],
                hidden_size=lm.sites.hidden_size,
                device=lm.device,
            )
            starts = [0] * len(indices)
            with steering.step(plan, starts, lengths, capture=sites, pool=pool) as step:
                # Only the last column of each row is wanted: `logits_to_keep` takes the columns
                # that any row ends at, and each row picks its own.
                ends = sorted({length - 1 for length in lengths})
                keep = torch.tensor(ends if logits else ends[-1:], device=lm.device)
                output = lm.model(ids.to(lm.device), use_cache=False, logits_to_keep=keep)
            last = None
            if logits:
                columns = [ends.index(length - 1) for length in lengths]
                last = output.logits[torch.arange(len(indices)), columns].float()
            yield ActivationBatch(indices, dict(step.captured), last)
            if on_done is not None:
                on_done(len(indices))


def gather_activations(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    sites: Collection[Site],
    *,
    edits: Sequence[AppliedEdit] = (),
    batch_tokens: int = 4096,
    on_done: Callable[[int], object] | None = None,
) -> dict[Site, Tensor]:
    """All states at once, `[len(prompts), d]` float32 on the CPU by site, for methods that need
    every row (a support vector machine does)."""
    batches = read_activations(
        lm, prompts, sites, edits=edits, batch_tokens=batch_tokens, on_done=on_done
    )
    return gather(batches, sites, len(prompts), lm.sites.hidden_size)


def gather(
    batches: Iterable[ActivationBatch], sites: Collection[Site], count: int, size: int
) -> dict[Site, Tensor]:
    """The batches' states together, `[count, size]` float32 on the CPU by site."""
    states = {site: torch.empty(count, size) for site in sites}
    for batch in batches:
        for site, rows in batch.states.items():
            states[site][batch.indices] = rows.cpu()
    return states
