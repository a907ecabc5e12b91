"""Answer many requests on an engine and wait for all of them: fits and evaluation, not serving.

Requests of all profiles are in flight together, so their rows share forward passes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from server.engine.base import (
    Engine,
    EngineRequest,
    EngineToken,
    PromptScores,
    PromptTooLongError,
    Sampling,
    StepFailedError,
)
from steering.evaluate.responses import Question, Reply

IN_FLIGHT_PER_SLOT = 2
"""Requests submitted at once for each slot, so that a slot that falls free is filled at once."""


@dataclass(frozen=True)
class BatchAnswer:
    """What became of a request.

    Args:
        token_ids: with the end token, if there was one.
        finish_reason: `stop`, `length`, or `error`, which `error` explains.
        seconds: from the first token to the last.
    """

    token_ids: tuple[int, ...]
    finish_reason: str
    seconds: float = 0.0
    scores: PromptScores | None = None
    error: str = ""


def answer_all(
    engine: Engine,
    requests: Sequence[EngineRequest],
    on_done: Callable[[int, BatchAnswer], object] | None = None,
) -> list[BatchAnswer]:
    """Answers in the order of the requests. The engine must have been started.

    A request that cannot run, or whose step failed, is an answer with an `error`; an engine that
    stops raises EngineStoppedError.

    Args:
        on_done: called with index and answer as each request ends, in the order in which they do.
    """
    answers: dict[int, BatchAnswer] = {}

    async def work(queue: Iterator[tuple[int, EngineRequest]]) -> None:
        for index, request in queue:
            answers[index] = await _answer(engine, request)
            if on_done is not None:
                on_done(index, answers[index])

    async def run() -> None:
        queue = enumerate(requests)
        workers = min(len(requests), IN_FLIGHT_PER_SLOT * engine.stats().slots)
        # A group, so that one failure or an interrupt cancels what is under way.
        async with asyncio.TaskGroup() as group:
            for _ in range(workers):
                group.create_task(work(queue))

    try:
        asyncio.run(run())
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from errors
    return [answers[index] for index in range(len(requests))]


async def _answer(engine: Engine, request: EngineRequest) -> BatchAnswer:
    tokens: list[EngineToken] = []
    first = time.monotonic()
    try:
        async for token in engine.generate(request):
            if not tokens:
                first = time.monotonic()
            tokens.append(token)
    except (PromptTooLongError, StepFailedError, ValueError) as error:
        return BatchAnswer((), "error", error=str(error))
    return BatchAnswer(
        tuple(token.token_id for token in tokens),
        tokens[-1].finish_reason or "length",
        time.monotonic() - first,
        tokens[0].scores,
    )


class EngineAnswerer:
    """An engine as `steering.evaluate` wants it.

    Args:
        probes: whether the monitor's probes are read.
    """

    def __init__(self, engine: Engine, *, probes: bool = True) -> None:
        self.engine = engine
        self.probes = probes

    def __call__(
        self, questions: Sequence[Question], on_done: Callable[[int, Reply], object]
    ) -> None:
        requests = [
            EngineRequest(
                request_id=f"eval-{i}",
                prompt_ids=question.prompt_ids,
                sampling=Sampling(
                    temperature=question.decoding.temperature,
                    top_p=question.decoding.top_p,
                    top_k=question.decoding.top_k,
                    seed=question.seed,
                    max_tokens=question.decoding.max_tokens,
                ),
                edits=question.edits,
                answer_probe=question.answer_probe if self.probes else None,
                benign_read="always" if self.probes else "off",
            )
            for i, question in enumerate(questions)
        ]
        answer_all(self.engine, requests, lambda i, answer: on_done(i, _reply(answer)))


def _reply(answer: BatchAnswer) -> Reply:
    scores = answer.scores
    return Reply(
        token_ids=answer.token_ids,
        finish_reason=answer.finish_reason,
        seconds=answer.seconds,
        error=answer.error,
        scores=None
        if scores is None
        else {
            "refusal_score": scores.refusal_score,
            "answer_probability": scores.answer_probability,
            "benign_probability": scores.benign_probability,
        },
    )
