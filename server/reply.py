"""A request's way: submitted to the engine, read as text, judged, accounted for.

An `Answer` is what one request gets, a `Reply` one of its choices. What they look like on the wire
is in `server.chat` and `server.completions`.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from functools import cached_property
from itertools import islice
from typing import Any

from server.engine.base import (
    EngineError,
    EngineRequest,
    EngineStoppedError,
    EngineToken,
    FinishReason,
    PromptScores,
)
from server.errors import from_engine
from server.hosting import Host
from server.logs import current_request
from server.merge import merged
from server.metrics import Meter, Metrics, ReplyMeter
from server.prepare import Prepared, profiles_used
from server.profiles import finite
from server.quota import Charge
from server.reply_text import Piece, ReplyText, TextToken
from server.responses import (
    CalledFunction,
    ChatFinishReason,
    ChoiceReceipt,
    ProfileUsed,
    PromptTokensDetails,
    Receipt,
    ToolCall,
    Usage,
)
from server.tool_parsers import Call, Text, ToolParser
from steering.judge import Outcome, version_of
from steering.monitor import PromptClass

logger = logging.getLogger(__name__)


class Reply:
    """One choice under way: read `pieces` to the end, and `close` in any case.

    Args:
        on_end: called once, when all is known of the reply and before its end is told.
    """

    def __init__(
        self,
        host: Host,
        prepared: Prepared,
        index: int,
        tokens: AsyncGenerator[EngineToken, None],
        meter: Meter,
        on_end: Callable[[Reply], None] | None = None,
    ) -> None:
        self.index = index
        self.prepared = prepared
        self.on_end = on_end
        self.finish_reason: FinishReason | None = None
        self.tokens: list[TextToken] = []
        """The tokens of the text so far."""
        self.calls: list[ToolCall] = []
        self._host = host
        self._text: list[str] = []
        self.scores = PromptScores()
        """Of the prompt; all None before the first token."""
        self.outcome: Outcome | None = None
        self.ended_by = "cancelled"
        """A finish reason, `error` or `cancelled`."""
        self._stream = tokens
        self._meter = meter

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """The reply as it comes: a first piece, then those that say something; it is judged by the
        end. Raises ApiError."""
        tools = self.prepared.tools
        parser = tools.parser()
        body = self.prepared.body
        after = self.prepared.requests[self.index].prompt_ids if body.continues_text else ()
        text = ReplyText(self._host.lm.tokenizer, body.stop_strings, tools.markup, after)
        wants_tokens = body.wanted_logprobs is not None or body.wants_trace
        try:
            async for token in self._stream:
                # The choices of one prompt share its scores, which count once.
                scores = token.scores if self._first_of_prompt else None
                self._meter.token(scores, token.queue_seconds, token.cached_tokens)
                first = self._meter.tokens == 1
                if token.scores is not None:
                    self.scores = token.scores
                piece = text.push(token)
                self.finish_reason = "stop" if text.stopped else token.finish_reason
                piece = self._take(piece, parser)
                if first or piece.text or piece.calls or (piece.tokens and wants_tokens):
                    yield piece
                if text.stopped:
                    await self._stream.aclose()  # frees the slot
                    break
            if self.finish_reason is None:
                raise EngineStoppedError("it stopped in the middle of a reply")
        except EngineError as error:
            self._end("error")
            self._tell()
            logger.warning("%s: %s", self.prepared.id, error)
            raise from_engine(error) from error
        except Exception:
            self._end("error")
            self._tell()
            raise
        self._end(self.finish_reason)
        await self._judge()
        self._tell()

    def _take(self, piece: Piece, parser: ToolParser) -> Piece:
        """Keep what the piece says, with the calls that it completes taken out of its text."""
        parts = parser.push(piece.text)
        if self.finish_reason is not None:
            parts += parser.finish()
        text = "".join(part.text for part in parts if isinstance(part, Text))
        calls = tuple(part for part in parts if isinstance(part, Call))
        self._text.append(text)
        self.tokens.extend(piece.tokens)
        for call in calls:
            function = CalledFunction(name=call.name, arguments=call.arguments)
            self.calls.append(ToolCall(id=f"call_{uuid.uuid4().hex}", function=function))
        return Piece(text, piece.tokens, calls)

    async def _judge(self) -> None:
        """Judge the whole reply. One that calls a tool does what was asked: an answer."""
        start = time.perf_counter()
        try:
            outcome: Outcome = "answer"
            if not self.calls:
                outcome = await asyncio.to_thread(self._host.judge, self.text)
        except Exception:  # a reply is worth more than its judgement
            logger.exception("%s could not be judged", self.prepared.id)
            return
        self.outcome = outcome
        if self._host.classifier is None or self.calls:
            self.count(outcome, time.perf_counter() - start)

    def count(self, outcome: Outcome, seconds: float) -> None:
        """Put a judgement into the metrics."""
        self._meter.judged(self.prompt_class, outcome, seconds)

    def _tell(self) -> None:
        on_end, self.on_end = self.on_end, None
        if on_end is not None:
            on_end(self)

    def _end(self, reason: str) -> None:
        self.ended_by = reason
        self._meter.end(reason)

    async def close(self) -> None:
        """Cancel the reply if it has not ended."""
        self._meter.end(self.ended_by)
        self._tell()
        await self._stream.aclose()

    @property
    def prompt_class(self) -> PromptClass:
        return self._host.prompt_class(self.scores.benign_probability)

    @property
    def request(self) -> EngineRequest:
        return self.prepared.requests[self.index]

    @property
    def ttft_seconds(self) -> float | None:
        return self._meter.ttft

    @property
    def duration_seconds(self) -> float:
        return self._meter.seconds

    @property
    def _first_of_prompt(self) -> bool:
        return self.index % self.prepared.body.choices == 0

    @property
    def told_finish_reason(self) -> ChatFinishReason:
        """As clients are told, who look here for calls to make; once the reply has ended."""
        assert self.finish_reason is not None
        return "tool_calls" if self.calls and self.finish_reason == "stop" else self.finish_reason

    @property
    def text(self) -> str:
        return "".join(self._text)

    @property
    def completion_tokens(self) -> int:
        return self._meter.tokens

    @property
    def cached_tokens(self) -> int:
        """Of the prompt."""
        return self._meter.cached_tokens

    @property
    def receipt(self) -> ChoiceReceipt:
        scores = self.scores
        return ChoiceReceipt(
            refusal_score=finite(scores.refusal_score),
            answer_probability=finite(scores.answer_probability),
            benign_probability=finite(scores.benign_probability),
            outcome=self.outcome,
        )


class Answer:
    """All replies to one request: read `pieces` to the end, and `close` in any case.

    `submit` makes them.

    Args:
        since: `time.perf_counter()` at the request's arrival.
        on_end: called with each reply (see there).
        streams: the engine's, one per request.
        charge: what was reserved for them.
    """

    def __init__(
        self,
        host: Host,
        metrics: Metrics,
        prepared: Prepared,
        since: float,
        on_end: Callable[[Reply], None] | None,
        streams: Sequence[AsyncGenerator[EngineToken, None]],
        charge: Charge,
    ) -> None:
        self.host = host
        self.prepared = prepared
        self.created = int(time.time())
        self._request_id = current_request.get()
        self._closed = False
        self._charge = charge
        profile, choices = prepared.composition.label, prepared.body.choices
        self.replies = [
            Reply(
                host,
                prepared,
                i,
                tokens,
                ReplyMeter(metrics, profile, 0 if i % choices else len(request.prompt_ids), since),
                on_end,
            )
            for i, (request, tokens) in enumerate(zip(prepared.requests, streams, strict=True))
        ]

    async def pieces(self) -> AsyncGenerator[tuple[Reply, Piece | None], None]:
        """The pieces of all replies as they come; None is the end of a reply. Raises ApiError,
        with the first reply that fails."""
        if len(self.replies) == 1:
            [reply] = self.replies
            async with aclosing(reply.pieces()) as pieces:
                async for piece in pieces:
                    yield reply, piece
            yield reply, None
            return
        async with aclosing(merged([reply.pieces() for reply in self.replies])) as pieces_of_all:
            async for i, item in pieces_of_all:
                if isinstance(item, Exception):
                    raise item
                yield self.replies[i], item

    async def close(self) -> None:
        """Cancel what has not ended, and note what became of it."""
        if self._closed:
            return
        self._closed = True
        for reply in self.replies:
            await reply.close()
        broken = any(reply.ended_by == "error" for reply in self.replies)
        usage = self.usage
        # Nobody pays for an answer that broke.
        self._charge.settle(0 if broken else usage.total_tokens)
        self._note(usage)

    def _note(self, usage: Usage) -> None:
        audit, first = self.host.access.audit, self.replies[0]
        note = {
            "request_id": self._request_id or None,
            **audit_fields(self.prepared),
            "outcome": first.outcome or first.ended_by,
            "finish_reason": first.ended_by,
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
        }
        if len(self.replies) > 1:
            note["outcomes"] = [reply.outcome or reply.ended_by for reply in self.replies]
        if audit.with_text:
            note |= {**self.prepared.body.audited_prompt, "reply": first.text}
            if len(self.replies) > 1:
                note["replies"] = [reply.text for reply in self.replies]
        audit.write(**note)

    @cached_property
    def headers(self) -> dict[str, str]:
        """What is known before the first token."""
        composition, ignored = self.prepared.composition, self.prepared.ignored
        headers = {
            "X-Steering-Profile": composition.name,
            "X-Steering-Fingerprint": composition.fingerprint,
        }
        if (exposure := self.prepared.exposure) is not None:
            headers["X-Steering-Experiment"] = exposure.experiment.name
            headers["X-Steering-Arm"] = exposure.arm.name
        return headers | ignored_header(ignored)

    @property
    def head(self) -> dict[str, Any]:
        """What every event and every answer begins with."""
        return {
            "id": self.prepared.id,
            "created": self.created,
            "model": self.prepared.body.model,
            "system_fingerprint": self.system_fingerprint,
        }

    @property
    def receipt(self) -> Receipt:
        """That of the first choice."""
        first = self.replies[0]
        judged = first.outcome is not None and not first.calls
        return Receipt(
            **answered_by(self.host, self.prepared),
            **first.receipt.model_dump(),
            judge=version_of(self.host.judge) if judged else None,
        )

    def choice_receipt(self, reply: Reply) -> ChoiceReceipt | None:
        """A choice's own, where there are several."""
        return reply.receipt if len(self.replies) > 1 else None

    @property
    def usage(self) -> Usage:
        """A prompt counts once, however many choices it has."""
        prompts = self.prepared.requests[:: self.prepared.body.choices]
        prompt = sum(len(request.prompt_ids) for request in prompts)
        completion = sum(reply.completion_tokens for reply in self.replies)
        cached = sum(r.cached_tokens for r in self.replies[:: self.prepared.body.choices])
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
        )

    @property
    def system_fingerprint(self) -> str:
        weights = self.host.lm.fingerprint.weights[:8]
        return f"fp_{weights}_{self.prepared.composition.fingerprint[:8] or 'raw'}"


def submit(
    host: Host,
    metrics: Metrics,
    prepared: Sequence[Prepared],
    since: float,
    on_end: Callable[[Reply], None] | None = None,
) -> list[Answer]:
    """Submit requests of one caller together, all or none; their answers.

    Raises EngineError where the engine turns them down, RateLimitError where the caller's minute
    does not hold them all.
    """
    costs = [_most_tokens(each) for each in prepared]
    charges = prepared[0].caller.reserve(sum(costs)).split(costs)
    requests = [request for each in prepared for request in each.requests]
    try:
        streams = iter(host.engine.generate_all(requests))
    except BaseException:
        for charge in charges:
            charge.settle(0)
        raise
    answers = []
    for each, charge in zip(prepared, charges, strict=True):
        own = list(islice(streams, len(each.requests)))
        answers.append(Answer(host, metrics, each, since, on_end, own, charge))
    return answers


def _most_tokens(prepared: Prepared) -> int:
    """What it can come to: prompts, each once, and replies."""
    prompts = prepared.requests[:: prepared.body.choices]
    return sum(len(request.prompt_ids) for request in prompts) + sum(
        request.sampling.max_tokens for request in prepared.requests
    )


def audit_fields(prepared: Prepared) -> dict[str, Any]:
    """Who asked whom, for the audit log."""
    composition, exposure = prepared.composition, prepared.exposure
    return {
        "id": prepared.id,
        "key": prepared.caller.id or None,
        "profile": composition.name,
        "fingerprint": composition.fingerprint,
        "strength": composition.strength,
        "experiment": exposure and exposure.experiment.name,
        "arm": exposure and exposure.arm.name,
        "red_team": any(profile.red_team for profile in profiles_used(prepared)),
    }


def answered_by(host: Host, prepared: Prepared) -> dict[str, Any]:
    """The fields of `responses.Answerer`."""
    composition = prepared.composition
    said: dict[str, Any] = {
        "profile": composition.name,
        "fingerprint": composition.fingerprint,
        "strength": composition.strength,
    }
    if prepared.exposure is not None:
        said["experiment"] = prepared.exposure.experiment.name
        said["arm"] = prepared.exposure.arm.name
    if len(composition.parts) > 1:
        said["profiles"] = [
            ProfileUsed(
                name=part.profile.name,
                fingerprint=part.profile.fingerprint,
                strength=part.strength,
            )
            for part in composition.parts
        ]
    if composition.phase is not None:
        said["phase"] = composition.phase
    if any(host.profiles.derived_base(profile) for profile in composition.profiles):
        said["derived_base"] = True
    if prepared.out_of_template:
        said["monitor"] = "out_of_template"
    return said


def ignored_header(names: Sequence[str]) -> dict[str, str]:
    """The header that names the fields of a request which nobody knows, if there are any."""
    if not names:
        return {}
    return {"X-Ignored-Fields": ", ".join(dict.fromkeys(map(_header_safe, names[:20])))}


def _header_safe(name: str) -> str:
    safe = (c if c.isascii() and (c.isalnum() or c in "_-.[]") else "?" for c in name[:64])
    return "".join(safe) or "?"  # a header must not end in a blank
