"""What the engine's thread does: one step after the other over the rows it has taken in.

    drop cancelled -> (admit) -> prefill one group -> decode everyone -> deliver

A step reads a piece of the prompts of some rows in one forward call, and decodes one token for all
others in another. A forward call that fails takes its own rows down and no others.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from torch import Tensor

from server.engine.base import EngineToken, PromptScores, StepFailedError
from server.engine.cache import SlotCache
from server.engine.processors import Failure
from server.engine.rows import Row, Waiting
from server.engine.runner import Runner
from server.engine.sampling import sample
from server.engine.slots import SlotTable
from server.engine.stream import Courier
from steering.models import LanguageModel
from steering.monitor import Monitor
from steering.plan import Steering, sites_of

logger = logging.getLogger(__name__)


class Scheduler:
    """Rows, their slots and the forward calls over them. Used by the engine's thread alone.

    Args:
        chunk: prompt tokens of a row per step.
        budget: columns of one prefill call, all rows and padding included.
    """

    def __init__(
        self,
        lm: LanguageModel,
        steering: Steering,
        cache: SlotCache,
        slots: int,
        courier: Courier,
        *,
        chunk: int,
        budget: int,
        monitor: Monitor | None,
    ) -> None:
        self.slots = SlotTable(cache, slots)
        self.runner = Runner(lm, steering, cache)
        self.steering = steering
        self.cache = cache
        self.capacity = slots
        self.courier = courier
        self.chunk = chunk
        self.budget = budget
        self.monitor = monitor
        self.eos = lm.eos_token_ids

    @property
    def full(self) -> bool:
        return self.slots.used == self.capacity

    def drop_cancelled(self) -> None:
        """Free the slots of requests whose clients have gone."""
        for row in self.slots.rows:
            if row.outbox.cancelled:
                if row in self.slots.prefilling:  # nobody has looked at its values yet
                    self.cache.clear(row.slot)
                self.slots.release(row)

    def add(self, waiting: Waiting) -> None:
        """Take a request in; there must be a free slot."""
        try:
            row = Row(waiting, self.monitor)
            self.steering.attach(sites_of(a.edit for a in row.asked.edits))
        except Exception as error:  # a request that cannot be set up is its own failure
            logger.exception("a request could not be set up")
            self.courier.put(waiting.outbox, StepFailedError(str(error)))
            self.courier.deliver()
            return
        stays = row.probing or row.chunk_length(self.chunk) < row.prompt_length
        self.slots.add(row, stays=stays)

    def step(self) -> None:
        """One prefill call and one decode call, where there are rows for them."""
        if group := self.slots.next_group(self.chunk, self.budget):
            self._attempt(self._prefill, group)
        if self.slots.decoding:
            self._attempt(self._decode, list(self.slots.decoding))

    def _attempt(
        self,
        work: Callable[[list[Row]], None],
        rows: list[Row],
    ) -> None:
        """Do one forward call's work; if it fails, its requests fail and no others."""
        try:
            work(rows)
        except Exception as error:
            logger.exception("a step of %d requests failed", len(rows))
            reason = f"the forward pass failed: {type(error).__name__}: {error}"
            for row in sorted(rows, key=lambda r: -r.slot):
                self._fail(row, reason)
        self.courier.deliver()

    def _fail(self, row: Row, reason: Failure) -> None:
        if self.slots.owners[row.slot] is row:
            self.cache.clear(row.slot)
            self.slots.release(row)
            error = StepFailedError(reason) if isinstance(reason, str) else reason
            self.courier.put(row.outbox, error)

    def _prefill(self, rows: list[Row]) -> None:
        """Read the next piece of these rows' prompts, and choose a token where one ends."""
        lengths = [row.chunk_length(self.chunk) for row in rows]
        ends = [row.position + n == row.prompt_length for row, n in zip(rows, lengths, strict=True)]
        done = [i for i, row in enumerate(rows) if ends[i] and not row.probing]
        logits, step = self.runner.run(
            rows,
            lengths,
            capture={
                p.site for row, end in zip(rows, ends, strict=True) if end for p in row.probes
            },
            measure=bool(done) and self.monitor is not None,
            logits=bool(done),
        )
        for i, row in enumerate(rows):
            if ends[i]:
                row.read_benign(step, i)
            if ends[i] and row.probing:
                row.begin_asked_pass()
        first = [rows[i] for i in done]
        if first:
            logits = logits[done]
            refusal: list[float | None] = [None] * len(done)
            if self.monitor is not None:
                refusal = list(self.monitor.refusal_score(logits).tolist())
            scores = [rows[i].scores(step, i, s) for i, s in zip(done, refusal, strict=True)]
            for row in self._choose(first, logits, scores):
                self.slots.join(row)
        for row in rows:
            if row in self.slots.prefilling:
                self.slots.yield_turn(row)

    def _decode(self, rows: list[Row]) -> None:
        """One more token for every row that has read its prompt."""
        logits, _ = self.runner.run(rows, [1] * len(rows), decoding=True)
        self._choose(rows, logits, [None] * len(rows))

    def _choose(
        self,
        rows: list[Row],
        logits: Tensor,
        scores: Sequence[PromptScores | None],
    ) -> list[Row]:
        """Choose and send a token per row; free the rows that end and return the others."""
        choice = sample(
            logits,
            [r.request.sampling for r in rows],
            [r.generator for r in rows],
            [r.processor for r in rows],
        )
        going: list[Row] = []
        for i in reversed(range(len(rows))):  # from the last slot down, so that few rows move
            row, token = rows[i], choice.token_ids[i]
            if (error := choice.errors[i] or row.record(token)) is not None:
                self._fail(row, error)
                continue
            ended = token in self.eos
            full = row.generated >= row.request.sampling.max_tokens
            self.courier.put(
                row.outbox,
                EngineToken(
                    token_id=token,
                    logprob=choice.logprobs[i],
                    top_logprobs=choice.top_logprobs[i],
                    finish_reason="stop" if ended else "length" if full else None,
                    scores=scores[i],
                    queue_seconds=row.queue_seconds if row.generated == 1 else None,
                ),
            )
            if ended or full:
                self.slots.release(row)
            else:
                going.append(row)
        return going[::-1]
