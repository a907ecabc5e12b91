"""What clients send to `POST /v1/steering/compare`, and what they get."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from server.engine.base import FinishReason
from server.protocol import (
    ChatRequest,
    Message,
    SamplingFields,
    SteeringChoice,
    Strength,
    TemplateKwargs,
)
from server.responses import Answerer, ErrorBody, PromptTokensDetails, Receipt, TracedToken, Usage
from server.unsupported import UNSUPPORTED_IN_COMPARE, ignored_fields
from server.validation import MOST_MESSAGES, Strict
from steering.monitor import PromptClass

MAX_ARMS = 8
Conversation = Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)]


class ArmRequest(Strict):
    """One of the profiles compared."""

    profile: str = Field(description="A name that `GET /v1/steering/profiles` lists.")
    strength: Strength | None = Field(
        None, description="Scales its edits; 0 is the unedited model. Default: the profile's own."
    )
    messages: Conversation | None = Field(
        None,
        description="This arm's own conversation, as histories part after the first turn. "
        "Default: the request's `messages`.",
    )


class CompareRequest(SamplingFields):
    """A conversation to be answered under several profiles at once."""

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={
            "examples": [
                {
                    "messages": [{"role": "user", "content": "Tell me how to bake a cake."}],
                    "arms": [{"profile": "raw"}, {"profile": "llm-va", "strength": 0.5}],
                    "trace": True,
                }
            ]
        },
    )

    model: str | None = Field(
        None, description="The served name, which is the default; the arms name the profiles."
    )
    messages: Conversation
    arms: Annotated[list[ArmRequest], Field(min_length=1, max_length=MAX_ARMS)] = Field(
        description="At most as many as the server has slots."
    )
    trace: bool | None = Field(
        None, description="Tell with each token what was read when it was chosen. Default: false."
    )
    stream: bool | None = Field(
        None, description="Answer in server-sent events. Default, unlike elsewhere: true."
    )
    chat_template_kwargs: TemplateKwargs | None = Field(
        None, description="Passed to the model's chat template, as `enable_thinking`."
    )

    @property
    def streams(self) -> bool:
        return self.stream is not False

    @property
    def asked_profiles(self) -> dict[str, str]:
        """Who was asked for, in short, for the audit log."""
        named = ",".join(arm.profile for arm in self.arms)
        return {"model": (self.model or "")[:200], "profiles": named[:200]}

    def check(self) -> list[str]:
        """Refuse what this endpoint cannot honour; name the fields ignored."""
        ignored = list(ignored_fields(self.model_extra or {}, UNSUPPORTED_IN_COMPARE, ""))
        self.check_limits()
        return ignored

    def as_chat(self, arm: ArmRequest, model: str) -> ChatRequest:
        """The chat request that an arm comes to."""
        sampling = {name: getattr(self, name) for name in SamplingFields.model_fields}
        return ChatRequest.model_construct(
            model=model,
            messages=self.messages if arm.messages is None else arm.messages,
            steering=SteeringChoice.model_validate(
                {"profile": arm.profile, "strength": arm.strength, "trace": self.trace}
            ),
            stream=self.streams,
            chat_template_kwargs=self.chat_template_kwargs,
            **sampling,
        )


ArmFinish = FinishReason | Literal["error"]


class ArmMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str


class ArmReceipt(Receipt):
    trace: list[TracedToken] | None = Field(None, description="Only if asked for.")


class ArmChoice(BaseModel):
    """An arm's whole reply."""

    index: int = Field(description="Of the arm.")
    message: ArmMessage
    finish_reason: ArmFinish
    steering: ArmReceipt
    usage: Usage
    error: ErrorBody | None = Field(
        None, description="Why it broke off, with the finish reason `error`; else absent."
    )


class Comparison(BaseModel):
    """Replies of all arms, in their order."""

    id: str
    object: Literal["steering.compare"] = "steering.compare"
    created: int
    model: str
    choices: list[ArmChoice]
    usage: Usage = Field(description="Sum over the arms that did not fail.")


class PromptReading(BaseModel):
    """What was read of an arm's prompt. Null where nothing was read."""

    refusal_score: float | None
    answer_probability: float | None
    benign_probability: float | None
    prompt_class: PromptClass
    edit_norm: float | None


class ArmPrompt(BaseModel):
    prompt: PromptReading


class ArmTrace(BaseModel):
    trace: list[TracedToken]


class ArmDelta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ArmChunk(BaseModel):
    index: int = Field(description="Of the arm.")
    delta: ArmDelta
    finish_reason: ArmFinish | None
    steering: Receipt | Answerer | ArmPrompt | ArmTrace | None = Field(
        None,
        description="With the first event what answers; then `prompt`, as soon as it is known; "
        "with text its `trace`, if asked for; with the finish reason the receipt.",
    )
    usage: Usage | None = Field(None, description="Of this arm, with its finish reason.")
    error: ErrorBody | None = Field(None, description="With the finish reason `error`.")


class ComparisonChunk(BaseModel):
    """One event of a stream: one arm's, or at the end no arm's and the `usage`. `[DONE]` follows
    the last one."""

    id: str
    object: Literal["steering.compare.chunk"] = "steering.compare.chunk"
    created: int
    model: str
    choices: list[ArmChunk] = Field(max_length=1)
    usage: Usage | None = None


def total(usages: Sequence[Usage]) -> Usage:
    """The sum."""
    cached = sum(usage.prompt_tokens_details.cached_tokens for usage in usages)
    return Usage(
        prompt_tokens=sum(usage.prompt_tokens for usage in usages),
        completion_tokens=sum(usage.completion_tokens for usage in usages),
        total_tokens=sum(usage.total_tokens for usage in usages),
        prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
    )
