"""A request understood before any work: who answers, what the prompt is, how tokens are chosen."""

from __future__ import annotations

import asyncio
import re
import uuid
from dataclasses import dataclass

from server.access import Caller
from server.engine.base import EngineRequest, Sampling
from server.errors import ContextLengthError, InvalidRequestError, UnavailableError
from server.hosting import Host
from server.profiles import ProfileStore
from server.protocol import ChatRequest
from steering.edit import AppliedEdit
from steering.profile import Profile

DEFAULT_MAX_TOKENS = 256
SURROGATE = re.compile("[\ud800-\udfff]")
CHARACTERS_PER_TOKEN = 64
"""More than any real text has on average; only runs of blanks come near."""


@dataclass(frozen=True)
class Prepared:
    """A request that was understood: who asks, who answers, and what the engine is asked."""

    body: ChatRequest
    caller: Caller
    profile: Profile
    strength: float
    request: EngineRequest
    ignored: tuple[str, ...]


async def prepare(host: Host, body: ChatRequest, caller: Caller) -> Prepared:
    """Check a request and render its prompt. Raises ApiError."""
    ignored = body.check()
    if not host.ready:
        raise UnavailableError("The server cannot take requests now.", headers={"Retry-After": "5"})
    profile, strength, edits = choose_edits(caller.sees(host.profiles), body)
    prompt = await render_prompt(host, body)
    request = EngineRequest(
        request_id=f"chatcmpl-{uuid.uuid4().hex}",
        prompt_ids=tuple(prompt),
        sampling=_sampling(body, len(prompt), host.engine.max_model_len),
        edits=edits,
        answer_probe=_answer_probe(profile, strength),
        client=caller.id,
    )
    try:
        host.engine.check(request)
    except ValueError as error:
        raise InvalidRequestError(_one_line(error)) from error
    return Prepared(body, caller, profile, strength, request, tuple(ignored))


def choose_edits(
    profiles: ProfileStore, body: ChatRequest
) -> tuple[Profile, float, tuple[AppliedEdit, ...]]:
    """The profile that answers, its strength, and what the engine applies. Raises ApiError.

    Args:
        profiles: those that exist for the caller.
    """
    steering = body.steering
    profile = profiles.choose(body.model, steering.profile if steering is not None else None)
    strength = profile.strength
    if steering is not None and steering.strength is not None:
        strength = steering.strength
    if profile.name != profiles.folded:
        return profile, strength, profile.applied(strength)
    if strength != profile.strength:
        raise InvalidRequestError(
            f"{profile.name!r} is folded into the weights at strength {profile.strength}; leave "
            "'steering.strength' out.",
            param="steering.strength",
        )
    return profile, strength, ()


async def render_prompt(host: Host, body: ChatRequest) -> list[int]:
    """Token ids of the conversation in the model's chat template. Raises ApiError."""
    limits = host.limits
    if len(body.messages) > limits.messages:
        raise InvalidRequestError(
            f"There are {len(body.messages)} messages and this server takes {limits.messages} "
            "(--max-messages); leave some out.",
            param="messages",
        )
    messages = [message.rendered() for message in body.messages]
    characters = sum(len(message["content"]) for message in messages)
    if limits.prompt_characters is not None and characters > limits.prompt_characters:
        raise ContextLengthError(
            f"The messages have {characters} characters and this server takes "
            f"{limits.prompt_characters} (--max-prompt-chars); shorten them.",
            param="messages",
        )
    if characters > CHARACTERS_PER_TOKEN * host.engine.max_model_len:
        # Tokenising this would take long, only to find that it does not fit.
        raise ContextLengthError(
            f"This server takes {host.engine.max_model_len} tokens, prompt and reply together. The "
            f"messages have {characters} characters, more than so many tokens can hold; shorten "
            "them.",
            param="messages",
        )
    if any(SURROGATE.search(message["content"]) for message in messages):
        raise InvalidRequestError(
            "The messages hold half of a surrogate pair, which is no text.", param="messages"
        )
    try:
        # Templates and tokenisers take their time; other requests' tokens must not wait for it.
        return await asyncio.to_thread(host.lm.encode_chat, messages)
    except ValueError as error:
        raise InvalidRequestError(_one_line(error), param="messages") from error


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
