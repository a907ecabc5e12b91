"""How a steerer learns what vLLM's model runner is about to do. Needs no vLLM itself.

Four calls are wrapped: what a step is (`execute_model`), the moment when the order of its tokens is
final (`_prepare_inputs`, or `prepare_inputs` in the second model runner), runs over nobody's tokens
(`_dummy_run`), and the model's `compute_logits`, after which everything has been read.

The second model runner (vLLM's choice where Triton is) keeps other state and orders requests
otherwise, but tells the same at these four points. Where it cannot be used all the same,
`VLLM_USE_V2_MODEL_RUNNER=0` brings back the first.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from server.engine.vllm.steerer import Steerer
from server.engine.vllm.wire import ARGUMENT


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
