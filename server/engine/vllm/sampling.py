"""A request's sampling as vLLM's, and vLLM's tokens as the engine's."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from vllm.outputs import CompletionOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

from server.engine.base import (
    EngineRequest,
    EngineStoppedError,
    EngineToken,
    FinishReason,
    StepFailedError,
)
from server.engine.sampling import is_greedy
from server.engine.vllm.wire import ARGUMENT, RowSteering


def sampling_params(
    request: EngineRequest, steering: RowSteering, end_tokens: Collection[int]
) -> SamplingParams:
    """vLLM applies them in the order of `server.engine.sampling`.

    Args:
        end_tokens: what ends a reply; no other token does.
    """
    asked = request.sampling
    constraint = request.constraint
    return SamplingParams(
        temperature=0.0 if is_greedy(asked) else asked.temperature,
        top_p=asked.top_p,
        top_k=asked.top_k,
        min_p=asked.min_p,
        presence_penalty=asked.presence_penalty,
        frequency_penalty=asked.frequency_penalty,
        repetition_penalty=asked.repetition_penalty,
        logit_bias=dict(asked.logit_bias) or None,
        seed=None if asked.seed is None else asked.seed % 2**63,
        max_tokens=asked.max_tokens,
        logprobs=asked.top_logprobs,
        ignore_eos=True,  # the tokenizer's, which is only one
        stop_token_ids=sorted(end_tokens),
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        structured_outputs=None
        if constraint is None
        else StructuredOutputsParams(grammar=constraint.grammar),
        extra_args={ARGUMENT: steering.to_json()},
    )


def tokens_of(output: CompletionOutput, top: int) -> Iterator[EngineToken]:
    """The tokens that vLLM has chosen since the last output, without scores.

    Raises StepFailedError where the model's values are not finite, or vLLM gave up;
    EngineStoppedError where it aborted what nobody asked it to, as it does when it goes down.
    """
    finish: FinishReason | None = None
    if output.finish_reason is not None:
        if output.finish_reason == "abort":
            raise EngineStoppedError("vLLM has stopped")
        if output.finish_reason not in ("stop", "length"):
            raise StepFailedError(f"vLLM ended the request: {output.finish_reason}")
        finish = "stop" if output.finish_reason == "stop" else "length"
    ids = list(output.token_ids)
    assert output.logprobs is not None and len(output.logprobs) == len(ids)
    for i, (token_id, found) in enumerate(zip(ids, output.logprobs, strict=True)):
        logprob = float(found[token_id].logprob)
        if math.isnan(logprob) or logprob == math.inf:
            raise StepFailedError("the model's logits are not finite")
        yield EngineToken(
            token_id=token_id,
            logprob=logprob,
            top_logprobs=_top(found, top),
            finish_reason=finish if i == len(ids) - 1 else None,
        )


def _top(found: Mapping[int, Any], count: int) -> tuple[tuple[int, float], ...]:
    best = sorted(found.items(), key=lambda item: -item[1].logprob)
    return tuple((token_id, float(entry.logprob)) for token_id, entry in best[:count])
