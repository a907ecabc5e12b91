"""vLLM itself, as the engine's event loop sees it: started with our workers, and asked to run."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
import vllm
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.outputs import RequestOutput
from vllm.utils.network_utils import get_ip
from vllm.utils.system_utils import kill_process_tree
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from server.engine.base import (
    MAX_TOP_LOGPROBS,
    EngineRequest,
    EngineStoppedError,
    Sampling,
    StepFailedError,
)
from server.engine.vllm.columns import PlacedEdit
from server.engine.vllm.layout import CONFIG_KEY, Layout, probes_of
from server.engine.vllm.lifeline import when_one_ends
from server.engine.vllm.options import VllmOptions
from server.engine.vllm.readings import Inbox, Readings
from server.engine.vllm.release import check_version
from server.engine.vllm.reports import Receiver
from server.engine.vllm.sampling import sampling_params
from server.engine.vllm.steerer import SPLIT
from server.engine.vllm.wire import RequestEdits, pack_edits, pack_tensors
from steering.monitor import Monitor

_ATTEMPTS = 16
"""How often a prompt that must not be split is submitted before it fails."""


class Client:
    """Used on one event loop. Call `start` first."""

    def __init__(
        self,
        options: VllmOptions,
        layout: Layout,
        monitor: Monitor | None,
        end_tokens: Collection[int],
    ) -> None:
        check_version(vllm.__version__)
        self.options = options
        self.layout = layout
        self.monitor = monitor
        self.end_tokens = end_tokens
        self.workers = options.tensor_parallel_size * options.pipeline_parallel_size
        """Of each replica."""
        self._inbox = Inbox(options.pipeline_parallel_size)
        self._receiver: Receiver | None = None
        self._llm: AsyncLLM | None = None
        self._broken = False
        self._stop_watching: Callable[[], None] = lambda: None

    async def start(self) -> None:
        """Start vLLM. Raises ValueError for arguments that it refuses; other errors of its start
        pass through."""
        # Forked from a process with threads, workers may hang.
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        try:
            args = AsyncEngineArgs(**self._engine_args())
        except TypeError as error:
            raise ValueError(f"vLLM does not take these arguments: {error}") from None
        by_ray = "ray" in (args.distributed_executor_backend, args.data_parallel_backend)
        spread = by_ray or args.nnodes > 1 or args.data_parallel_address is not None
        self._receiver = Receiver(self._inbox.take, get_ip() if spread else None)
        self._llm = AsyncLLM.from_engine_args(args)
        await self._call("steering_connect", self._receiver.address, self._receiver.word)
        if not spread:
            started = [core.pid for core in multiprocessing.active_children()]
            workers = await self._call("steering_end_with", os.getpid(), started)
            # vLLM says that one has died when the others have ended, ten seconds later.
            self._stop_watching = when_one_ends(workers, self._worker_ended)
        await self._call("steering_put_probes", pack_tensors(self._probe_directions()))

    def _engine_args(self) -> dict[str, Any]:
        options = self.options
        return {
            "generation_config": "vllm",
            **options.engine_args,  # before ours: a refused argument may be given as off
            "model": options.model,
            "revision": options.revision,
            "dtype": options.dtype,
            "tensor_parallel_size": options.tensor_parallel_size,
            "pipeline_parallel_size": options.pipeline_parallel_size,
            "data_parallel_size": options.data_parallel_size,
            "max_num_seqs": options.max_num_seqs,
            "max_model_len": options.max_model_len,
            "max_num_batched_tokens": options.max_num_batched_tokens,
            "enable_prefix_caching": options.prefix_caching,
            "gpu_memory_utilization": options.gpu_memory_utilization,
            "enforce_eager": options.enforce_eager,
            "max_logprobs": MAX_TOP_LOGPROBS,
            "scheduling_policy": "priority",
            "structured_outputs_config": {"backend": "guidance"},
            "disable_log_stats": True,
            "worker_cls": "server.engine.vllm.worker.SteeringWorker",
            "compilation_config": options.compilation_config,
            "additional_config": {CONFIG_KEY: self.layout.to_json()},
        }

    def _probe_directions(self) -> dict[str, torch.Tensor]:
        probes = probes_of(self.monitor).values()
        return {
            site: torch.stack([p.direction for p in probes if str(p.site) == site], dim=1)
            for site in self.layout.probes
        }

    @property
    def alive(self) -> bool:
        return self._llm is not None and not self._broken and not self._llm.errored

    def _worker_ended(self) -> None:
        self._broken = True

    async def put_edits(self, placed: Sequence[PlacedEdit], drop: Sequence[int]) -> None:
        """Have every worker write these edits. Raises ValueError if one cannot."""
        results = await self._call("steering_put_edits", pack_edits(placed), list(drop))
        if problems := [problem for problem in results if problem]:
            raise ValueError(problems[0])

    async def _call(self, method: str, *args: Any) -> list[Any]:
        """What a method returns in each worker of each replica."""
        assert self._llm is not None
        core: Any = self._llm.engine_core
        try:
            replies = await core.call_utility_all_async("collective_rpc", method, None, args, None)
        except EngineDeadError:
            raise EngineStoppedError("vLLM has stopped") from None
        return [result for workers in replies for result in workers]

    @contextlib.asynccontextmanager
    async def run(
        self,
        request: EngineRequest,
        edits: RequestEdits,
        *,
        replica: int | None = None,
        endless: bool = False,
        **flags: bool,
    ) -> AsyncIterator[tuple[AsyncIterator[RequestOutput], Readings]]:
        """A request's outputs, and what is read meanwhile; leaving the block cancels it.

        A prompt that must be read in one step, and was split since others had filled that step, is
        tried again, ahead of all that waits. Raises StepFailedError, EngineStoppedError.

        Args:
            replica: to run on; the one with the least to do by default.
            endless: let no token end it.
            flags: of `RowSteering`.
        """
        assert self._llm is not None
        ends = () if endless else self.end_tokens
        for attempt in range(_ATTEMPTS):
            with self._inbox.opened() as readings:
                steering = edits.steering(readings.key, **flags)
                outputs = self._llm.generate(
                    _prompt(request, edits.cache_salt(check=flags.get("check", False))),
                    sampling_params(request, steering, ends),
                    request_id=readings.key,
                    priority=request.priority if attempt == 0 else -1,
                    data_parallel_rank=replica,
                )
                try:
                    first = await self._first(outputs, readings)
                    if first is not None:
                        yield _outputs(first, outputs, readings), readings
                        return
                except EngineDeadError:
                    raise EngineStoppedError("vLLM has stopped") from None
                finally:
                    await outputs.aclose()
        raise StepFailedError(
            "this profile's gate reads the whole prompt in one step, and other prompts left no "
            f"room for it in {_ATTEMPTS}; try again, or raise vLLM's max_num_batched_tokens"
        )

    async def _first(self, outputs: Any, readings: Readings) -> RequestOutput | None:
        """The first output; None if the prompt was split. Raises StepFailedError."""
        first = asyncio.ensure_future(anext(outputs))
        try:
            await asyncio.wait({first, readings.failed}, return_when=asyncio.FIRST_COMPLETED)
            if readings.failed.done() and readings.failed.result() == SPLIT:
                return None
            readings.raise_failure()
            return await first
        finally:
            if not first.done():
                first.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await first

    async def read_prompt(self, request: EngineRequest) -> dict[str, float]:
        """What an unedited pass over a request's prompt shows."""
        sampling = Sampling(temperature=0.0, max_tokens=1)
        request = replace(request, sampling=sampling, edits=(), constraint=None)
        async with self.run(request, RequestEdits(), report=True) as (outputs, readings):
            async for _ in outputs:
                pass
            return await readings.of(0)

    def abandon(self) -> None:
        """Let a start that is under way fail, by ending the processes that this one has started
        through `multiprocessing` (Ray's are not among them). Called from another thread, again
        until it has: vLLM listens to nothing while it loads and compiles, which may take minutes.
        """
        for core in multiprocessing.active_children():
            if core.pid is not None:
                kill_process_tree(core.pid)

    def close(self) -> None:
        llm, self._llm = self._llm, None
        self._stop_watching()
        try:
            if llm is not None:
                llm.shutdown()
        finally:
            if self._receiver is not None:
                self._receiver.close()


def _prompt(request: EngineRequest, salt: str | None) -> dict[str, Any]:
    prompt: dict[str, Any] = {"prompt_token_ids": list(request.prompt_ids)}
    return prompt if salt is None else {**prompt, "cache_salt": salt}


async def _outputs(
    first: RequestOutput, rest: AsyncIterator[RequestOutput], readings: Readings
) -> AsyncIterator[RequestOutput]:
    yield first
    async for output in rest:
        readings.raise_failure()
        yield output
