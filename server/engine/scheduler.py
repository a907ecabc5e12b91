"""What the engine's thread does: one step after the other over the rows it has taken in.

    drop ended -> (admit) -> prefill one group -> decode everyone -> deliver

A step reads a piece of the prompts of some rows in one forward call, and decodes one token for all
others in another. A forward call that fails is tried again in halves, down to the rows that cannot
be computed, which alone fail. Memory that is short is found the same way. What a failed row left in
its slot is cleared.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from server.engine.base import (
    DeadlineExceededError,
    EngineError,
    EngineToken,
    PromptScores,
    StepFailedError,
    TokenTrace,
)
from server.engine.cache import SlotCache
from server.engine.hooks import Hooks
from server.engine.prefix import PrefixCache
from server.engine.processors import Failure
from server.engine.rows import Row, Waiting
from server.engine.runner import Runner
from server.engine.sampling import sample
from server.engine.slots import SlotTable
from server.engine.stream import Courier
from server.engine.tracing import any_traced, read_traces, traced_sites
from steering.models import LanguageModel
from steering.monitor import Monitor

logger = logging.getLogger(__name__)

TOO_LATE = "its time was up"
PATIENCE = 8
"""Steps that may fail in a row, the bare model with them, before the engine gives up."""


class Scheduler:
    """Rows, their slots and the forward calls over them. Used by the engine's thread alone.

    Args:
        chunk: prompt tokens of a row per step.
        budget: columns of one prefill call, all rows and padding included.
        prefixes: blocks of the prefix cache.
    """

    def __init__(
        self,
        lm: LanguageModel,
        hooks: Hooks,
        cache: SlotCache,
        slots: int,
        courier: Courier,
        *,
        chunk: int,
        budget: int,
        monitor: Monitor | None,
        prefixes: int = 0,
    ) -> None:
        self.slots = SlotTable(cache, slots)
        self.prefixes = PrefixCache(cache, prefixes)
        self.runner = Runner(lm, hooks.steering, cache)
        self.hooks = hooks
        self.cache = cache
        self.capacity = slots
        self.courier = courier
        self.chunk = chunk
        self.budget = budget
        self.monitor = monitor
        self.eos = lm.eos_token_ids
        self._lost = 0
        """Failed steps in a row after which the bare model failed too."""

    @property
    def full(self) -> bool:
        return self.slots.used == self.capacity

    def drop_ended(self) -> None:
        """Free the slots of requests whose clients have gone or whose time is up."""
        now = time.monotonic()
        for row in self.slots.rows:
            if row.request.deadline <= now:
                self._fail(row, DeadlineExceededError(TOO_LATE))
            elif row.outbox.cancelled:
                if row in self.slots.prefilling:  # nobody has looked at its values yet
                    self.cache.clear(row.slot)
                self.slots.release(row)
        self.courier.deliver()

    def refuse_late(self, late: Sequence[Waiting]) -> None:
        """Tell requests that their time was up before a slot was free."""
        for waiting in late:
            self.courier.put(waiting.outbox, DeadlineExceededError(TOO_LATE))
        self.courier.deliver()

    def add(self, waiting: Waiting) -> None:
        """Take a request in; there must be a free slot."""
        try:
            row = Row(waiting, self.monitor)
            self.hooks.use(row)
        except Exception as error:  # a request that cannot be set up is its own failure
            logger.exception("a request could not be set up")
            self.courier.put(waiting.outbox, StepFailedError(str(error)))
            self.courier.deliver()
            return
        stays = row.probing or row.chunk_length(self.chunk) < row.prompt_length
        self.slots.add(row, stays=stays)

    def step(self) -> None:
        """One prefill call and one decode call, where there are rows for them."""
        for row in list(self.slots.prefilling):
            self._attempt(self._resume, [row])
        if group := self.slots.next_group(self.chunk, self.budget):
            self._attempt(self._prefill, group)
        if self.slots.decoding:
            self._attempt(self._decode, list(self.slots.decoding))

    def sweep(self) -> None:
        """Let go of hooks and edits that no row uses any more."""
        self.hooks.sweep(self.slots.rows)
        self.runner.forget_plans(prefill=not self.slots.prefilling, decode=not self.slots.decoding)

    def _attempt(self, work: Callable[[list[Row]], None], rows: list[Row]) -> None:
        """Do one forward call's work; what fails with several rows is tried with half of them."""
        before = [row.position for row in rows]
        try:
            work(rows)
        except Exception as error:
            # Rows move on when the model's call is done: what broke after it is not tried again.
            again = len(rows) > 1 and before == [row.position for row in rows]
            logger.exception("a step of %d requests failed", len(rows))
            if again:
                self._release_memory()
                half = len(rows) // 2
                for part in (rows[:half], rows[half:]):
                    self._attempt(work, part)
                return
            reason = f"the forward pass failed: {type(error).__name__}: {error}"
            for row in sorted(rows, key=lambda r: -r.slot):
                self._fail(row, StepFailedError(reason))
            self._check_alive()
        self.courier.deliver()

    def _release_memory(self) -> None:
        if self.cache.device.type == "cuda":
            torch.cuda.empty_cache()

    def _check_alive(self) -> None:
        """Raise, which ends the engine, where for a while not even the bare model could be run: a
        device in such a state never comes back, and who supervises the server must know."""
        self.courier.deliver()
        token = torch.zeros(1, 1, dtype=torch.long, device=self.cache.device)
        try:
            self.runner.lm.model(input_ids=token, use_cache=False)
            self._lost = 0
        except Exception:
            self._lost += 1
            if self._lost == PATIENCE:
                raise

    def _fail(self, row: Row, reason: Failure | EngineError) -> None:
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
        first = [rows[i] for i in done]
        probes = {p.site for row, end in zip(rows, ends, strict=True) if end for p in row.probes}
        logits, step = self.runner.run(
            rows,
            lengths,
            capture=probes | traced_sites(first),
            measure=bool(first) and (self.monitor is not None or any_traced(first)),
            logits=bool(first),
        )
        for i, row in enumerate(rows):
            if ends[i]:
                row.read_benign(step, i)
        if first:
            logits = logits[done]
            refusal: list[float | None] = [None] * len(done)
            if self.monitor is not None:
                refusal = list(self.monitor.refusal_score(logits).tolist())
            scores = [rows[i].scores(step, i, s) for i, s in zip(done, refusal, strict=True)]
            for row in self._choose(first, logits, scores, read_traces(first, step, done)):
                self.slots.join(row)
            self.courier.deliver()  # before what the first token need not wait for
        for row, end in zip(rows, ends, strict=True):
            if self.slots.owners[row.slot] is row:
                self._keep(row)
            if row in self.slots.prefilling:
                if end:  # of the unedited pass, or it would decode by now
                    row.begin_asked_pass()
                self.slots.yield_turn(row)

    def _resume(self, rows: list[Row]) -> None:
        """Take over what is known of these rows' prompts, all but the last token: its logits and
        states are wanted. In every step, since rows that began before may have brought more."""
        for row in rows:
            if row.edits.needs_whole_prompt:
                continue
            before, prompt = row.position, row.request.prompt_ids[:-1]
            row.position = self.prefixes.load(row.edits.digest, prompt, row.slot, before)
            row.cached_tokens += row.position - before

    def _keep(self, row: Row) -> None:
        """Leave to later prompts what they may use of a row's keys and values."""
        self.prefixes.save(row.edits.digest, row.reusable, row.slot)

    def _decode(self, rows: list[Row]) -> None:
        """One more token for every row that has read its prompt."""
        logits, step = self.runner.run(
            rows,
            [1] * len(rows),
            capture=traced_sites(rows),
            measure=any_traced(rows),
            decoding=True,
        )
        self._lost = 0
        traces = read_traces(rows, step, range(len(rows)))
        self._choose(rows, logits, [None] * len(rows), traces)

    def _choose(
        self,
        rows: list[Row],
        logits: Tensor,
        scores: Sequence[PromptScores | None],
        traces: Sequence[TokenTrace | None],
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
                    cached_tokens=row.cached_tokens if row.generated == 1 else None,
                    trace=traces[i],
                ),
            )
            if ended or full:
                self._keep(row)
                self.slots.release(row)
            else:
                going.append(row)
        return going[::-1]
