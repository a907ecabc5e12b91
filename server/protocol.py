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
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from server.errors import InvalidRequestError
from server.structured import ResponseFormat
from server.tools import MAX_TOOLS, Tool, ToolCallTurn, ToolChoice

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
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "service_tier": ("auto", "default"),
    "stop": ([],),
    "store": (False,),
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


Content = Annotated[
    Annotated[str, Tag("<string>")] | Annotated[list[TextPart], Tag("<parts>")],
    Discriminator(_content_kind),
]


class Message(_Strict):
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

    def rendered(self, param: str) -> dict[str, Any]:
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


class ChatRequest(_Strict):
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
    messages: Annotated[list[Message], Field(min_length=1)]
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
    def asked_tokens(self) -> int | None:
        if self.max_completion_tokens is not None:
            return self.max_completion_tokens
        return self.max_tokens

    def check(self) -> list[str]:
        """Refuse what would have no effect or none that was meant; name the fields ignored."""
        ignored = list(_ignored(self.model_extra or {}, UNSUPPORTED, ""))
        if self.response_format is not None:
            self.response_format.check()
        for i, message in enumerate(self.messages):
            message.check(f"messages[{i}]")
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
