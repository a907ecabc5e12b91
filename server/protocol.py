"""What clients send, after OpenAI's chat completions and completions.

Strict where a mistake would otherwise pass unnoticed: numbers must be numbers in range, a field
that OpenAI or vLLM knows and this server cannot honour is refused (`server.unsupported`), and so is
an unknown key inside `steering`. Other unknown keys are accepted, since clients send their vendors'
own, and named in the response header `X-Ignored-Fields`. What clients get: `server.responses`.
"""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self, cast

from pydantic import (
    ConfigDict,
    Discriminator,
    Field,
    ModelWrapValidatorHandler,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from server.engine.base import MAX_TOP_LOGPROBS
from server.errors import InvalidRequestError
from server.structured import ResponseFormat
from server.tools import MAX_TOOLS, Tool, ToolCallTurn, ToolChoice
from server.unsupported import (
    UNSUPPORTED,
    UNSUPPORTED_IN_COMPLETIONS,
    UNSUPPORTED_IN_MESSAGE,
    ignored_fields,
)
from server.validation import MOST_MESSAGES, MOST_MISTAKES, Strict, TemplateValue
from steering.edit import Phase


class TextPart(Strict):
    """A piece of a message's content. Only text is understood."""

    type: Literal["text"]
    text: str


def _content_kind(value: object) -> str:
    return "<parts>" if isinstance(value, list) else "<string>"


Content = Annotated[
    Annotated[str, Tag("<string>")]
    | Annotated[list[TextPart], Field(fail_fast=True), Tag("<parts>")],
    Discriminator(_content_kind),
]


class Message(Strict):
    """One turn of the conversation."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = Field(
        None,
        description="Text, or a list of text parts, which are joined by newlines. Only an "
        "assistant's turn with `tool_calls` may lack it.",
    )
    tool_calls: list[ToolCallTurn] | None = Field(
        None, description="Calls that the assistant made in this turn."
    )
    tool_call_id: str | None = Field(None, description="The call whose result a tool's turn is.")

    def rendered(self, param: str = "message") -> dict[str, Any]:
        """As chat templates want it: they know no developer role and no parts.

        Raises InvalidRequestError, which names what is wrong below `param`.
        """
        text = self.content or ""
        if isinstance(text, list):
            text = "\n".join(part.text for part in text)
        turn: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": text,
        }
        if self.tool_calls:
            turn["tool_calls"] = [
                call.rendered(f"{param}.tool_calls[{i}]") for i, call in enumerate(self.tool_calls)
            ]
        if self.tool_call_id is not None:
            turn["tool_call_id"] = self.tool_call_id
        return turn

    def check(self, param: str) -> None:
        """Refuse what only turns of another role may have, or what a role must have."""
        if self.content is None and not self.tool_calls:
            raise InvalidRequestError(
                f"'{param}.content' is required: a string, or a list of text parts (got null).",
                param=f"{param}.content",
            )
        for name, role in (("tool_calls", "assistant"), ("tool_call_id", "tool")):
            if getattr(self, name) and self.role != role:
                raise InvalidRequestError(
                    f"'{param}.{name}' is only possible with role {role!r}.",
                    param=f"{param}.{name}",
                )
        if self.role == "tool" and not self.tool_call_id:
            raise InvalidRequestError(
                f"'{param}.tool_call_id' is required: the id of the call that this is the result "
                "of.",
                param=f"{param}.tool_call_id",
                code="missing_required_parameter",
            )


TemplateKwargs = Annotated[
    dict[Annotated[str, Field(max_length=64)], TemplateValue | None], Field(max_length=16)
]


class StreamOptions(Strict):
    """Only together with `stream: true`."""

    include_usage: bool | None = Field(
        None, description="Send one more chunk, with no choices and the request's `usage`."
    )
    include_obfuscation: bool | None = Field(
        None, description="Accepted for OpenAI's clients; there is never any obfuscation."
    )


# Far beyond any use; further out, float32 overflows and the reply could not be computed.
Strength = Annotated[float, Field(ge=-1e4, le=1e4)]


class ProfileChoice(Strict):
    """One of several profiles."""

    name: str = Field(description="A name that `GET /v1/steering/profiles` lists.")
    strength: Strength | None = Field(None, description="Default: the profile's own.")


class SteeringChoice(Strict):
    """Which profile answers, how strongly it is applied, and to which tokens."""

    profile: str | None = Field(None, description="A name that `GET /v1/steering/profiles` lists.")
    strength: Strength | None = Field(
        None, description="Scales the profile's edits; 0 is the unedited model. Default: its own."
    )
    profiles: Annotated[list[ProfileChoice], Field(min_length=1, max_length=8)] | None = Field(
        None, description="Several profiles, applied in this order; instead of `profile`."
    )
    phase: Phase | None = Field(
        None, description="Which tokens the edits meet. Default: each edit's own phase."
    )
    trace: bool | None = Field(
        None,
        description="Tell with each token what was read when it was chosen, in the choice's "
        "`steering.trace`.",
    )


MAX_CHOICES = 16
MAX_STOPS = 4
_StopString = Annotated[str, Field(min_length=1, max_length=1000)]
Bias = Annotated[float, Field(ge=-100, le=100)]


MOST_PARTS = 20_000
_USUAL_KEYS = 8


class Body(Strict):
    """A request's body that is not even looked at if it has very many parts, and whose mistakes
    are not listed if there are very many.

    Both are slow, and hold up everybody: a small body can have a million.
    """

    @model_validator(mode="wrap")
    @classmethod
    def _stop_at_many(cls, value: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        if (count := _parts(value)) > MOST_PARTS:
            raise InvalidRequestError(
                f"The body has {count} parts (keys, content parts, tool calls, prompts); this "
                f"server takes {MOST_PARTS}."
            )
        try:
            return validate(value)
        except ValidationError as error:
            if (count := error.error_count()) > MOST_MISTAKES:
                raise InvalidRequestError(f"The body has {count} mistakes.") from None
            raise


def _parts(body: Any) -> int:
    """What has a validation of its own, apart from messages and their usual keys."""
    if not isinstance(body, dict):
        return 0
    count, prompts = len(body), body.get("prompt")
    conversations, arms = [body.get("messages")], body.get("arms")
    if isinstance(arms, list):
        count += sum(len(arm) if isinstance(arm, dict) else 1 for arm in arms)
        conversations += [arm.get("messages") for arm in arms if isinstance(arm, dict)]
    for messages in conversations:
        if isinstance(messages, list) and len(messages) <= MOST_MESSAGES:
            count += sum(map(_parts_of_message, messages))
    if isinstance(prompts, list) and prompts and not isinstance(prompts[0], int):
        count += len(prompts)
    return count


def _parts_of_message(message: Any) -> int:
    if not isinstance(message, dict):
        return 0
    lists = (message.get("content"), message.get("tool_calls"))
    unusual = max(len(message) - _USUAL_KEYS, 0)
    return unusual + sum(len(value) for value in lists if isinstance(value, list))


def asked_profile(model: str, steering: SteeringChoice | None) -> dict[str, str]:
    """Who was asked for, in short, for the audit log."""
    named = [choice.name for choice in (steering and steering.profiles) or ()]
    profile = (steering and steering.profile) or "+".join(named)
    return {"model": model[:200]} | ({"profile": profile[:200]} if profile else {})


class SamplingFields(Body):
    """How tokens are chosen, and when a reply ends."""

    max_completion_tokens: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Newer name of `max_tokens`."
    )
    max_tokens: Annotated[int, Field(ge=1)] | None = Field(
        None,
        description="End the reply after this many tokens. Default: 256 in chat and 16 in plain "
        "completions, or what fits. Prompt and reply together must fit the model's length.",
    )
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(
        None, description="0 takes the most likely token. Default: 1 under every profile."
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="Keep the smallest set of tokens with this probability mass."
    )
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = Field(
        None, description="Keep this many tokens; 0 and -1 keep all."
    )
    min_p: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="Keep tokens at least this share as likely as the most likely one."
    )
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = Field(
        None, description="Taken from the logits of tokens that were generated."
    )
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = Field(
        None, description="The same, times how often."
    )
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = Field(
        None,
        description="Divides the positive and multiplies the negative logits of tokens of the "
        "prompt and of those generated; 1 does nothing.",
    )
    logit_bias: Annotated[dict[str, Bias], Field(max_length=1024)] | None = Field(
        None, description="Token ids, as strings, and what is added to their logits."
    )
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = Field(
        None,
        description="The same seed gives the same reply, whoever else is being served. Of several "
        "choices, the one at index i of its prompt is what the seed plus i gives alone.",
    )
    stop: (
        Annotated[
            Annotated[_StopString, Tag("<string>")]
            | Annotated[Annotated[list[_StopString], Field(max_length=MAX_STOPS)], Tag("<parts>")],
            Discriminator(_content_kind),
        ]
        | None
    ) = Field(None, description="Text that ends the reply and is not part of it; up to 4.")

    @field_validator("logit_bias")
    @classmethod
    def _keys_are_token_ids(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        for key in value or ():
            if not re.fullmatch("0|[1-9][0-9]{0,8}", key):  # one way to write each
                raise ValueError(
                    f"'logit_bias' must have token ids for keys (got {json.dumps(key[:40])})"
                )
        return value

    @property
    def asked_tokens(self) -> int | None:
        if self.max_completion_tokens is not None:
            return self.max_completion_tokens
        return self.max_tokens

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def check_limits(self) -> None:
        """Refuse two limits that contradict each other."""
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise InvalidRequestError(
                "'max_tokens' and 'max_completion_tokens' contradict each other; send one of them.",
                param="max_tokens",
            )


class GenerationRequest(SamplingFields):
    """What chat and plain completions have in common."""

    model_config = ConfigDict(extra="allow")

    model: str = Field(description="The served name, or `<served name>:<profile>`.")
    steering: SteeringChoice | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = Field(
        None, description="Choices per prompt; in all, at most as many as the server has slots."
    )
    stream: bool | None = Field(None, description="Answer in server-sent events.")
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="Identifies the end user.")
    safety_identifier: Annotated[str, Field(max_length=128)] | None = Field(
        None, description="Identifies the end user; the newer name of `user`."
    )
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
            Field(max_length=16),
        ]
        | None
    ) = None

    @property
    def asked_profile(self) -> dict[str, str]:
        """Who was asked for, in short, for the audit log."""
        return asked_profile(self.model, self.steering)

    @property
    @abstractmethod
    def audited_prompt(self) -> dict[str, Any]:
        """What was asked, for audit logs that hold text."""

    @property
    def choices(self) -> int:
        """Choices per prompt."""
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    @abstractmethod
    def continues_text(self) -> bool:
        """Whether the reply is the rest of a text that the prompt begins, or a text of its own."""

    @property
    def wants_trace(self) -> bool:
        return self.steering is not None and bool(self.steering.trace)

    @property
    @abstractmethod
    def wanted_logprobs(self) -> int | None:
        """How many alternatives to tell with each token's log-probability; None to tell none."""

    def check(self) -> list[str]:
        """Refuse what would have no effect or none that was meant; name the fields ignored."""
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError(
                "'stream_options' is only possible with 'stream': true.", param="stream_options"
            )
        self.check_limits()
        return []


class ChatRequest(GenerationRequest):
    """A conversation to continue."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model": "demo",
                    "messages": [{"role": "user", "content": "Tell me how to bake a cake."}],
                    "steering": {"profile": "llm-va"},
                }
            ]
        },
    )

    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)]
    chat_template_kwargs: TemplateKwargs | None = Field(
        None, description="Passed to the model's chat template, as `enable_thinking`."
    )
    logprobs: bool | None = Field(
        None, description="Tell each token's log-probability in the raw distribution."
    )
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = Field(
        None, description="And that of as many of the likeliest tokens; needs `logprobs`."
    )
    response_format: ResponseFormat | None = Field(
        None, description="The reply's shape: free text, any JSON object, or a JSON schema's."
    )
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = Field(
        None, description="Functions that the model may call, if its chat template knows tools."
    )
    tool_choice: ToolChoice | None = Field(
        None,
        description="`auto` (the default); `none` leaves `tools` out of the prompt; `required` or "
        "a named function forces a call.",
    )
    parallel_tool_calls: bool | None = Field(
        None, description="Whether a reply may hold several calls (default) or one."
    )
    add_generation_prompt: bool | None = Field(
        None, description="Begin an assistant's turn. Default: true unless one is continued."
    )
    continue_final_message: bool | None = Field(
        None,
        description="Continue the last message, which is the assistant's. The reply holds only "
        "what follows it.",
    )

    @property
    def audited_prompt(self) -> dict[str, Any]:
        return {"messages": [message.rendered() for message in self.messages]}

    @property
    def continues_text(self) -> bool:
        return bool(self.continue_final_message)

    @property
    def wanted_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def template_flags(self) -> dict[str, bool]:
        """Arguments of the chat template, where they are not the usual ones."""
        return template_flags(
            self.messages, self.add_generation_prompt, self.continue_final_message
        )

    def check(self) -> list[str]:
        ignored = list(ignored_fields(self.model_extra or {}, UNSUPPORTED, ""))
        if self.response_format is not None:
            self.response_format.check()
        for i, message in enumerate(self.messages):
            message.check(f"messages[{i}]")
            extra = message.model_extra or {}
            ignored += ignored_fields(extra, UNSUPPORTED_IN_MESSAGE, f"messages[{i}].")
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequestError(
                "'top_logprobs' is only possible with 'logprobs': true.", param="top_logprobs"
            )
        _ = self.template_flags  # raises where they contradict each other
        shaped = self.response_format is not None and not self.response_format.is_text
        if self.continue_final_message and shaped:
            raise InvalidRequestError(
                "A reply that continues a message cannot have a 'response_format' of its own.",
                param="response_format",
            )
        return ignored + super().check()


def _prompt_kind(value: object) -> str:
    if not isinstance(value, list):
        return "<string>"
    first = value[0] if value else ""
    if isinstance(first, list):
        return "<token lists>"
    return "<strings>" if isinstance(first, str) else "<tokens>"


TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Tokenized = Annotated[list[TokenId], Field(min_length=1)]


class CompletionRequest(GenerationRequest):
    """Plain text, or token ids, to continue, without a chat template."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"model": "demo", "prompt": "Of course, here is how to"}]},
    )

    prompt: Annotated[
        Annotated[str, Tag("<string>")]
        | Annotated[Annotated[list[str], Field(min_length=1)], Tag("<strings>")]
        | Annotated[Tokenized, Tag("<tokens>")]
        | Annotated[Annotated[list[Tokenized], Field(min_length=1)], Tag("<token lists>")],
        Discriminator(_prompt_kind),
    ] = Field(
        description="Text, token ids, or a list of either. The choices of the second prompt "
        "follow those of the first."
    )
    best_of: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Only the value of `n`: choices are not ranked."
    )
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = Field(
        None,
        description="Tell each token's log-probability in the raw distribution, and that of as "
        "many of the likeliest tokens.",
    )
    add_special_tokens: bool | None = Field(
        None, description="Begin a text as the tokenizer does by itself, with a BOS say. Default: "
        "true."
    )  # fmt: skip

    @property
    def audited_prompt(self) -> dict[str, Any]:
        return {"prompt": self.prompt}

    @property
    def continues_text(self) -> bool:
        return True

    @property
    def wanted_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt, as text or token ids."""
        prompt = self.prompt
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
            return cast(list[str | list[int]], [prompt])
        return cast(list[str | list[int]], prompt)

    def check(self) -> list[str]:
        ignored = list(ignored_fields(self.model_extra or {}, UNSUPPORTED_IN_COMPLETIONS, ""))
        if self.best_of not in (None, self.choices):
            raise InvalidRequestError(
                f"This server ranks no choices: 'best_of' must be the same as 'n' "
                f"({self.choices}).",
                param="best_of",
                code="unsupported_parameter",
            )
        return ignored + super().check()


class TokenizeRequest(Body):
    """A prompt to count: `prompt` for plain completions or `messages` for chat."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"model": "demo", "prompt": "Hello"}]},
    )

    model: str = Field(description="The served name, or `<served name>:<profile>`.")
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)] | None = None
    chat_template_kwargs: TemplateKwargs | None = Field(
        None, description="Passed to the model's chat template, as `enable_thinking`."
    )
    add_special_tokens: bool | None = Field(
        None, description="Of a prompt. Default: true, as in completions."
    )
    add_generation_prompt: bool | None = Field(None, description="Of messages, as in chat.")
    continue_final_message: bool | None = Field(None, description="Of messages, as in chat.")
    return_token_strs: bool | None = Field(None, description="Also tell each token's text.")

    def check(self) -> None:
        """Raise InvalidRequestError for what has no meaning together."""
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequestError("Send either 'prompt' or 'messages'.", param="prompt")
        of_messages = ("add_generation_prompt", "continue_final_message")
        wrong = of_messages if self.messages is None else ("add_special_tokens",)
        for name in wrong:
            if getattr(self, name) is not None:
                other = "messages" if self.messages is None else "prompt"
                raise InvalidRequestError(f"{name!r} belongs to {other!r}.", param=name)
        for i, message in enumerate(self.messages or ()):
            message.check(f"messages[{i}]")
            list(
                ignored_fields(message.model_extra or {}, UNSUPPORTED_IN_MESSAGE, f"messages[{i}].")
            )

    @property
    def template_flags(self) -> dict[str, bool]:
        return template_flags(
            self.messages or (), self.add_generation_prompt, self.continue_final_message
        )


def template_flags(
    messages: Sequence[Message], add_generation_prompt: bool | None, continue_final: bool | None
) -> dict[str, bool]:
    """Arguments of the chat template that say how a prompt ends; none for the usual way.

    Raises InvalidRequestError where they contradict each other or the messages.
    """
    if not continue_final:
        return {} if add_generation_prompt in (None, True) else {"add_generation_prompt": False}
    if add_generation_prompt:
        raise InvalidRequestError(
            "'continue_final_message' and 'add_generation_prompt' contradict each other; a message "
            "that is continued is not followed by a new one.",
            param="continue_final_message",
        )
    if messages[-1].role != "assistant":
        raise InvalidRequestError(
            "'continue_final_message' needs a last message of role 'assistant' "
            f"(got {messages[-1].role!r}).",
            param="continue_final_message",
        )
    return {"add_generation_prompt": False, "continue_final_message": True}


class ScoreRequest(Body):
    """A conversation to read without answering it."""

    model: str = Field(description="As in a chat request.")
    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)]
    steering: SteeringChoice | None = None

    def as_chat(self) -> ChatRequest:
        """The cheapest chat request that reads the same. Raises InvalidRequestError."""
        if self.steering is not None and self.steering.trace:
            raise InvalidRequestError(
                "A trace is of a reply's tokens, and a score has none; leave 'steering.trace' out.",
                param="steering.trace",
                code="unsupported_parameter",
            )
        return ChatRequest.model_construct(
            model=self.model,
            messages=self.messages,
            steering=self.steering,
            max_tokens=1,
            temperature=0.0,
        )


class RegisterRequest(Body):
    """A profile file in the server's `--profile-dir`."""

    path: Annotated[str, Field(min_length=1, max_length=1024)] = Field(
        description="Relative to that folder, and inside it."
    )
    name: str | None = Field(None, description="To serve it by; default: its own.")
