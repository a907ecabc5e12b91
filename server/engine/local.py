"""The local engine: continuous batching of requests with different edits on one device.

One thread owns model, hooks and cache, and runs the `Scheduler`'s steps. This file is what other
threads see of it: admission, the queue, starting and stopping.

Not covered: several devices.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import torch

from server.engine.base import (
    EngineRequest,
    EngineStats,
    EngineStoppedError,
    EngineToken,
)
from server.engine.cache import SlotCache, available_memory, check_memory, layer_shapes
from server.engine.hooks import Hooks
from server.engine.limits import RequestLimits
from server.engine.masks import MaskBuilder
from server.engine.prefix import blocks_within
from server.engine.queue import FairQueue
from server.engine.rows import Waiting
from server.engine.runner import Runner
from server.engine.scheduler import Scheduler
from server.engine.selftest import check_batching
from server.engine.stream import Courier, Outbox, TokenStream
from steering.edit import effective_edits
from steering.models import LanguageModel
from steering.monitor import Monitor
from steering.plan import Steering, sites_of
from steering.profile import Profile
from steering.selftest import self_test

logger = logging.getLogger(__name__)

T = TypeVar("T")

DEFAULT_MAX_MODEL_LEN = 4096


class LocalEngine:
    """Serves one model from this process.

    Args:
        max_num_seqs: requests that run at once; each has a slot in the cache.
        max_model_len: longest prompt plus reply in tokens; the model's context, at most 4096.
        max_waiting: requests that may wait for a slot.
        prefill_chunk: prompt tokens of a row per step.
        max_prefill_tokens: columns of one prefill call, all rows together, padding included. What
            bounds how long a step can keep decoding rows waiting.
        max_unsplit_prompt: longest prompt for edits that need it whole (gates over the prompt).
        prefix_cache_mib: memory for keys and values that outlive their requests; 0 keeps none.
        monitor: what to read of every prompt; without one, scores are None.
        steering: hooks to share; by default the engine has its own and removes them on close.

    Raises ValueError for models it cannot serve or limits that make no sense.
    """

    def __init__(
        self,
        lm: LanguageModel,
        *,
        max_num_seqs: int = 16,
        max_model_len: int | None = None,
        max_waiting: int = 256,
        prefill_chunk: int = 256,
        max_prefill_tokens: int | None = None,
        max_unsplit_prompt: int | None = None,
        prefix_cache_mib: int = 0,
        monitor: Monitor | None = None,
        steering: Steering | None = None,
    ) -> None:
        limit = _longest_sequence(lm)
        self._max_model_len = max_model_len or min(limit, DEFAULT_MAX_MODEL_LEN)
        if not 1 < self._max_model_len <= limit:
            raise ValueError(
                f"--max-model-len must be between 2 and {limit} for {lm.name}; got {max_model_len}"
            )
        if min(max_num_seqs, prefill_chunk) < 1 or max_waiting < 0:
            raise ValueError("--max-num-seqs and --prefill-chunk must be at least 1")
        if prefix_cache_mib < 0:
            raise ValueError("--prefix-cache-mib must be at least 0, which switches it off")
        MaskBuilder(lm.model)  # refuses what it has no mask for
        self.lm = lm
        self.monitor = monitor
        self.max_num_seqs = max_num_seqs
        self.max_waiting = max_waiting
        self.prefill_chunk = prefill_chunk
        self.max_prefill_tokens = max_prefill_tokens or 4 * prefill_chunk
        self.max_unsplit_prompt = max_unsplit_prompt or min(self._max_model_len, 2048)
        self.prefix_cache_mib = prefix_cache_mib
        self._steering = steering or Steering(lm.sites)
        self._owns_steering = steering is None
        self._hooks = Hooks(self._steering)
        self._limits = RequestLimits(
            self._max_model_len,
            self.max_unsplit_prompt,
            lm.model.get_input_embeddings().num_embeddings,
        )

        # Shared between threads, under this lock: the queue, the calls and the state.
        self._work = threading.Condition()
        self._waiting = FairQueue(max_waiting)
        self._calls: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._dead = False

        # The engine thread's own.
        self._courier = Courier()
        self._scheduler: Scheduler | None = None

    # Called from any thread.

    @property
    def max_model_len(self) -> int:
        return self._max_model_len

    def start(self) -> None:
        """Allocate the cache, hook the monitor's sites and begin to serve.

        Raises ValueError if the cache does not fit, naming the flags to lower, or if the model
        does not give the same logits on it as alone.
        """
        if self._thread is not None:
            raise RuntimeError("the engine was started already")
        shapes = layer_shapes(self.lm.model)
        available = available_memory(self.lm.device)
        prefixes = blocks_within(shapes, self.prefix_cache_mib)
        check_memory(
            shapes, self.max_num_seqs, self._max_model_len, available, self.prefix_cache_mib
        )
        cache = SlotCache(shapes, self.max_num_seqs, self._max_model_len)
        check_batching(
            Runner(self.lm, self._steering, cache), self.max_num_seqs, self._max_model_len
        )
        self._scheduler = Scheduler(
            self.lm,
            self._hooks,
            cache,
            self.max_num_seqs,
            self._courier,
            chunk=self.prefill_chunk,
            budget=self.max_prefill_tokens,
            monitor=self.monitor,
            prefixes=prefixes,
        )
        if self.monitor is not None:
            self._hooks.pin(self.monitor.sites)
        self._thread = threading.Thread(target=self._run, name="engine")
        self._thread.start()

    def check(self, request: EngineRequest) -> None:
        self._limits.check(request)
        edits = [applied.edit for applied in effective_edits(request.edits)]
        for edit in edits:
            if edit.dimension != self.lm.sites.hidden_size:
                raise ValueError(
                    f"an edit at {edit.site} has hidden size {edit.dimension}, the model "
                    f"{self.lm.sites.hidden_size}"
                )
        for site in sites_of(edits):
            self.lm.sites.module_at(site)

    def generate(self, request: EngineRequest) -> AsyncGenerator[EngineToken, None]:
        """Submit at once and stream tokens; call it on the event loop that will read them."""
        [stream] = self.generate_all([request])
        return stream

    def generate_all(
        self, requests: Sequence[EngineRequest]
    ) -> list[AsyncGenerator[EngineToken, None]]:
        """Submit requests together, all or, raising QueueFullError, none."""
        for request in requests:
            self.check(request)
        loop = asyncio.get_running_loop()
        arrivals = [Waiting(request, Outbox(loop)) for request in requests]
        with self._work:
            self._check_running()
            self._waiting.put(*arrivals)
            self._work.notify()
        return [TokenStream(arrival.outbox) for arrival in arrivals]

    def register(self, profile: Profile) -> None:
        """Test the profile and hook its sites, a forward pass at a time between two steps."""
        run = self.call if self._thread is not None else _here
        self_test(self.lm, profile, run)
        wanted = sites_of(profile.edits)
        run(lambda: self._hooks.pin(wanted))

    def retain(self, profiles: Iterable[Profile]) -> None:
        """Unhook all sites but these profiles' and the monitor's."""
        wanted = sites_of(edit for profile in profiles for edit in profile.edits)
        if self.monitor is not None:
            wanted |= self.monitor.sites
        self.call(lambda: self._hooks.keep_only(wanted))

    def call(self, function: Callable[[], T]) -> T:
        """Run `function` on the engine's thread between two steps; it may use model and hooks.

        Waits for the step under way: from an event loop, call it in a thread.
        """
        future: Future[T] = Future()
        with self._work:
            self._check_running()
            self._calls.append((future, function))
            self._work.notify()
        return future.result()

    def stats(self) -> EngineStats:
        scheduler = self._scheduler
        used = scheduler.slots.used if scheduler is not None else 0
        with self._work:
            waiting = sum(not (w.outbox.cancelled or w.request.priority) for w in self._waiting)
        return EngineStats(running=used, waiting=waiting, slots=self.max_num_seqs, slots_used=used)

    def healthy(self) -> bool:
        return self._thread is not None and not (self._dead or self._stopping)

    def close(self) -> None:
        with self._work:
            self._stopping = True
            self._work.notify()
        if self._thread is not None:
            self._thread.join()
        if self._owns_steering:
            self._steering.detach()
        self._scheduler = None

    def _check_running(self) -> None:
        if not self.healthy():
            raise EngineStoppedError("the engine is not running")

    # The engine's thread.

    def _run(self) -> None:
        assert self._scheduler is not None
        scheduler = self._scheduler
        try:
            with torch.inference_mode():
                while self._wait_for_work(scheduler):
                    self._step(scheduler)
        except BaseException:
            logger.exception("the engine's thread died")
        finally:
            self._stop_serving(scheduler)

    def _wait_for_work(self, scheduler: Scheduler) -> bool:
        """Sleep until there is something to do; False when the engine is to stop."""
        with self._work:
            while not (self._stopping or self._calls or self._waiting or scheduler.slots.used):
                self._work.wait()
            return not self._stopping

    def _stop_serving(self, scheduler: Scheduler) -> None:
        with self._work:
            self._dead = True
            waiting = self._waiting.drain()
            calls, self._calls = self._calls, deque()
        stopped = EngineStoppedError("the engine stopped before this request was done")
        for outbox in [row.outbox for row in scheduler.slots.rows] + [w.outbox for w in waiting]:
            self._courier.put(outbox, stopped)
        self._courier.deliver()
        for future, _ in calls:
            future.set_exception(stopped)

    def _step(self, scheduler: Scheduler) -> None:
        while self._calls:
            future, function = self._calls.popleft()
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)
                if not isinstance(error, Exception):
                    raise
        scheduler.drop_ended()
        self._admit(scheduler)
        scheduler.step()
        scheduler.sweep()

    def _admit(self, scheduler: Scheduler) -> None:
        with self._work:
            late = self._waiting.take_late()
        scheduler.refuse_late(late)
        while not scheduler.full:
            running = Counter(row.request.client for row in scheduler.slots.rows)
            with self._work:
                waiting = self._waiting.pop(running)
            if waiting is None:
                return
            scheduler.add(waiting)


def _here(function: Callable[[], T]) -> T:
    return function()


def _longest_sequence(lm: LanguageModel) -> int:
    """The model's context, cut where its rotary embedding would change for the whole batch.

    `longrope` (Phi-3 128k) switches tables when the longest row of a call passes the original
    context, so that a row's tokens would depend on its company.
    """
    rope = getattr(lm.config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        original = rope.get("original_max_position_embeddings") or getattr(
            lm.config, "original_max_position_embeddings", None
        )
        return min(lm.context_length, int(original or lm.context_length))
    return lm.context_length
