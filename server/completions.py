"""Answers in the shape of OpenAI's older completions, whole or as server-sent events."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from server.chat import LEAST_LOGPROB
from server.reply import Answer, Reply
from server.reply_text import TextToken
from server.responses import Completion, CompletionChoice, CompletionLogprobs
from server.sse import event, guarded
from server.trace import trace_of, traced_receipt


async def complete_text(answer: Answer) -> Completion:
    """The whole answer in one piece. Raises ApiError."""
    async for _ in answer.pieces():
        pass
    return Completion(
        **answer.head,
        choices=[_choice(answer, reply) for reply in answer.replies],
        usage=answer.usage,
        steering=answer.receipt,
    )


def _choice(answer: Answer, reply: Reply) -> CompletionChoice:
    return CompletionChoice(
        index=reply.index,
        text=reply.text,
        logprobs=completion_logprobs(answer, reply.tokens),
        finish_reason=reply.finish_reason,
        steering=traced_receipt(answer, reply),
    )


def stream_text(answer: Answer) -> AsyncGenerator[str, None]:
    """The answer in server-sent events. Its status is 200 by now, so errors are events too."""
    return guarded(_events(answer), answer.prepared.id)


async def _events(answer: Answer) -> AsyncGenerator[str, None]:
    head = {**answer.head, "object": "text_completion"}
    with_usage = answer.prepared.body.include_usage
    usage = {"usage": None} if with_usage else {}
    under_way = len(answer.replies)
    async with aclosing(answer.pieces()) as pieces:
        async for reply, piece in pieces:
            choice: dict[str, Any] = {"index": reply.index, "text": "", "logprobs": None}
            if piece is not None:
                logprobs = completion_logprobs(answer, piece.tokens)
                trace = trace_of(answer, piece.tokens)
                if not (piece.text or (logprobs and logprobs.tokens) or trace):
                    continue
                if trace is not None:
                    choice["steering"] = {"trace": [entry.model_dump() for entry in trace]}
                choice |= {"text": piece.text, "logprobs": logprobs and logprobs.model_dump()}
                yield event({**head, "choices": [choice | {"finish_reason": None}], **usage})
                continue
            under_way -= 1
            choice["finish_reason"] = reply.finish_reason
            if (own := answer.choice_receipt(reply)) is not None:
                choice["steering"] = own.model_dump()
            receipt = {} if under_way else {"steering": answer.receipt.model_dump()}
            yield event({**head, "choices": [choice], **usage, **receipt})
    if with_usage:
        yield event({**head, "choices": [], "usage": answer.usage.model_dump()})


def completion_logprobs(answer: Answer, tokens: Sequence[TextToken]) -> CompletionLogprobs | None:
    """Log-probabilities of these tokens, if the request asks for any."""
    if answer.prepared.body.wanted_logprobs is None:
        return None
    text_of = answer.host.token_texts.text_of
    told = [(text_of(t.token.token_id), max(t.token.logprob, LEAST_LOGPROB)) for t in tokens]
    return CompletionLogprobs(
        tokens=[text for text, _ in told],
        token_logprobs=[logprob for _, logprob in told],
        # OpenAI's: the token that was chosen is always among them.
        top_logprobs=[
            {text_of(i): max(p, LEAST_LOGPROB) for i, p in t.token.top_logprobs} | dict([chosen])
            for t, chosen in zip(tokens, told, strict=True)
        ],
        text_offset=[t.offset for t in tokens],
    )
