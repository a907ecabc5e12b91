"""A request understood before any work: who answers, what the prompt is, how tokens are chosen."""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from server.engine.base import EngineRequest, Sampling
from server.errors import ContextLengthError, InvalidRequestError, UnavailableError
from server.hosting import Host
from server.protocol import ChatRequest
from server.structured import constrain
from server.tools import Tool, ToolSupport, ToolUse, plan_tools
from steering.edit import AppliedEdit
from steering.profile import Profile

DEFAULT_MAX_TOKENS = 256
SURROGATE = re.compile("[\ud800-\udfff]")
CHARACTERS_PER_TOKEN = 64
"""More than any real text has on average; only runs of blanks come near."""


@dataclass(frozen=True)
class Prepared:
    """A request that was understood: who answers, and what the engine is asked."""

    body: ChatRequest
    profile: Profile
    strength: float
    request: EngineRequest
    ignored: tuple[str, ...]
    tools: ToolUse


async def prepare(host: Host, body: ChatRequest) -> Prepared:
    """Check a request and render its prompt. Raises ApiError."""
    ignored = body.check()
    if not host.ready:
        raise UnavailableError("The server cannot take requests now.", headers={"Retry-After": "5"})
    profile, strength, edits = choose_edits(host, body)
    tools = await choose_tools(host, body)
    prompt = await render_prompt(host, body, tools.offered)
    request = EngineRequest(
        request_id=f"chatcmpl-{uuid.uuid4().hex}",
        prompt_ids=tuple(prompt),
        sampling=_sampling(body, len(prompt), host.engine.max_model_len),
        edits=edits,
        answer_probe=_answer_probe(profile, strength),
        constraint=await constrain(host.grammars, host.lm, body.response_format, tools),
    )
    try:
        host.engine.check(request)
    except ValueError as error:
        raise InvalidRequestError(_one_line(error)) from error
    return Prepared(body, profile, strength, request, tuple(ignored), tools)


def choose_edits(host: Host, body: ChatRequest) -> tuple[Profile, float, tuple[AppliedEdit, ...]]:
    """The profile that answers, its strength, and what the engine applies. Raises ApiError."""
    steering = body.steering
    profile = host.profiles.choose(body.model, steering.profile if steering is not None else None)
    strength = profile.strength
    if steering is not None and steering.strength is not None:
        strength = steering.strength
    if profile.name != host.profiles.folded:
        return profile, strength, profile.applied(strength)
    if strength != profile.strength:
        raise InvalidRequestError(
            f"{profile.name!r} is folded into the weights at strength {profile.strength}; leave "
            "'steering.strength' out.",
            param="steering.strength",
        )
    return profile, strength, ()


async def choose_tools(host: Host, body: ChatRequest) -> ToolUse:
    """What the request's tools come to with this model's template. Raises ApiError."""
    support = ToolSupport()
    if body.tools or any(m.tool_calls or m.role == "tool" for m in body.messages):
        support = await asyncio.to_thread(lambda: host.tools)
    for i, message in enumerate(body.messages):
        lacking = (message.tool_calls and not support.calls and "tool_calls") or (
            message.role == "tool" and not support.results and "role"
        )
        if lacking:
            raise InvalidRequestError(
                "This model's chat template cannot render tool calls and their results; leave "
                "such turns out.",
                param=f"messages[{i}].{lacking}",
                code="unsupported_parameter",
            )
    return plan_tools(
        support, host.tool_parser, body.tools or (), body.tool_choice, body.parallel_tool_calls
    )


async def render_prompt(host: Host, body: ChatRequest, offered: Sequence[Tool] = ()) -> list[int]:
    """Token ids of the conversation in the model's chat template. Raises ApiError."""
    messages = [message.rendered(f"messages[{i}]") for i, message in enumerate(body.messages)]
    tools = [tool.rendered() for tool in offered]
    texts = list(_texts([[m["content"], m.get("tool_calls")] for m in messages] + tools))
    characters = sum(map(len, texts))
    if characters > CHARACTERS_PER_TOKEN * host.engine.max_model_len:
        # Tokenising this would take long, only to find that it does not fit.
        raise ContextLengthError(
            f"This server takes {host.engine.max_model_len} tokens, prompt and reply together. The "
            f"messages have {characters} characters, more than so many tokens can hold; shorten "
            "them.",
            param="messages",
        )
    if any(map(SURROGATE.search, texts)):
        raise InvalidRequestError(
            "The messages hold half of a surrogate pair, which is no text.", param="messages"
        )
    try:
        # Templates and tokenisers take their time; other requests' tokens must not wait for it.
        more = {"tools": tools} if tools else {}
        return await asyncio.to_thread(host.lm.encode_chat, messages, **more)
    except ValueError as error:
        raise InvalidRequestError(_one_line(error), param="messages") from error


def _texts(value: Any) -> Iterator[str]:
    """Every string in a tree of JSON."""
    pending = [value]
    while pending:
        match pending.pop():
            case str() as text:
                yield text
            case dict() as mapping:
                pending += [*mapping, *mapping.values()]
            case list() as items:
                pending += items


def _sampling(body: ChatRequest, prompt_tokens: int, limit: int) -> Sampling:
    room = limit - prompt_tokens
    asked = body.asked_tokens
    if room < (asked or 1):
        more = "leaves no room for a reply" if asked is None else f"and {asked} for the reply"
        raise ContextLengthError(
            f"This server takes {limit} tokens, prompt and reply together. The prompt has "
            f"{prompt_tokens} {more}; shorten it{'' if asked is None else ' or ask for fewer'}.",
            param="messages",
        )
    return Sampling(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(body.top_k or 0, 0),
        seed=body.seed,
        max_tokens=min(DEFAULT_MAX_TOKENS, room) if asked is None else asked,
    )


def _answer_probe(profile: Profile, strength: float) -> str | None:
    """The key of the probe calibrated for this profile at this strength, None if nobody did."""
    if not profile.applied(strength):
        return ""
    return profile.fingerprint if strength == profile.strength else None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
