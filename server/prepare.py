"""A request understood before any work: who answers, what the prompt is, how tokens are chosen."""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from server.engine.base import EngineRequest, PromptTooLongError, Sampling, SamplingError
from server.errors import ContextLengthError, InvalidRequestError, UnavailableError
from server.hosting import Host
from server.protocol import (
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    Message,
    TokenizeRequest,
)
from server.structured import constrain
from server.tools import Tool, ToolSupport, ToolUse, plan_tools
from steering.edit import AppliedEdit
from steering.profile import Profile

DEFAULT_MAX_TOKENS = 256
DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's own."""
SURROGATE = re.compile("[\ud800-\udfff]")
CHARACTERS_PER_TOKEN = 64
"""More than any real text has on average; only runs of blanks come near."""


@dataclass(frozen=True)
class Prepared:
    """A request that was understood: who answers, and what the engine is asked.

    Args:
        requests: one per choice; those of the first prompt come first.
    """

    id: str
    body: GenerationRequest
    profile: Profile
    strength: float
    requests: tuple[EngineRequest, ...]
    ignored: tuple[str, ...]
    tools: ToolUse = field(default_factory=ToolUse)

    @property
    def request(self) -> EngineRequest:
        """That of the first choice."""
        return self.requests[0]


async def prepare(host: Host, body: ChatRequest) -> Prepared:
    """Check a chat request and render its prompt. Raises ApiError."""
    ignored = body.check()
    _check_ready(host)
    chosen = choose_edits(host, body)
    _check_choices(host, body, 1)
    tools = await choose_tools(host, body)
    prompt = await render_prompt(host, body, tools.offered)
    constraint = await constrain(host.grammars, host.lm, body.response_format, tools)
    prepared = _prepared(
        host, body, "chatcmpl", chosen, [prompt], ignored, param="messages",
        default_tokens=DEFAULT_MAX_TOKENS,
    )  # fmt: skip
    requests = tuple(replace(r, constraint=constraint) for r in prepared.requests)
    return replace(prepared, requests=requests, tools=tools)


async def prepare_completion(host: Host, body: CompletionRequest) -> Prepared:
    """Check a plain completion and tokenise its prompts. Raises ApiError."""
    ignored = body.check()
    _check_ready(host)
    chosen = choose_edits(host, body)
    _check_choices(host, body, len(body.prompts))
    special = body.add_special_tokens is not False
    prompts = [
        await tokenize_text(host, prompt, special) if isinstance(prompt, str) else prompt
        for prompt in body.prompts
    ]
    return _prepared(
        host, body, "cmpl", chosen, prompts, ignored, param="prompt",
        default_tokens=DEFAULT_COMPLETION_TOKENS,
    )  # fmt: skip


def _prepared(
    host: Host,
    body: GenerationRequest,
    kind: str,
    chosen: tuple[Profile, float, tuple[AppliedEdit, ...]],
    prompts: Sequence[Sequence[int]],
    ignored: list[str],
    *,
    param: str,
    default_tokens: int,
) -> Prepared:
    profile, strength, edits = chosen
    id = f"{kind}-{uuid.uuid4().hex}"
    requests: list[EngineRequest] = []
    for prompt in prompts:
        request = EngineRequest(
            request_id=id,
            prompt_ids=tuple(prompt),
            sampling=_sampling(body, len(prompt), host.engine.max_model_len, param, default_tokens),
            edits=edits,
            answer_probe=_answer_probe(profile, strength),
        )
        _check(host, request, param)
        requests += [_choice(request, i) for i in range(body.choices)]
    if len(requests) > 1:
        requests = [replace(r, request_id=f"{id}-{i}") for i, r in enumerate(requests)]
    return Prepared(id, body, profile, strength, tuple(requests), tuple(ignored))


def _choice(request: EngineRequest, index: int) -> EngineRequest:
    """The request of a prompt's choice: each has a seed of its own, if there is one."""
    seed = request.sampling.seed
    if seed is None or not index:
        return request
    return replace(request, sampling=replace(request.sampling, seed=seed + index))


def _check_ready(host: Host) -> None:
    if not host.ready:
        raise UnavailableError("The server cannot take requests now.", headers={"Retry-After": "5"})


def _check_choices(host: Host, body: GenerationRequest, prompts: int) -> None:
    slots = host.engine.stats().slots
    if body.choices * prompts > slots:
        each = f" for each of {prompts} prompts" if prompts > 1 else ""
        raise InvalidRequestError(
            f"This server computes at most {slots} replies at once (--max-num-seqs), and one "
            f"request asks for {body.choices}{each}; ask for fewer.",
            param="n" if prompts == 1 else "prompt",
        )


def _check(host: Host, request: EngineRequest, param: str) -> None:
    """Ask the engine whether it could run this."""
    try:
        host.engine.check(request)
    except PromptTooLongError as error:
        raise ContextLengthError(_one_line(error), param=param) from error
    except SamplingError as error:
        raise InvalidRequestError(_one_line(error), param=error.field) from error
    except ValueError as error:
        raise InvalidRequestError(_one_line(error), param=param) from error


def choose_edits(
    host: Host, body: GenerationRequest
) -> tuple[Profile, float, tuple[AppliedEdit, ...]]:
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
    support = await asyncio.to_thread(lambda: host.tools) if body.tools else ToolSupport()
    return plan_tools(
        support, host.tool_parser, body.tools or (), body.tool_choice, body.parallel_tool_calls
    )


async def render_prompt(
    host: Host, body: ChatRequest | TokenizeRequest, offered: Sequence[Tool] = ()
) -> list[int]:
    """Token ids of the conversation in the model's chat template. Raises ApiError."""
    await _check_turns(host, body.messages or ())
    turns = [turn.rendered(f"messages[{i}]") for i, turn in enumerate(body.messages or ())]
    tools = [tool.rendered() for tool in offered]
    texts = _texts([[turn["content"], turn.get("tool_calls")] for turn in turns] + tools)
    check_text(host, list(texts), "messages")
    more: dict[str, Any] = {**body.template_flags, **({"tools": tools} if tools else {})}
    try:
        # Templates and tokenisers take their time; other requests' tokens must not wait for it.
        return await asyncio.to_thread(lambda: host.lm.encode_chat(turns, **more))
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


async def _check_turns(host: Host, messages: Sequence[Message]) -> None:
    """Refuse turns that the model's template would leave out."""
    if not any(message.tool_calls or message.role == "tool" for message in messages):
        return
    support = await asyncio.to_thread(lambda: host.tools)
    for i, message in enumerate(messages):
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


async def tokenize_text(host: Host, text: str, add_special_tokens: bool) -> list[int]:
    """Token ids of plain text. Raises ApiError."""
    check_text(host, [text], "prompt")
    encoded = await asyncio.to_thread(
        lambda: host.lm.tokenizer(text, add_special_tokens=add_special_tokens)
    )
    return list(encoded["input_ids"])


def check_text(host: Host, texts: Sequence[str], param: str) -> None:
    """Raise ApiError for text that cannot be tokenised, or only to find that it does not fit."""
    characters = sum(map(len, texts))
    if characters > CHARACTERS_PER_TOKEN * host.engine.max_model_len:
        raise ContextLengthError(
            f"This server takes {host.engine.max_model_len} tokens, prompt and reply together. The "
            f"{param} {'has' if param == 'prompt' else 'have'} {characters} characters, more than "
            "so many tokens can hold; send less.",
            param=param,
        )
    if any(SURROGATE.search(text) for text in texts):
        raise InvalidRequestError(
            f"'{param}' holds half of a surrogate pair, which is no text.", param=param
        )


def _sampling(
    body: GenerationRequest, prompt_tokens: int, limit: int, param: str, default_tokens: int
) -> Sampling:
    room = limit - prompt_tokens
    asked = body.asked_tokens
    if room < (asked or 1):
        more = "leaves no room for a reply" if asked is None else f"and {asked} for the reply"
        raise ContextLengthError(
            f"This server takes {limit} tokens, prompt and reply together. The prompt has "
            f"{prompt_tokens} {more}; shorten it{'' if asked is None else ' or ask for fewer'}.",
            param=param,
        )
    return Sampling(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(body.top_k or 0, 0),
        min_p=body.min_p or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        logit_bias={int(i): bias for i, bias in (body.logit_bias or {}).items()},
        seed=body.seed,
        max_tokens=min(default_tokens, room) if asked is None else asked,
        top_logprobs=body.wanted_logprobs or 0,
    )


def _answer_probe(profile: Profile, strength: float) -> str | None:
    """The key of the probe calibrated for this profile at this strength, None if nobody did."""
    if not profile.applied(strength):
        return ""
    return profile.fingerprint if strength == profile.strength else None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
