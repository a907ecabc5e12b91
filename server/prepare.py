"""A request understood before any work: who answers, what the prompt is, how tokens are chosen."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from server.access import Caller
from server.composition import Composition
from server.engine.base import EngineRequest, PromptTooLongError, Sampling, SamplingError
from server.errors import ContextLengthError, InvalidRequestError, UnavailableError
from server.experiments.choosing import Exposure, Visit, choose
from server.hosting import Host
from server.protocol import (
    ChatRequest,
    CompletionRequest,
    GenerationRequest,
    Message,
    TokenizeRequest,
)
from server.structured import constrain
from server.templating import WITHOUT_TEMPLATE, Reading, asked_kwargs, reading
from server.tools import Tool, ToolSupport, ToolUse, plan_tools
from steering.profile import Profile

DEFAULT_MAX_TOKENS = 256
DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's own."""
SURROGATE = re.compile("[\ud800-\udfff]")
CHARACTERS_PER_TOKEN = 64
"""More than any real text has on average; only runs of blanks come near."""


@dataclass(frozen=True)
class Prepared:
    """A request that was understood: who asks, who answers, and what the engine is asked.

    Args:
        requests: one per choice; those of the first prompt come first.
        out_of_template: the prompt is of another form than the monitor was fitted on.
        exposure: the arm of an experiment that answers, if one does.
    """

    id: str
    body: GenerationRequest
    caller: Caller
    composition: Composition
    requests: tuple[EngineRequest, ...]
    ignored: tuple[str, ...]
    out_of_template: bool = False
    tools: ToolUse = field(default_factory=ToolUse)
    exposure: Exposure | None = None

    @property
    def request(self) -> EngineRequest:
        """That of the first choice."""
        return self.requests[0]


def profiles_used(prepared: Prepared) -> tuple[Profile, ...]:
    """Every profile that a request asked for, whatever its strength: what access depends on."""
    return prepared.composition.profiles


def under(host: Host, prepared: Prepared, composition: Composition) -> Prepared:
    """The same request, answered by others."""
    probes = not prepared.out_of_template and host.monitor_read != "off"
    answer_probe = composition.answer_probe if probes else None
    requests = tuple(
        replace(request, edits=composition.edits, answer_probe=answer_probe)
        for request in prepared.requests
    )
    return replace(prepared, composition=composition, requests=requests)


async def prepare(
    host: Host, body: ChatRequest, caller: Caller, headers: Mapping[str, str] | None = None
) -> Prepared:
    """Check a chat request and render its prompt. Raises ApiError.

    Args:
        headers: of a request that may take part in experiments; None for any other.
    """
    ignored = body.check()
    _check_ready(host)
    id = _new_id("chatcmpl")
    composition, exposure = _choose(host, body, caller, headers, id)
    _check_choices(host, body, 1)
    tools = await choose_tools(host, body)
    prompt = await render_prompt(host, body, tools.offered)
    constraint = await constrain(host.grammars, host.lm, body.response_format, tools)
    readable = reading(host, body, prompt, tools.offered)
    prepared = _prepared(
        host, body, caller, id, composition, exposure, [prompt], ignored, readable,
        param="messages", default_tokens=DEFAULT_MAX_TOKENS,
    )  # fmt: skip
    requests = tuple(replace(r, constraint=constraint) for r in prepared.requests)
    return replace(prepared, requests=requests, tools=tools)


async def prepare_completion(
    host: Host, body: CompletionRequest, caller: Caller, headers: Mapping[str, str] | None = None
) -> Prepared:
    """Check a plain completion and tokenise its prompts. Raises ApiError."""
    ignored = body.check()
    _check_ready(host)
    id = _new_id("cmpl")
    composition, exposure = _choose(host, body, caller, headers, id)
    _check_choices(host, body, len(body.prompts))
    special = body.add_special_tokens is not False
    prompts = [
        await tokenize_text(host, prompt, special) if isinstance(prompt, str) else prompt
        for prompt in body.prompts
    ]
    readable = Reading() if host.monitor is None else WITHOUT_TEMPLATE
    return _prepared(
        host, body, caller, id, composition, exposure, prompts, ignored, readable, param="prompt",
        default_tokens=DEFAULT_COMPLETION_TOKENS,
    )  # fmt: skip


def _new_id(kind: str) -> str:
    return f"{kind}-{uuid.uuid4().hex}"


def _choose(
    host: Host,
    body: GenerationRequest,
    caller: Caller,
    headers: Mapping[str, str] | None,
    id: str,
) -> tuple[Composition, Exposure | None]:
    visit = None if headers is None else Visit(id, body, headers)
    return choose(host.experiments, host.access, caller, body.model, body.steering, visit)


def _prepared(
    host: Host,
    body: GenerationRequest,
    caller: Caller,
    id: str,
    composition: Composition,
    exposure: Exposure | None,
    prompts: Sequence[Sequence[int]],
    ignored: list[str],
    readable: Reading,
    *,
    param: str,
    default_tokens: int,
) -> Prepared:
    probes = readable.probes and host.monitor_read != "off"
    chosen = composition
    if exposure is not None:
        composition = exposure.control  # asked first: what it cannot take is nobody's exposure
    requests: list[EngineRequest] = []
    for prompt in prompts:
        request = EngineRequest(
            request_id=id,
            prompt_ids=tuple(prompt),
            sampling=_sampling(body, len(prompt), host.engine.max_model_len, param, default_tokens),
            edits=composition.edits,
            answer_probe=composition.answer_probe if probes else None,
            benign_read=host.monitor_read if probes else "off",
            refusal_score=readable.refusal_score,
            client=caller.id,
            deadline=time.monotonic() + host.request_timeout,
            trace=body.wants_trace,
        )
        _check(host, request, param)
        requests += [_choice(request, i) for i in range(body.choices)]
    if len(requests) > 1:
        requests = [replace(r, request_id=f"{id}-{i}") for i, r in enumerate(requests)]
    prepared = Prepared(
        id, body, caller, composition, tuple(requests), tuple(ignored), not readable.probes
    )
    return prepared if exposure is None else _expose(host, prepared, exposure, chosen)


def _expose(
    host: Host, prepared: Prepared, exposure: Exposure, composition: Composition
) -> Prepared:
    """The request as its arm answers it, if every arm could: an arm that cannot take a prompt (a
    gate that must read it whole) would see other prompts than the rest."""
    for each in (composition, *exposure.others.values()):
        for request in under(host, prepared, each).requests:
            try:
                host.engine.check(request)
            except (PromptTooLongError, ValueError):
                return prepared
    return replace(under(host, prepared, composition), exposure=exposure)


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
    _check_count(host, body.messages or ())
    await _check_turns(host, body.messages or ())
    turns = [turn.rendered(f"messages[{i}]") for i, turn in enumerate(body.messages or ())]
    tools = [tool.rendered() for tool in offered]
    said = [[turn["content"], turn.get("tool_calls")] for turn in turns]
    await asyncio.to_thread(lambda: check_text(host, list(_texts(said + tools)), "messages"))
    more: dict[str, Any] = {
        **body.template_flags,
        **asked_kwargs(host, body),
        **({"tools": tools} if tools else {}),
    }
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


def _check_count(host: Host, messages: Sequence[Message]) -> None:
    if len(messages) > host.limits.messages:
        raise InvalidRequestError(
            f"There are {len(messages)} messages and this server takes {host.limits.messages} "
            "(--max-messages); leave some out.",
            param="messages",
        )


def check_text(host: Host, texts: Sequence[str], param: str) -> None:
    """Raise ApiError for text that cannot be tokenised, or only to find that it does not fit."""
    characters, most = sum(map(len, texts)), host.limits.prompt_characters
    if most is not None and characters > most:
        raise ContextLengthError(
            f"The {param} {'has' if param == 'prompt' else 'have'} {characters} characters and "
            f"this server takes {most} (--max-prompt-chars); send less.",
            param=param,
        )
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
        if asked is None:
            more = "which leaves no room for a reply; shorten it"
        else:
            more = f"and {asked} were asked for; shorten it or ask for fewer"
        raise ContextLengthError(
            f"This server takes {limit} tokens, prompt and reply together. The prompt has "
            f"{prompt_tokens}, {more}.",
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


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
