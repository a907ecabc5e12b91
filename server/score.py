"""Probes and refusal score of a conversation, without an answer.

The engine reads the prompt in the same batches as everybody's, and the request ends with the one
token that its last forward call chooses, which nobody sees: there is no decoding. Scores enter no
metric of the profile's, since nothing was answered.
"""

from __future__ import annotations

from contextlib import aclosing

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response

from server.access import caller_of
from server.engine.base import EngineError, EngineStoppedError, EngineToken, PromptScores
from server.hosting import Host
from server.openapi import errors
from server.prepare import Prepared, prepare
from server.profiles import finite
from server.protocol import ScoreRequest, asked_profile
from server.reply import answered_by, audit_fields
from server.responses import PromptTokensDetails, Score, Usage
from server.sse import ClientGoneError, unless_gone


def add_score(app: FastAPI, host: Host) -> None:
    """Add `POST /v1/steering/score`."""

    @app.post(
        "/v1/steering/score",
        response_model=Score,
        responses=errors(400, 404, 413, 429, 503, 504),
        tags=["steering"],
        summary="Read a conversation without answering it",
    )
    async def score(body: ScoreRequest, request: Request) -> Response:
        request.state.asked = asked_profile(body.model, body.steering)
        prepared = await prepare(host, body.as_chat(), caller_of(request))
        charge = prepared.caller.reserve(len(prepared.request.prompt_ids))
        try:
            token = await unless_gone(_read(host, prepared), request.receive)
        except ClientGoneError:
            return Response(status_code=499)  # as in chat: nobody reads this
        except EngineError:
            charge.settle(0)
            raise
        request.state.noted = True
        host.access.audit.write(
            request_id=request.state.request_id, **audit_fields(prepared), outcome="scored"
        )
        return JSONResponse(_answer(host, prepared, token).model_dump())


async def _read(host: Host, prepared: Prepared) -> EngineToken:
    """Raises EngineError."""
    async with aclosing(host.engine.generate(prepared.request)) as tokens:
        async for token in tokens:
            return token
    raise EngineStoppedError("it stopped in the middle of a prompt")


def _answer(host: Host, prepared: Prepared, token: EngineToken) -> Score:
    scores = token.scores or PromptScores()
    length = len(prepared.request.prompt_ids)
    return Score(
        **answered_by(host, prepared),
        id=prepared.request.request_id.replace("chatcmpl-", "score-"),
        model=prepared.body.model,
        refusal_score=finite(scores.refusal_score),
        answer_probability=finite(scores.answer_probability),
        benign_probability=finite(scores.benign_probability),
        prompt_class=host.prompt_class(scores.benign_probability),
        edit_norm=finite(scores.edit_norm),
        gate_values=finite(list(scores.gate_values)),
        usage=Usage(
            prompt_tokens=length,
            completion_tokens=0,
            total_tokens=length,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=token.cached_tokens or 0),
        ),
    )
