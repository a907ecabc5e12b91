"""vLLM's workers, with edits: `worker_cls` of a server that steers.

The model gets its programs after it was loaded, and before vLLM profiles, compiles or captures
anything. Then four calls of the model runner are wrapped: what a step is (`execute_model`), the
moment when the order of its tokens is final (`_prepare_inputs`, or `prepare_inputs` in the second
model runner), runs over nobody's tokens (`_dummy_run`), and the model's `compute_logits`, after
which everything has been read.

The second model runner (`VLLM_USE_V2_MODEL_RUNNER`) keeps other state and numbers requests
otherwise, but tells the same at these four points; where it cannot be used, 0 in that variable
brings back the first.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from vllm.distributed.parallel_state import get_pp_group, get_tensor_model_parallel_rank
from vllm.platforms import current_platform

from server.engine.vllm.hooks import decoder_layers
from server.engine.vllm.layout import Layout
from server.engine.vllm.scores import Sender
from server.engine.vllm.steerer import Steerer
from server.engine.vllm.wire import ARGUMENT

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker

CONFIG = "steering"
"""Where the layout is in vLLM's `additional_config`, which is part of its compile cache's key."""


class SteeringWorker(PlatformWorker):  # type: ignore[misc]
    """A worker of this platform whose model applies edits."""

    steerer: Steerer

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        runner, config = self.model_runner, self.vllm_config
        model = runner.get_model()
        blocks = decoder_layers(model)
        inner = next(module for module in model.modules() if getattr(module, "layers", 0) is blocks)
        first, end = getattr(inner, "start_layer", 0), getattr(inner, "end_layer", len(blocks))
        captured = config.compilation_config.max_cudagraph_capture_size or 0
        self.steerer = Steerer(
            Layout.from_json(config.additional_config[CONFIG]),
            {i: blocks[i] for i in range(first, end)},
            tokens=max(runner.max_num_tokens, captured),
            dtype=self.model_config.dtype,
            device=self.device,
            reads=get_tensor_model_parallel_rank() == 0,
        )
        steer(runner, self.steerer, last_stage=get_pp_group().is_last_rank)

    # Called by the server, through vLLM's `collective_rpc`.

    def steering_connect(self, address: str, word: str) -> str:
        """Send reports there. Returns which model runner this is."""
        self.steerer.send = Sender(address, word)
        return "v2" if self.use_v2_model_runner else "v1"

    def steering_put_probes(self, data: bytes) -> None:
        self.steerer.put_probes(data)

    def steering_put_edits(self, data: bytes, drop: list[int]) -> str:
        """Returns why the edits cannot be applied, or nothing."""
        try:
            self.steerer.put_edits(data, drop)
        except ValueError as error:
            return str(error)
        return ""


def steer(runner: Any, steerer: Steerer, *, last_stage: bool) -> None:
    """Let a model runner, the first or the second, tell the steerer what it does.

    Raises RuntimeError if it is neither.
    """
    second = hasattr(runner, "prepare_inputs")
    prepare = "prepare_inputs" if second else "_prepare_inputs"
    for name in (prepare, "execute_model", "_dummy_run"):
        if not callable(getattr(runner, name, None)):
            raise RuntimeError(f"vLLM's {type(runner).__name__} has no {name} to wrap")

    def begin(scheduler_output: Any, *_args: Any, **_kwargs: Any) -> None:
        steerer.begin(
            (
                (new.req_id, new.prompt_len, _asked(new.sampling_params))
                for new in scheduler_output.scheduled_new_reqs
            ),
            scheduler_output.finished_req_ids,
        )

    def fill_first(_scheduler_output: Any, counts: Any, *_args: Any, **_kwargs: Any) -> None:
        batch = runner.input_batch
        starts = batch.num_computed_tokens_cpu[: batch.num_reqs]
        steerer.fill(batch.req_ids, starts, counts)

    def fill_second(batch: Any) -> None:
        steerer.fill(batch.req_ids, batch.num_computed_tokens_np, batch.num_scheduled_tokens)

    _wrap(runner, "execute_model", before=begin)
    if second:
        _wrap(runner, prepare, after=fill_second)
    else:
        _wrap(runner, prepare, before=fill_first)
    _wrap(runner, "_dummy_run", before=lambda *_args, **_kwargs: steerer.clear())
    if last_stage:
        _wrap(runner.get_model(), "compute_logits", after=steerer.collect)
    else:
        _wrap(runner, "execute_model", after=lambda _output: steerer.collect(None))


def _asked(sampling_params: Any) -> Any:
    extra = None if sampling_params is None else sampling_params.extra_args
    return (extra or {}).get(ARGUMENT)


def _wrap(
    owner: Any,
    name: str,
    *,
    before: Callable[..., None] | None = None,
    after: Callable[[Any], None] | None = None,
) -> None:
    """Replace a method of this one object by itself with something before or after it."""
    original = getattr(owner, name)

    @wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if before is not None:
            before(*args, **kwargs)
        output = original(*args, **kwargs)
        if after is not None:
            after(output)
        return output

    # Past `nn.Module.__setattr__`, which is for parameters and modules.
    object.__setattr__(owner, name, wrapped)
