"""What clients send, after OpenAI's chat completions.

Strict where a mistake would otherwise pass unnoticed: numbers must be numbers in range, a field
that OpenAI or vLLM knows and this server cannot honour is refused (`UNSUPPORTED`), and so is an
unknown key inside `steering`. Other unknown keys are accepted, since clients send their vendors'
own, and named in the response header `X-Ignored-Fields`. What clients get: `server.responses`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    ModelWrapValidatorHandler,
    Tag,
    ValidationError,
    model_validator,
)

from server.errors import InvalidRequestError
from server.validation import MOST_MESSAGES, MOST_MISTAKES

# Fields of OpenAI's or vLLM's API that this server does not implement, with the values that ask
# for nothing. Null asks for nothing everywhere.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    # OpenAI
    "audio": (),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "moderation": (),
    "n": (1,),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "stop": ([],),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": ("medium",),
    "web_search_options": (),
    # vLLM and others
    "add_generation_prompt": (True,),
    "add_special_tokens": (False,),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "best_of": (1,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "echo": (False,),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "ignore_eos": (False,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "min_p": (0,),
    "min_tokens": (0,),
    "priority": (0,),
    "prompt_logprobs": (0,),
    "repetition_penalty": (1,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "stop_token_ids": ([],),
    "structured_outputs": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
}
UNSUPPORTED_IN_MESSAGE: dict[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "tool_call_id": (),
    "tool_calls": ([],),
}


class _Strict(BaseModel):
    # Fields that are absent and fields that are null mean the same thing.
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class TextPart(_Strict):
    """A piece of a message's content. Only text is understood."""

    type: Literal["text"]
    text: str


def _content_kind(value: object) -> str:
    return "<parts>" if isinstance(value, list) else "<string>"


class Message(_Strict):
    """One turn of the conversation."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[str, Tag("<string>")]
        | Annotated[list[TextPart], Field(fail_fast=True), Tag("<parts>")],
        Discriminator(_content_kind),
    ] = Field(description="Text, or a list of text parts, which are joined by newlines.")

    def rendered(self) -> dict[str, str]:
        """As chat templates want it: they know no developer role and no parts."""
        text = self.content
        if isinstance(text, list):
            text = "\n".join(part.text for part in text)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(_Strict):
    """Only together with `stream: true`."""

    include_usage: bool | None = Field(
        None, description="Send one more chunk, with no choices and the request's `usage`."
    )
    include_obfuscation: bool | None = Field(
        None, description="Accepted for OpenAI's clients; there is never any obfuscation."
    )


class SteeringChoice(_Strict):
    """Which profile answers, and how strongly it is applied."""

    profile: str | None = Field(None, description="A name that `GET /v1/steering/profiles` lists.")
    # Far beyond any use; further out, float32 overflows and the reply could not be computed.
    strength: Annotated[float, Field(ge=-1e4, le=1e4)] | None = Field(
        None, description="Scales the profile's edits; 0 is the unedited model. Default: its own."
    )


class Body(_Strict):
    """A request's body, whose mistakes are not even listed if there are very many.

    Listing them is slow: a small body can hold a million.
    """

    @model_validator(mode="wrap")
    @classmethod
    def _stop_at_many(cls, value: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return validate(value)
        except ValidationError as error:
            if (count := error.error_count()) > MOST_MISTAKES:
                raise InvalidRequestError(f"The body has {count} mistakes.") from None
            raise


class ChatRequest(Body):
    """A conversation to continue."""

    model_config = ConfigDict(
        extra="allow",
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

    model: str = Field(description="The served name, or `<served name>:<profile>`.")
    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)]
    steering: SteeringChoice | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = Field(
        None, description="End the reply after this many tokens. Default: 256, or what fits."
    )
    max_tokens: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Older name of `max_completion_tokens`."
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
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = Field(
        None, description="The same seed gives the same reply, whoever else is being served."
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
        profile = self.steering and self.steering.profile
        return {"model": self.model[:200]} | ({"profile": profile[:200]} if profile else {})

    @property
    def asked_tokens(self) -> int | None:
        if self.max_completion_tokens is not None:
            return self.max_completion_tokens
        return self.max_tokens

    def check(self) -> list[str]:
        """Refuse what would have no effect or none that was meant; name the fields ignored."""
        ignored = list(_ignored(self.model_extra or {}, UNSUPPORTED, ""))
        for i, message in enumerate(self.messages):
            extra = message.model_extra or {}
            ignored += _ignored(extra, UNSUPPORTED_IN_MESSAGE, f"messages[{i}].")
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError(
                "'stream_options' is only possible with 'stream': true.", param="stream_options"
            )
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise InvalidRequestError(
                "'max_tokens' and 'max_completion_tokens' contradict each other; send one of them.",
                param="max_tokens",
            )
        return ignored


def _ignored(
    extra: dict[str, Any], unsupported: dict[str, tuple[Any, ...]], prefix: str
) -> Iterator[str]:
    for name, value in extra.items():
        if value is None:
            continue
        accepted = unsupported.get(name)
        if accepted is None:
            yield re.sub(r"\[\d+\]", "", prefix) + name
        elif not any(_same(value, default) for default in accepted):
            told = f" (leave it out or send {json.dumps(accepted[0])})" if accepted else ""
            raise InvalidRequestError(
                f"This server does not support {prefix + name!r}{told}.",
                param=prefix + name,
                code="unsupported_parameter",
            )


def _same(value: Any, default: Any) -> bool:
    """Equal, and no boolean that stands for a number or the other way round."""
    return bool(value == default) and isinstance(value, bool) == isinstance(default, bool)
