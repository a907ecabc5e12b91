"""The vLLM engine: stock vLLM, with workers that edit.

One thread owns the event loop on which vLLM's client runs. This file is what other threads see of
it: admission, the queue (the local engine's: vLLM knows of no clients, and gets no more requests
than it can run), starting and stopping; and what becomes of one request.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, TypeVar

from vllm.v1.engine.exceptions import EngineDeadError

from server.engine.base import (
    DeadlineExceededError,
    EngineError,
    EngineRequest,
    EngineStats,
    EngineStoppedError,
    EngineToken,
    PromptScores,
    PromptTooLongError,
    RankLimitError,
    StepFailedError,
    TokenTrace,
)
from server.engine.queue import FairQueue
from server.engine.rows import Waiting
from server.engine.sampling import check_sampling
from server.engine.stream import Courier, Outbox, TokenStream
from server.engine.vllm.client import Ask, Client
from server.engine.vllm.columns import Columns
from server.engine.vllm.layout import plan_layout
from server.engine.vllm.options import VllmOptions
from server.engine.vllm.readings import Readings
from server.engine.vllm.reads import Reads
from server.engine.vllm.sampling import tokens_of
from server.engine.vllm.selftest import check_profile
from steering.edit import AppliedEdit, Edit, effective_edits
from steering.models import LanguageModel
from steering.monitor import Monitor
from steering.profile import Profile, ProfileError

logger = logging.getLogger(__name__)

T = TypeVar("T")

_HEARTBEAT = 0.1
"""Seconds between looks at deadlines of requests that wait, and at whether vLLM lives."""
_UNSPLIT = 2048


class VllmEngine:
    """Serves one model from vLLM's processes.

    Args:
        lm: the model's tokenizer, sites and configuration; its weights are not used and may be on
            the meta device.
        profiles: to be served from the start; their sites are those that can be edited.
        monitor: what to read of every prompt; without one, scores are None.

    Raises ValueError for options that make no sense.
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
        self.max_unsplit_prompt = options.max_unsplit_prompt or min(self._max_model_len, _UNSPLIT)
        self.options = replace(
            options,
            max_model_len=self._max_model_len,
            max_unsplit_prompt=self.max_unsplit_prompt,
        )
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
        self._columns = Columns(self.layout)
        self._reads = Reads(monitor)
        self._vocabulary = lm.model.get_input_embeddings().num_embeddings
        # Some tokenizers have one that the model has no logit for.
        ends = [token for token in lm.eos_token_ids if token < self._vocabulary]
        self._client = Client(self.options, self.layout, monitor, ends)

        # Shared between threads, under this lock: the queue, the columns and the state.
        self._lock = threading.Lock()
        self._waiting = FairQueue(options.max_waiting)
        self._thread: threading.Thread | None = None
        self._ready = False
        self._stopped = False

        # The engine thread's own.
        self._loop: asyncio.AbstractEventLoop | None = None
        self._courier = Courier()
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

        Raises ValueError for what vLLM cannot serve and for profiles that together need more
        columns at a site than `max_site_rank`, ProfileError for one that vLLM does not apply.
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
        prompt, asked = len(request.prompt_ids), request.sampling.max_tokens
        if prompt < 1:
            raise ValueError("the prompt is empty")
        check_sampling(request.sampling, self._vocabulary)
        if prompt + asked > self._max_model_len:
            raise PromptTooLongError(
                f"the prompt has {prompt} tokens and {asked} more were asked for; this server "
                f"takes {self._max_model_len} together (--max-model-len)"
            )
        if min(request.prompt_ids) < 0 or max(request.prompt_ids) >= self._vocabulary:
            raise ValueError(f"token ids must be between 0 and {self._vocabulary - 1}")
        edits = [applied.edit for applied in effective_edits(request.edits)]
        if any(edit.needs_whole_prompt for edit in edits) and prompt > self.max_unsplit_prompt:
            raise PromptTooLongError(
                f"this profile's gate reads the whole prompt at once, and {prompt} tokens are more "
                f"than {self.max_unsplit_prompt} (--max-unsplit-prompt)"
            )
        with self._lock:
            self._ask(request.edits)

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
        arrivals = [Waiting(request, _Outbox(loop)) for request in requests]
        with self._lock:
            if not self.healthy():
                raise EngineStoppedError("the engine is not running")
            assert self._loop is not None
            self._waiting.put(*arrivals)
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
        return asyncio.run_coroutine_threadsafe(make(), self._loop).result()

    # The engine's thread.

    async def _main(self, started: Future[None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop, self._registering = asyncio.Event(), asyncio.Lock()
        try:
            await self._client.start()
            for profile in self.profiles:
                await self._register(profile)
                logger.info("profile %s passed its self-test on vLLM", profile.name)
        except BaseException as error:
            self._client.close()
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

    async def _stop_serving(self) -> None:
        with self._lock:
            self._stopped = True
            waiting = self._waiting.drain()
        stopped = EngineStoppedError("the engine stopped before this request was done")
        for one in waiting:
            self._courier.put(one.outbox, stopped)
        self._courier.deliver()
        tasks = list(self._running)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._client.close()

    def _refuse_late(self) -> None:
        with self._lock:
            late = self._waiting.take_late()
        for one in late:
            self._courier.put(one.outbox, DeadlineExceededError("its time was up"))
        self._courier.deliver()

    def _admit(self) -> None:
        self._refuse_late()
        while len(self._running) < self.capacity and not self._stopped:
            with self._lock:
                waiting = self._waiting.pop(Counter(self._running.values()))
            if waiting is None:
                return
            task = asyncio.get_running_loop().create_task(self._serve(waiting))
            self._running[task] = waiting.request.client
            task.add_done_callback(self._done)
            assert isinstance(waiting.outbox, _Outbox)
            waiting.outbox.attend(asyncio.get_running_loop(), task)

    def _done(self, task: asyncio.Task[None]) -> None:
        del self._running[task]
        self._admit()

    async def _register(self, profile: Profile) -> None:
        assert self._registering is not None
        async with self._registering:
            with self._lock:
                placed = self._columns.place(profile.edits)
                drop, self._columns.removed = self._columns.removed, []
            try:
                await self._client.put_edits(placed, drop)
                await check_profile(self._client, self.lm, profile, self._ask)
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

    def _ask(self, edits: Iterable[AppliedEdit]) -> Ask:
        """Where these edits are. Raises ValueError for one that is not registered."""
        applied = tuple(a for a in effective_edits(edits) if a.edit.rank + a.edit.has_shift)
        return Ask(applied, tuple(map(self._find, (a.edit for a in applied))))

    def _find(self, edit: Edit) -> Any:
        placed = self._columns.find(edit)
        if placed is None:
            raise ValueError(f"the edit at {edit.site} is not registered with this engine")
        return placed

    async def _serve(self, waiting: Waiting) -> None:
        """One request from admission to its end; what it raises goes to the client."""
        request = waiting.request
        try:
            with self._lock:
                ask = self._ask(request.edits)
                self._columns.use(ask.placed)
            try:
                timeout = request.deadline - time.monotonic()
                async with asyncio.timeout(None if timeout == float("inf") else timeout):
                    async for token in self._tokens(waiting, ask):
                        self._courier.put(waiting.outbox, token)
                        self._courier.deliver()
            finally:
                with self._lock:
                    self._columns.release(ask.placed)
        except TimeoutError:
            self._fail(waiting, DeadlineExceededError("its time was up"))
        except asyncio.CancelledError:
            if self._stopped:
                self._fail(
                    waiting, EngineStoppedError("the engine stopped before this request was done")
                )
        except EngineDeadError:
            self._fail(waiting, EngineStoppedError("vLLM has stopped"))
        except EngineError as error:
            self._fail(waiting, error)
        except Exception as error:
            logger.exception("a request failed")
            self._fail(waiting, StepFailedError(f"{type(error).__name__}: {error}"))

    def _fail(self, waiting: Waiting, error: EngineError) -> None:
        self._courier.put(waiting.outbox, error)
        self._courier.deliver()

    async def _tokens(self, waiting: Waiting, ask: Ask) -> AsyncIterator[EngineToken]:
        request, reads = waiting.request, self._reads
        queued = time.monotonic() - waiting.since
        raw = None
        if reads.needs_raw_pass(request):
            raw = asyncio.create_task(
                self._client.read_prompt(request.prompt_ids, request.deadline)
            )
        report = self.monitor is not None or ask.latches
        try:
            async with self._client.run(request, ask, report=report, trace=request.trace) as (
                outputs,
                readings,
            ):
                number = 0
                async for output in outputs:
                    for token in tokens_of(output.outputs[0], request.sampling.top_logprobs):
                        if number == 0:
                            scores, trace = await self._first(request, ask, readings, raw, report)
                            token = replace(
                                token,
                                scores=scores,
                                trace=trace,
                                queue_seconds=queued,
                                cached_tokens=output.num_cached_tokens or 0,
                            )
                        elif request.trace:
                            trace = reads.trace(request, await readings.of(number))
                            token = replace(token, trace=trace)
                        yield token
                        number += 1
        finally:
            if raw is not None and not raw.done():
                raw.cancel()

    async def _first(
        self,
        request: EngineRequest,
        ask: Ask,
        readings: Readings,
        raw: asyncio.Task[dict[str, float]] | None,
        report: bool,
    ) -> tuple[PromptScores, TokenTrace | None]:
        """What comes with the first token."""
        read = await readings.of(0) if report or request.trace else {}
        scores = self._reads.scores(request, ask, read, {} if raw is None else await raw)
        return scores, self._reads.trace(request, read) if request.trace else None


class _Outbox(Outbox):
    """An outbox whose client's leaving ends the task that fills it, at once."""

    _cancelled = False
    _attending: tuple[asyncio.AbstractEventLoop, asyncio.Task[None]] | None = None

    def attend(self, loop: asyncio.AbstractEventLoop, task: asyncio.Task[None]) -> None:
        self._attending = loop, task
        if self._cancelled:
            task.cancel()

    @property
    def cancelled(self) -> bool:
        return self._cancelled

    @cancelled.setter
    def cancelled(self, value: bool) -> None:
        self._cancelled = value
        if value and self._attending is not None:
            loop, task = self._attending
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(task.cancel)


def _start_error(error: BaseException) -> BaseException:
    """What to tell of a start that failed: vLLM's processes say why only in their logs."""
    if isinstance(error, RankLimitError | NotImplementedError):
        return ValueError(str(error))
    if isinstance(error, ValueError):
        return error
    return ValueError(
        f"vLLM could not be started ({type(error).__name__}: {error}); see its log above"
    )
