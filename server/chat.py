"""Answers in the shape of OpenAI's chat completions, whole or as server-sent events."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from typing import Any

from server.reply import Answer, Reply
from server.reply_text import TextToken
from server.responses import (
    ChatCompletion,
    ChatLogprobs,
    Choice,
    ReplyMessage,
    TokenLogprob,
    TopLogprob,
)
from server.sse import event, guarded
from server.token_text import TokenTexts
from server.tool_parsers import Call
from server.trace import trace_of, traced_receipt

LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON has no word for, as in OpenAI's API."""


async def complete(answer: Answer) -> ChatCompletion:
    """The whole answer in one piece. Raises ApiError."""
    async for _ in answer.pieces():
        pass
    return ChatCompletion(
        **answer.head,
        choices=[_choice(answer, reply) for reply in answer.replies],
        usage=answer.usage,
        steering=answer.receipt,
    )


def _choice(answer: Answer, reply: Reply) -> Choice:
    message = ReplyMessage(
        content=None if reply.calls and not reply.text else reply.text,
        tool_calls=reply.calls or None,
    )
    return Choice(
        index=reply.index,
        message=message,
        logprobs=chat_logprobs(answer, reply.tokens),
        finish_reason=reply.told_finish_reason,
        steering=traced_receipt(answer, reply),
    )


def stream(answer: Answer) -> AsyncGenerator[str, None]:
    """The answer in server-sent events. Its status is 200 by now, so errors are events too."""
    return guarded(_events(answer), answer.prepared.id)


async def _events(answer: Answer) -> AsyncGenerator[str, None]:
    head = {**answer.head, "object": "chat.completion.chunk"}
    with_usage = answer.prepared.body.include_usage
    # OpenAI's: with `include_usage`, every chunk has the key.
    usage = {"usage": None} if with_usage else {}

    def chunk(reply: Reply, delta: dict[str, Any], **more: Any) -> dict[str, Any]:
        return {
            "index": reply.index,
            "delta": delta,
            "logprobs": None,
            "finish_reason": None,
        } | more

    for reply in answer.replies:
        first = chunk(reply, {"role": "assistant", "content": ""})
        yield event({**head, "choices": [first], **usage})
    under_way = len(answer.replies)
    async with aclosing(answer.pieces()) as pieces:
        async for reply, piece in pieces:
            if piece is not None:
                logprobs = chat_logprobs(answer, piece.tokens)
                trace = trace_of(answer, piece.tokens)
                if piece.text or (logprobs and logprobs.content) or trace:
                    choice = chunk(
                        reply, {"content": piece.text}, logprobs=logprobs and logprobs.model_dump()
                    )
                    if trace is not None:
                        choice["steering"] = {"trace": [entry.model_dump() for entry in trace]}
                    yield event({**head, "choices": [choice], **usage})
                for call in piece.calls:
                    for delta in _call_deltas(call, reply.calls[call.index].id):
                        choice = chunk(reply, {"tool_calls": [delta]})
                        yield event({**head, "choices": [choice], **usage})
                continue
            under_way -= 1
            choice = chunk(reply, {}, finish_reason=reply.told_finish_reason)
            if (own := answer.choice_receipt(reply)) is not None:
                choice["steering"] = own.model_dump()
            receipt = {} if under_way else {"steering": answer.receipt.model_dump()}
            yield event({**head, "choices": [choice], **usage, **receipt})
    if with_usage:
        yield event({**head, "choices": [], "usage": answer.usage.model_dump()})


def _call_deltas(call: Call, call_id: str) -> Iterator[dict[str, Any]]:
    """As OpenAI streams a call: id and name first, then the arguments."""
    function = {"name": call.name, "arguments": ""}
    yield {"index": call.index, "id": call_id, "type": "function", "function": function}
    yield {"index": call.index, "function": {"arguments": call.arguments}}


def chat_logprobs(answer: Answer, tokens: Sequence[TextToken]) -> ChatLogprobs | None:
    """Log-probabilities of these tokens, if the request asks for any."""
    if answer.prepared.body.wanted_logprobs is None:
        return None
    texts = answer.host.token_texts
    return ChatLogprobs(
        content=[
            TokenLogprob(
                **_told(texts, t.token.token_id, t.token.logprob).model_dump(),
                top_logprobs=[_told(texts, i, p) for i, p in t.token.top_logprobs],
            )
            for t in tokens
        ]
    )


def _told(texts: TokenTexts, token_id: int, logprob: float) -> TopLogprob:
    value = texts.bytes_of(token_id)
    return TopLogprob(
        token=texts.text_of(token_id),
        logprob=max(logprob, LEAST_LOGPROB),
        bytes=None if value is None else list(value),
    )
