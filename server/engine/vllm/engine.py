"""The vLLM engine: stock vLLM, with workers that edit.

One thread owns the event loop on which vLLM's client runs. This file is what other threads see of
it: admission, the queue (the local engine's: vLLM knows of no clients, and gets no more requests
than it can run, but for unedited passes that read the benign probe, and self-tests), starting and
stopping; and what becomes of one request.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from pydantic import ValidationError
from vllm.v1.engine.exceptions import EngineDeadError

from server.engine.base import (
    DeadlineExceededError,
    EngineError,
    EngineRequest,
    EngineStats,
    EngineStoppedError,
    EngineToken,
    ProfileRemovedError,
    RankLimitError,
    StepFailedError,
)
from server.engine.limits import RequestLimits
from server.engine.queue import FairQueue
from server.engine.rows import Waiting
from server.engine.stream import Courier, TokenStream
from server.engine.vllm.arrivals import AlertOutbox, Arrival
from server.engine.vllm.client import Client
from server.engine.vllm.columns import Columns
from server.engine.vllm.layout import Layout, plan_layout
from server.engine.vllm.options import VllmOptions
from server.engine.vllm.replies import Replies
from server.engine.vllm.selftest import check_profile
from server.engine.vllm.wire import RequestEdits
from server.validation import describe, field_path
from steering.edit import AppliedEdit, Edit, effective_edits
from steering.models import LanguageModel
from steering.monitor import Monitor
from steering.profile import Profile, ProfileError

logger = logging.getLogger(__name__)

T = TypeVar("T")

_HEARTBEAT = 0.1
"""Seconds between looks at deadlines of requests that wait, and at whether vLLM lives."""
_UNSPLIT = 2048
_TOO_LATE = "its time was up"
_STOPPED = "the engine stopped before this request was done"


class VllmEngine:
    """Serves one model from vLLM's processes.

    Args:
        lm: the model's tokenizer, sites and configuration; its weights are not used and may be on
            the meta device.
        profiles: to be served from the start; their sites are those that can be edited.
        monitor: what to read of every prompt; without one, scores are None.

    Raises ValueError for options that make no sense, and for profiles that together need more
    columns at a site than `max_site_rank`.
    """

    def __init__(
        self,
        lm: LanguageModel,
        options: VllmOptions,
        *,
        profiles: Iterable[Profile] = (),
        monitor: Monitor | None = None,
    ) -> None:
        limit = lm.context_length
        self._max_model_len = options.max_model_len or limit
        if not 1 < self._max_model_len <= limit:
            raise ValueError(
                f"--max-model-len must be between 2 and {limit} for {lm.name}; got "
                f"{options.max_model_len}"
            )
        unsplit = options.max_unsplit_prompt or min(self._max_model_len, _UNSPLIT)
        options = replace(options, max_model_len=self._max_model_len, max_unsplit_prompt=unsplit)
        self.lm = lm
        self.monitor = monitor
        self.profiles = [profile for profile in profiles if profile.edits]
        self.capacity = options.max_num_seqs * options.data_parallel_size
        self.layout = plan_layout(
            (edit for profile in self.profiles for edit in profile.edits),
            monitor,
            hidden_size=lm.sites.hidden_size,
            columns=options.max_site_rank,
            more=options.sites,
            max_num_seqs=options.max_num_seqs,
        )
        _check_room(self.layout, self.profiles)  # before vLLM loads, which takes a while
        self._columns = Columns(self.layout)
        vocabulary = lm.model.get_input_embeddings().num_embeddings
        self._limits = RequestLimits(self._max_model_len, unsplit, vocabulary)
        # Some tokenizers have an end token that the model has no logit for.
        ends = [token for token in lm.eos_token_ids if token < vocabulary]
        self._client = Client(options, self.layout, monitor, ends)
        self._replies = Replies(self._client, monitor)

        # Shared between threads, under this lock: the queue, the columns and the state.
        self._lock = threading.Lock()
        self._waiting = FairQueue(options.max_waiting)
        self._thread: threading.Thread | None = None
        self._ready = False
        self._stopped = False

        # The engine thread's own.
        self._loop: asyncio.AbstractEventLoop | None = None
        self._courier = Courier()
        self._flushing = False
        self._running: dict[asyncio.Task[None], str] = {}
        """By the client each one is for."""
        self._stop: asyncio.Event | None = None
        self._registering: asyncio.Lock | None = None

    # Called from any thread.

    @property
    def max_model_len(self) -> int:
        return self._max_model_len

    def start(self) -> None:
        """Start vLLM's processes, load and compile, and test every profile on the result.

        Raises ValueError for what vLLM cannot serve, ProfileError for a profile that it does not
        apply.
        """
        if self._thread is not None:
            raise RuntimeError("the engine was started already")
        started: Future[None] = Future()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._main(started)), name="vllm-client"
        )
        self._thread.start()
        started.result()

    def register(self, profile: Profile) -> None:
        self._call(lambda: self._register(profile))

    def retain(self, profiles: Iterable[Profile]) -> None:
        edits = [edit for profile in profiles for edit in profile.edits]
        with self._lock:
            self._columns.keep_only(edits)

    def check(self, request: EngineRequest) -> None:
        self._limits.check(request)
        with self._lock:
            self._find_all(request.edits)

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
        with self._lock:
            if not self.healthy():
                raise EngineStoppedError("the engine is not running")
            assert self._loop is not None
            arrivals = [
                Arrival(request, AlertOutbox(loop, self._loop), edits=self._find_all(request.edits))
                for request in requests
            ]
            self._waiting.put(*arrivals)
            for arrival in arrivals:
                # From now on, so that no deletion comes in between.
                self._columns.use(arrival.edits.placed)
                arrival.outbox.on_leaving = partial(self._leave, arrival)
            self._loop.call_soon_threadsafe(self._admit)
        return [TokenStream(arrival.outbox) for arrival in arrivals]

    def stats(self) -> EngineStats:
        with self._lock:
            waiting = sum(not (w.outbox.cancelled or w.request.priority) for w in self._waiting)
        used = len(self._running)
        return EngineStats(running=used, waiting=waiting, slots=self.capacity, slots_used=used)

    def healthy(self) -> bool:
        return self._ready and not self._stopped and self._client.alive

    def close(self) -> None:
        thread, loop, stop = self._thread, self._loop, self._stop
        self._stopped = True
        while thread is not None and thread.is_alive() and not self._ready:
            self._client.abandon()
            thread.join(_HEARTBEAT)
        if loop is not None and stop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(stop.set)
        if thread is not None:
            thread.join()

    def _call(self, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """The result of a coroutine on the engine's loop."""
        if not self.healthy():
            raise EngineStoppedError("the engine is not running")
        assert self._loop is not None
        try:
            return asyncio.run_coroutine_threadsafe(make(), self._loop).result()
        except CancelledError:  # the loop has ended
            raise EngineStoppedError(_STOPPED) from None

    # The engine's thread.

    async def _main(self, started: Future[None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop, self._registering = asyncio.Event(), asyncio.Lock()
        try:
            await self._open()
        except BaseException as error:
            try:
                self._client.close()
            finally:
                started.set_exception(_start_error(error))
            return
        self._ready = True
        started.set_result(None)
        try:
            while not self._stop.is_set() and self._client.alive:
                self._refuse_late()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stop.wait(), _HEARTBEAT)
            if not self._stop.is_set():
                logger.error("vLLM's engine died")
        finally:
            await self._stop_serving()

    async def _open(self) -> None:
        """Raises EngineStoppedError if it is closed or vLLM dies meanwhile."""
        await self._client.start()
        testing = asyncio.create_task(self._test())
        while not (self._stopped or testing.done()) and self._client.alive:
            await asyncio.wait({testing}, timeout=_HEARTBEAT)
        if not testing.done():  # nor would it ever be: vLLM gives no answers any more
            testing.cancel()
            await asyncio.wait({testing})
            raise EngineStoppedError("it ended while the profiles were tested")
        testing.result()

    async def _test(self) -> None:
        for profile in self.profiles:
            await self._register(profile)
            logger.info("profile %s passed its self-test on vLLM", profile.name)

    async def _stop_serving(self) -> None:
        with self._lock:
            self._stopped = True
            waiting = self._waiting.drain()
        for one in waiting:
            self._end(one, EngineStoppedError(_STOPPED))
        tasks = list(self._running)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._flush()
        self._client.close()

    def _refuse_late(self) -> None:
        with self._lock:
            late = self._waiting.take_late()
        for one in late:
            self._end(one, DeadlineExceededError(_TOO_LATE))

    def _admit(self) -> None:
        self._refuse_late()
        while len(self._running) < self.capacity and not self._stopped:
            with self._lock:
                arrival = self._waiting.pop(Counter(self._running.values()))
            if arrival is None:
                return
            assert isinstance(arrival, Arrival)
            task = asyncio.get_running_loop().create_task(self._serve(arrival))
            arrival.task = task
            self._running[task] = arrival.request.client
            task.add_done_callback(partial(self._done, arrival))

    def _done(self, arrival: Arrival, task: asyncio.Task[None]) -> None:
        del self._running[task]
        # A task that is cancelled before its first step ends nothing itself.
        unheard = task.cancelled() and self._stopped
        self._end(arrival, EngineStoppedError(_STOPPED) if unheard else None)
        self._admit()

    def _leave(self, arrival: Arrival) -> None:
        """The client has gone."""
        if arrival.task is not None:
            arrival.task.cancel()
        else:
            self._end(arrival)

    def _end(self, arrival: Waiting, error: EngineError | None = None) -> None:
        """The last of a request: its edits are not its any more. May be called twice."""
        assert isinstance(arrival, Arrival)
        with self._lock:
            placed, arrival.edits = arrival.edits.placed, RequestEdits()
            self._columns.release(placed)
        if error is not None:
            self._put(arrival, error)

    def _put(self, arrival: Arrival, item: EngineToken | EngineError) -> None:
        """Hand something to a client, together with what others get in this turn of the loop."""
        self._courier.put(arrival.outbox, item)
        if not self._flushing:
            self._flushing = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        self._courier.deliver()

    async def _register(self, profile: Profile) -> None:
        assert self._registering is not None
        async with self._registering:
            with self._lock:
                placed = self._columns.place(profile.edits)
                drop, self._columns.removed = self._columns.removed, []

            def find(edits: Iterable[AppliedEdit]) -> RequestEdits:
                with self._lock:
                    return self._find_all(edits)

            try:
                await self._client.put_edits(placed, drop)
                await check_profile(self._client, self.lm, profile, find)
            except BaseException as error:
                with self._lock:
                    self._columns.take_out(placed)
                if isinstance(error, EngineError) and not isinstance(error, StepFailedError):
                    raise
                if isinstance(error, ValueError | StepFailedError):
                    raise ProfileError(
                        f"profile {profile.name} fails its self-test on vLLM: {error}"
                    ) from error
                raise

    def _find_all(self, edits: Iterable[AppliedEdit]) -> RequestEdits:
        """Where these edits are; call it under the lock. Raises ProfileRemovedError."""
        applied = tuple(a for a in effective_edits(edits) if a.edit.rank + a.edit.has_shift)
        return RequestEdits(applied, tuple(map(self._find, (a.edit for a in applied))))

    def _find(self, edit: Edit) -> Any:
        placed = self._columns.find(edit)
        if placed is None:
            raise ProfileRemovedError(f"the edit at {edit.site} is not registered with this engine")
        return placed

    async def _serve(self, arrival: Arrival) -> None:
        """One request from admission to its end; what it raises goes to the client."""
        request = arrival.request
        error: EngineError | None = None
        try:
            seconds = request.deadline - time.monotonic()
            async with asyncio.timeout(None if seconds == math.inf else seconds):
                queued = time.monotonic() - arrival.since
                async for token in self._replies.tokens(request, arrival.edits, queued):
                    self._put(arrival, token)
        except TimeoutError:
            error = DeadlineExceededError(_TOO_LATE)
        except asyncio.CancelledError:
            error = EngineStoppedError(_STOPPED) if self._stopped else None
        except EngineDeadError:
            error = EngineStoppedError(_STOPPED)
        except EngineError as raised:
            error = raised
        except Exception as raised:
            logger.exception("a request failed")
            error = StepFailedError(f"{type(raised).__name__}: {raised}")
        finally:
            self._end(arrival, error)


def _check_room(layout: Layout, profiles: Iterable[Profile]) -> None:
    """Raise ValueError if these profiles do not all fit."""
    columns = Columns(layout)
    for profile in profiles:
        try:
            columns.place(profile.edits)
        except RankLimitError as error:
            raise ValueError(f"profile {profile.name}: {error}") from None


def _start_error(error: BaseException) -> BaseException:
    """What to tell of a start that failed: vLLM's processes say why only in their logs."""
    if isinstance(error, NotImplementedError):
        return ValueError(str(error))
    if isinstance(error, ValidationError):
        told = "; ".join(describe(each, field_path(each["loc"])) for each in error.errors())
        return ValueError(f"vLLM refuses its arguments: {told}")
    if isinstance(error, ValueError):
        return error
    return ValueError(
        f"vLLM could not be started ({type(error).__name__}: {error}); see its log above"
    )
