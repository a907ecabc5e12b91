"""One forward call over rows of the slot cache, under the edits of each."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from server.engine.cache import SlotCache
from server.engine.masks import MaskBuilder
from server.engine.rows import Row
from steering.edit import Site
from steering.models import LanguageModel
from steering.plan import BatchPlan, Steering, Step


class Runner:
    """Owns the model's forward pass: inputs, masks, plan and hooks."""

    def __init__(self, lm: LanguageModel, steering: Steering, cache: SlotCache) -> None:
        self.lm = lm
        self.steering = steering
        self.cache = cache
        self.masks = MaskBuilder(lm.model)
        self._head: nn.Module = lm.model.get_output_embeddings()
        self._plans: dict[bool, BatchPlan] = {}

    def run(
        self,
        rows: Sequence[Row],
        lengths: Sequence[int],
        *,
        capture: Collection[Site] = (),
        measure: bool = False,
        logits: bool = True,
        decoding: bool = False,
    ) -> tuple[Tensor, Step]:
        """Process the next `lengths[i]` tokens of row `i`.

        `decoding` tells the rows that stay together from those that read a prompt, so that the
        plan of the former is kept while the latter come and go.

        Returns the logits `[B, V]` at each row's last token (`[B, 0]` unless wanted) and what the
        plan read. Rows move on by their lengths only if the whole call succeeds.
        """
        starts = [row.position for row in rows]
        width = max(lengths)
        tokens, positions = [], []
        for row, start, n in zip(rows, starts, lengths, strict=True):
            tokens.append([*row.next_tokens(n), *[0] * (width - n)])
            # Padding repeats the last position: some rotary embeddings look at the largest one.
            positions.append([*range(start, start + n), *[start + n - 1] * (width - n)])
        device = self.lm.device
        position_ids = torch.tensor(positions, device=device)
        window = self.cache.select([row.slot for row in rows], starts, lengths)
        last = torch.tensor([n - 1 for n in lengths], device=device) if logits else None
        plan = self._plan(rows, decoding=decoding)
        with (
            self._columns(last),
            self.steering.step(plan, starts, lengths, capture=capture, measure=measure) as step,
        ):
            output = self.lm.model(
                input_ids=torch.tensor(tokens, device=device),
                attention_mask=self.masks(position_ids, window.end),
                position_ids=position_ids,
                past_key_values=self.cache,
                use_cache=True,
            )
        if output.logits.shape[:2] != (len(rows), int(logits)):
            raise RuntimeError(
                f"{type(self.lm.model).__name__} does not take one logits column per row "
                f"(logits of shape {tuple(output.logits.shape)})"
            )
        for row, n in zip(rows, lengths, strict=True):
            row.position += n
        return output.logits[:, 0] if logits else output.logits.flatten(1), step

    @contextmanager
    def _columns(self, last: Tensor | None) -> Iterator[None]:
        """Let only column `last[i]` of row i, or none, meet the vocabulary matrix.

        Its family's own last steps follow. (`logits_to_keep` takes a column per row since
        transformers 5.20, and vLLM wants an older one.)
        """

        def keep(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            hidden, *others = inputs
            if last is None:
                return hidden[:, :0], *others
            return hidden[torch.arange(len(last), device=last.device), last][:, None], *others

        handle = self._head.register_forward_pre_hook(keep)
        try:
            yield
        finally:
            handle.remove()

    def forget_plans(self, *, prefill: bool, decode: bool) -> None:
        """Let go of the last batches' edits, which would outlive their profiles."""
        for decoding, over in ((False, prefill), (True, decode)):
            if over:
                self._plans.pop(decoding, None)

    def _plan(self, rows: Sequence[Row], *, decoding: bool) -> BatchPlan:
        """The plan of these rows, kept while the batch's composition stays."""
        edits = [row.edits for row in rows]
        plan = self._plans.get(decoding)
        if plan is None or plan.rows != edits:
            plan = BatchPlan(edits, hidden_size=self.lm.sites.hidden_size, device=self.lm.device)
            self._plans[decoding] = plan
        return plan
