"""The trace of a reply, token by token, as clients get it."""

from __future__ import annotations

from collections.abc import Sequence

from server.engine.base import TokenTrace
from server.profiles import finite
from server.reply import Answer, Reply
from server.reply_text import TextToken
from server.responses import ChoiceReceipt, TracedReceipt, TracedToken


def trace_of(answer: Answer, tokens: Sequence[TextToken]) -> list[TracedToken] | None:
    """What was read for these tokens, if the request asks for it."""
    if not answer.prepared.body.wants_trace:
        return None
    text_of = answer.host.token_texts.text_of
    entries: list[TracedToken] = []
    for each in tokens:
        read = each.token.trace or TokenTrace()
        entries.append(
            TracedToken(
                token=text_of(each.token.token_id),
                offset=each.offset,
                answer_probability=finite(read.answer_probability),
                benign_probability=finite(read.benign_probability),
                edit_norm=finite(read.edit_norm),
            )
        )
    return entries


def traced_receipt(answer: Answer, reply: Reply) -> ChoiceReceipt | None:
    """A choice's own part of the receipt of a whole reply, with its trace if there is one."""
    own, trace = answer.choice_receipt(reply), trace_of(answer, reply.tokens)
    if trace is None:
        return own
    return TracedReceipt(**reply.receipt.model_dump(), trace=trace)
