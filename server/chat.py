"""A chat request's way: submitted to the engine, read as text, judged, accounted for."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Iterator
from functools import cached_property
from typing import Any, Literal

from server.detokenize import Detokenizer
from server.engine.base import (
    EngineError,
    EngineStoppedError,
    FinishReason,
    PromptScores,
)
from server.errors import (
    ApiError,
    InternalError,
    from_engine,
)
from server.hosting import Host
from server.metrics import Metrics, ReplyMeter
from server.prepare import Prepared
from server.profiles import finite
from server.responses import (
    CalledFunction,
    ChatCompletion,
    Choice,
    Receipt,
    ReplyMessage,
    ToolCall,
    Usage,
)
from server.sse import DONE, event
from server.tool_parsers import Call, Part, Text
from steering.judge import Outcome

logger = logging.getLogger(__name__)


class Reply:
    """One reply under way: read `pieces` to the end, then `conclude`, and `close` in any case."""

    def __init__(self, host: Host, metrics: Metrics, prepared: Prepared, since: float) -> None:
        """Submit the request. Raises EngineError where the engine turns it down."""
        self.host = host
        self.prepared = prepared
        self.created = int(time.time())
        self.finish_reason: FinishReason | None = None
        self._text: list[str] = []
        self.calls: list[ToolCall] = []
        self._scores = PromptScores()
        self._outcome: Outcome | None = None
        self._tokens = host.engine.generate(prepared.request)
        self._meter = ReplyMeter(
            metrics, prepared.profile.name, len(prepared.request.prompt_ids), since
        )

    async def pieces(self) -> AsyncGenerator[str, None]:
        """The reply's text as it comes. Raises ApiError."""
        detokenizer = Detokenizer(self.host.lm.tokenizer, keep=self.prepared.tools.markup)
        try:
            async for token in self._tokens:
                self._meter.token(token.scores, token.queue_seconds)
                if token.scores is not None:
                    self._scores = token.scores
                # A token that ends the sequence is not part of the text, special or not.
                piece = "" if token.finish_reason == "stop" else detokenizer.push(token.token_id)
                if token.finish_reason is not None:
                    piece += detokenizer.flush()
                    self.finish_reason = token.finish_reason
                if piece:
                    yield piece
            if self.finish_reason is None:
                raise EngineStoppedError("it stopped in the middle of a reply")
        except EngineError as error:
            self._meter.end("error")
            logger.warning("%s: %s", self.prepared.request.request_id, error)
            raise from_engine(error) from error
        except Exception:
            self._meter.end("error")
            raise
        self._meter.end(self.finish_reason)

    async def parts(self) -> AsyncGenerator[Part, None]:
        """The reply as content and tool calls. Raises ApiError."""
        parser = self.prepared.tools.parser()
        async for piece in self.pieces():
            for part in parser.push(piece):
                yield self._keep(part)
        for part in parser.finish():
            yield self._keep(part)

    def _keep(self, part: Part) -> Part:
        if isinstance(part, Text):
            self._text.append(part.text)
        else:
            function = CalledFunction(name=part.name, arguments=part.arguments)
            self.calls.append(ToolCall(id=f"call_{uuid.uuid4().hex}", function=function))
        return part

    async def conclude(self) -> None:
        """Judge the whole reply. One that calls a tool does what was asked: an answer."""
        start = time.perf_counter()
        try:
            outcome: Outcome = "answer"
            if not self.calls:
                outcome = await asyncio.to_thread(self.host.judge, self.text)
        except Exception:  # a reply is worth more than its judgement
            logger.exception("%s could not be judged", self.prepared.request.request_id)
            return
        self._outcome = outcome
        prompt_class = self.host.prompt_class(self._scores.benign_probability)
        self._meter.judged(prompt_class, outcome, time.perf_counter() - start)

    async def close(self) -> None:
        """Cancel the request if it has not ended."""
        self._meter.end("cancelled")
        await self._tokens.aclose()

    @property
    def told_finish_reason(self) -> Literal["stop", "length", "tool_calls"]:
        """As clients are told, who look here for calls to make; once the reply has ended."""
        assert self.finish_reason is not None
        return "tool_calls" if self.calls and self.finish_reason == "stop" else self.finish_reason

    @property
    def text(self) -> str:
        return "".join(self._text)

    @cached_property
    def headers(self) -> dict[str, str]:
        """What is known before the first token."""
        profile, ignored = self.prepared.profile, self.prepared.ignored
        headers = {
            "X-Steering-Profile": profile.name,
            "X-Steering-Fingerprint": profile.fingerprint,
        }
        if ignored:
            headers["X-Ignored-Fields"] = ", ".join(dict.fromkeys(map(_header_safe, ignored[:20])))
        return headers

    @property
    def receipt(self) -> Receipt:
        scores, profile = self._scores, self.prepared.profile
        # Any, because mypy takes what is unpacked for every argument.
        derived: dict[str, Any] = (
            {"derived_base": True} if self.host.profiles.derived_base(profile) else {}
        )
        return Receipt(
            profile=profile.name,
            fingerprint=profile.fingerprint,
            strength=self.prepared.strength,
            refusal_score=finite(scores.refusal_score),
            answer_probability=finite(scores.answer_probability),
            benign_probability=finite(scores.benign_probability),
            outcome=self._outcome,
            **derived,
        )

    @property
    def usage(self) -> Usage:
        prompt, completion = len(self.prepared.request.prompt_ids), self._meter.tokens
        return Usage(
            prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion
        )

    @property
    def system_fingerprint(self) -> str:
        weights = self.host.lm.fingerprint.weights[:8]
        return f"fp_{weights}_{self.prepared.profile.fingerprint[:8] or 'raw'}"


async def complete(reply: Reply) -> ChatCompletion:
    """The whole answer in one piece. Raises ApiError."""
    async for _ in reply.parts():
        pass
    await reply.conclude()
    message = ReplyMessage(
        content=None if reply.calls and not reply.text else reply.text,
        tool_calls=reply.calls or None,
    )
    choice = Choice(message=message, finish_reason=reply.told_finish_reason)
    return ChatCompletion(
        id=reply.prepared.request.request_id,
        created=reply.created,
        model=reply.prepared.body.model,
        system_fingerprint=reply.system_fingerprint,
        choices=[choice],
        usage=reply.usage,
        steering=reply.receipt,
    )


async def stream(reply: Reply) -> AsyncGenerator[str, None]:
    """The answer in server-sent events. Its status is 200 by now, so errors are events too."""
    options = reply.prepared.body.stream_options
    with_usage = options is not None and bool(options.include_usage)
    head: dict[str, Any] = {
        "id": reply.prepared.request.request_id,
        "object": "chat.completion.chunk",
        "created": reply.created,
        "model": reply.prepared.body.model,
        "system_fingerprint": reply.system_fingerprint,
    }

    def chunk(delta: dict[str, Any], finish_reason: str | None = None, **more: Any) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        # OpenAI's: with `include_usage`, every chunk has the key.
        usage = {"usage": None} if with_usage else {}
        return event({**head, "choices": [choice], **usage, **more})

    try:
        yield chunk({"role": "assistant", "content": ""})
        async for part in reply.parts():
            if isinstance(part, Text):
                yield chunk({"content": part.text})
            else:
                for delta in _call_deltas(part, reply.calls[-1].id):
                    yield chunk({"tool_calls": [delta]})
        await reply.conclude()
        yield chunk({}, reply.told_finish_reason, steering=reply.receipt.model_dump())
        if with_usage:
            yield event({**head, "choices": [], "usage": reply.usage.model_dump()})
    except ApiError as error:
        yield event(error.envelope)
    except Exception:
        logger.exception("%s failed", head["id"])
        yield event(InternalError("Something broke on the server.").envelope)
    yield DONE


def _call_deltas(call: Call, call_id: str) -> Iterator[dict[str, Any]]:
    """As OpenAI streams a call: id and name first, then the arguments."""
    function = {"name": call.name, "arguments": ""}
    yield {"index": call.index, "id": call_id, "type": "function", "function": function}
    yield {"index": call.index, "function": {"arguments": call.arguments}}


def _header_safe(name: str) -> str:
    return "".join(c if c.isascii() and (c.isalnum() or c in "_-.[]") else "?" for c in name[:64])
