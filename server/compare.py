"""One conversation under several profiles, in one batch: `POST /v1/steering/compare`.

Each arm is a chat request of its own, prepared, answered, judged, measured and audited as any
other; only their admission is common, all or none. It is no exposure of an experiment.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response

from server.access import Caller, caller_of
from server.compare_protocol import CompareRequest, Comparison, total
from server.errors import ApiError, InternalError, InvalidRequestError
from server.experiments.recording import Recorder
from server.hosting import Host
from server.merge import merged
from server.metrics import Metrics
from server.openapi import errors, events_of
from server.prepare import Prepared, prepare
from server.profiles import finite
from server.reply import Answer, Reply, answered_by, ignored_header, submit
from server.reply_text import TextToken
from server.sse import ClientGoneError, EventStream, event, guarded, unless_gone
from server.trace import trace_of

logger = logging.getLogger(__name__)


class Comparing:
    """The arms of one request under way: read `events` to the end, and `close` in any case.

    Args:
        model: as it is told.
        arms: each with one reply.
        ignored: fields of the request that nobody knows.
    """

    def __init__(self, id: str, model: str, arms: list[Answer], ignored: list[str]) -> None:
        self.id = id
        self.arms = arms
        self.ignored = ignored
        self._created = int(time.time())
        self._model = model
        self._errors: dict[int, ApiError] = {}

    async def events(self) -> AsyncGenerator[dict[str, Any], None]:
        """The events of a stream as they come. An arm that fails ends; the others go on."""
        for i, answer in enumerate(self.arms):
            first = {"role": "assistant", "content": ""}
            yield self._event(i, first, steering=answered_by(answer.host, answer.prepared))
        told: set[int] = set()
        async with aclosing(merged([reply.pieces() for reply in self._replies])) as pieces:
            async for i, item in pieces:
                answer = self.arms[i]
                if item is None or isinstance(item, Exception):
                    yield self._last(i, item)
                    await answer.close()  # what it did not use of the quota is free at once
                    continue
                if i not in told:
                    told.add(i)
                    yield self._event(i, {}, steering={"prompt": _prompt_scores(answer)})
                trace = _trace(answer, item.tokens)
                if item.text or trace:
                    more = {"steering": {"trace": trace}} if trace is not None else {}
                    yield self._event(i, {"content": item.text}, **more)
        yield {**self._head, "choices": [], "usage": self._usage}

    async def whole(self) -> dict[str, Any]:
        """All replies. Raises ApiError only if every arm failed."""
        async with aclosing(self.events()) as events:
            async for _ in events:
                pass
        if len(self._errors) == len(self.arms):
            raise self._errors[0]
        return {
            **self._head,
            "object": "steering.compare",
            "choices": [self._choice(i) for i in range(len(self.arms))],
            "usage": self._usage,
        }

    async def close(self) -> None:
        """Cancel the arms that have not ended."""
        for answer in self.arms:
            await answer.close()

    @property
    def _replies(self) -> list[Reply]:
        return [answer.replies[0] for answer in self.arms]

    @property
    def _head(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "steering.compare.chunk",
            "created": self._created,
            "model": self._model,
        }

    @property
    def _usage(self) -> dict[str, Any]:
        """Of what is charged: an arm that failed costs nothing."""
        paid = [a.usage for i, a in enumerate(self.arms) if i not in self._errors]
        return total(paid).model_dump()

    def _event(self, index: int, delta: dict[str, Any], **more: Any) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "finish_reason": None, **more}
        return {**self._head, "choices": [choice]}

    def _last(self, index: int, error: Exception | None) -> dict[str, Any]:
        """An arm's last event."""
        if error is not None:
            return self._event(index, {}, finish_reason="error", **self._fail(index, error))
        answer = self.arms[index]
        return self._event(
            index,
            {},
            finish_reason=answer.replies[0].finish_reason,
            steering=answer.receipt.model_dump(),
            usage=answer.usage.model_dump(),
        )

    def _fail(self, index: int, error: Exception) -> dict[str, Any]:
        """Note why an arm failed; its error, as clients see it."""
        if not isinstance(error, ApiError):
            logger.error("%s failed", self.arms[index].prepared.id, exc_info=error)
            error = InternalError("Something broke on the server.")
        self._errors[index] = error
        return dict(error.envelope)

    def _choice(self, index: int) -> dict[str, Any]:
        answer, reply = self.arms[index], self._replies[index]
        error = self._errors.get(index)
        trace = _trace(answer, reply.tokens)
        return {
            "index": index,
            "message": {"role": "assistant", "content": reply.text},
            "finish_reason": reply.finish_reason if error is None else "error",
            "steering": answer.receipt.model_dump() | ({} if trace is None else {"trace": trace}),
            "usage": answer.usage.model_dump(),
            **({} if error is None else error.envelope),
        }


def _trace(answer: Answer, tokens: Sequence[TextToken]) -> list[dict[str, Any]] | None:
    entries = trace_of(answer, tokens)
    return None if entries is None else [entry.model_dump() for entry in entries]


def _prompt_scores(answer: Answer) -> dict[str, Any]:
    reply = answer.replies[0]
    scores = reply.scores
    return {
        "refusal_score": finite(scores.refusal_score),
        "answer_probability": finite(scores.answer_probability),
        "benign_probability": finite(scores.benign_probability),
        "prompt_class": reply.prompt_class,
        "edit_norm": finite(scores.edit_norm),
    }


async def compare(
    host: Host,
    metrics: Metrics,
    body: CompareRequest,
    caller: Caller,
    since: float,
    on_end: Callable[[Reply], None] | None = None,
) -> Comparing:
    """Admit a request. Raises ApiError and EngineError, and then nothing was begun."""
    ignored = body.check()
    model = _check_model(host, caller, body.model)
    slots = host.engine.stats().slots
    if len(body.arms) > slots:
        raise InvalidRequestError(
            f"This server computes at most {slots} replies at once (--max-num-seqs), and there are "
            f"{len(body.arms)} arms; send fewer.",
            param="arms",
        )
    id = f"cmp-{uuid.uuid4().hex}"
    prepared: list[Prepared] = []
    for i, arm in enumerate(body.arms):
        try:
            each = await prepare(host, body.as_chat(arm, model), caller)
        except ApiError as error:
            raise _of_arm(error, i, own_messages=arm.messages is not None) from None
        ignored += [name for name in each.ignored if name not in ignored]
        name = f"{id}-{i}"
        requests = tuple(replace(request, request_id=name) for request in each.requests)
        prepared.append(replace(each, id=name, requests=requests))
    return Comparing(id, model, submit(host, metrics, prepared, since, on_end), ignored)


def _check_model(host: Host, caller: Caller, model: str | None) -> str:
    """The served name. Raises ApiError for any other model."""
    profiles = caller.sees(host.profiles)
    served = profiles.served_name
    if model is None or model == served:
        return served
    if model.startswith((f"{served}:", f"{served}@")):
        raise InvalidRequestError(
            f"'arms' name the profiles here; send 'model': {served!r}, or leave it out.",
            param="model",
        )
    profiles.named_by(model)  # raises for what is not served
    return served


def _of_arm(error: ApiError, index: int, *, own_messages: bool) -> ApiError:
    """The error of an arm's chat request, about the field of the comparison that it is about."""
    arm = f"arms[{index}]."
    param = error.param or ""
    error.message = error.message.replace("'steering.", f"'{arm}")
    if param.startswith("steering."):
        error.param = arm + param.removeprefix("steering.")
    elif own_messages and param.startswith("messages"):
        error.message = error.message.replace(f"'{param}", f"'{arm}{param}")
        error.param = arm + param
    return error


def add_compare(app: FastAPI, host: Host, metrics: Metrics, recorder: Recorder) -> None:
    """Add `POST /v1/steering/compare`."""

    @app.post(
        "/v1/steering/compare",
        response_model=Comparison,
        responses={200: _STREAMS, **errors(400, 404, 413, 429, 503, 504)},
        tags=["steering"],
        summary="Answer a conversation under several profiles at once",
    )
    async def compare_profiles(body: CompareRequest, request: Request) -> Response:
        request.state.asked = body.asked_profiles
        caller, arrived = caller_of(request), request.state.arrived
        comparing = await compare(host, metrics, body, caller, arrived, recorder.ended)
        request.state.noted = True
        headers = ignored_header(comparing.ignored)
        if body.streams:
            return EventStream(_lines(comparing), comparing.close, headers)
        return await _respond(comparing, request, headers)


async def _respond(comparing: Comparing, request: Request, headers: Mapping[str, str]) -> Response:
    try:
        whole = await unless_gone(comparing.whole(), request.receive)
    except ClientGoneError:
        return Response(status_code=499)  # as in chat: nobody reads this
    finally:
        await comparing.close()
    return JSONResponse(whole, headers=headers)


def _lines(comparing: Comparing) -> AsyncGenerator[str, None]:
    async def lines() -> AsyncGenerator[str, None]:
        async with aclosing(comparing.events()) as events:
            async for each in events:
                yield event(each)

    return guarded(lines(), comparing.id)


_STREAMS = {
    "description": "The events of a stream, then `data: [DONE]`; with `stream` false the whole.",
    "content": events_of("ComparisonChunk"),
    "headers": {
        name: {"schema": {"type": "string"}, "description": description}
        for name, description in (
            ("X-Request-Id", "Of this request: the client's own if sane."),
            ("X-Ignored-Fields", "Unknown fields of the request, if there were any."),
        )
    },
}
