"""What clients get: OpenAI's shapes, with our own data under the one key `steering`.

What they send is in `server.protocol`, errors are in `server.errors`.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from server.engine.base import FinishReason
from steering.judge import Outcome
from steering.monitor import PromptClass


class PromptTokensDetails(BaseModel):
    cached_tokens: int = Field(0, description="Read from the prefix cache, not computed again.")


ChatFinishReason = FinishReason | Literal["tool_calls"]


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class ProfileUsed(BaseModel):
    name: str
    fingerprint: str
    strength: float


class Answerer(BaseModel):
    """What answered.

    `profiles` (a list of ProfileUsed) is added where there are several, `phase` where the request
    set it, `derived_base: true` where a profile was fitted on other weights than those served, and
    `monitor: "out_of_template"` where the prompt is of another form than the monitor was fitted on.
    """

    model_config = ConfigDict(extra="allow")

    profile: str = Field(description="Its name; several are joined in order, as in `a+b`.")
    fingerprint: str = Field(
        description="SHA-256 of what the profile does, or of the ordered effective edits of "
        "several; empty without edits."
    )
    strength: float | None = Field(description="Null where there are several: each has its own.")


class Receipt(Answerer):
    """What answered, and what was read while it did. Null where nothing was read."""

    experiment: str | None = None
    arm: str | None = None
    refusal_score: float | None = Field(
        None, description="Log-odds of a refusal's opening, from this profile's first logits."
    )
    answer_probability: float | None = Field(None, description="That this profile will answer.")
    benign_probability: float | None = Field(
        None, description="That the prompt is benign, as the unedited model sees it."
    )
    outcome: Outcome | None = Field(None, description="What the reply's text is judged to be.")
    judge: str | None = Field(
        None, description="Version of the judge that said so; null for a reply that calls a tool."
    )


class CalledFunction(BaseModel):
    name: str
    arguments: str = Field(description="A JSON object, as text.")


class ToolCall(BaseModel):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class TracedToken(BaseModel):
    """What was read in the forward pass that chose a token, at the position before it. Null where
    nothing was read."""

    token: str = Field(description="Its text; `bytes:\\xe2\\x80` for a part of a character.")
    offset: int = Field(description="Characters (code points) of the reply before it.")
    answer_probability: float | None = Field(
        description="By the profile's answer probe, which was calibrated on the last prompt token: "
        "what it reads later is an extrapolation."
    )
    benign_probability: float | None = Field(
        description="By the best benign probe in this very pass, edits and all; the receipt's is "
        "the unedited model's. Calibrated on the last prompt token, too."
    )
    edit_norm: float | None = Field(
        description="Norm of the edits' change over the hidden state's, the largest over the sites."
    )


class ChoiceReceipt(BaseModel):
    """A choice's part of the receipt, where one request has several."""

    refusal_score: float | None = None
    answer_probability: float | None = None
    benign_probability: float | None = None
    outcome: Outcome | None = None


class TracedReceipt(ChoiceReceipt):
    """A choice's own part of the receipt, with its trace; in a stream, the trace alone."""

    trace: list[TracedToken] = Field(
        description="An entry per token; in a stream, those that begin in the chunk's text."
    )


class TopLogprob(BaseModel):
    token: str = Field(description="Its text; `bytes:\\xe2\\x80` for a part of a character.")
    logprob: float = Field(
        description="In the raw distribution: before temperature, penalties, bias and grammar."
    )
    bytes: list[int] | None = Field(description="Null for special tokens, which are no text.")


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob] = Field(description="The likeliest tokens, best first.")


class ChatLogprobs(BaseModel):
    """Of the tokens that begin in the text; one that ends the reply is not among them."""

    content: list[TokenLogprob]
    refusal: None = None


class ReplyMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str | None = Field(description="Null where there is nothing but tool calls.")
    refusal: None = None
    """Always null: a steered refusal is content."""
    tool_calls: list[ToolCall] | None = None


class Choice(BaseModel):
    index: int = 0
    message: ReplyMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: ChatFinishReason
    steering: TracedReceipt | ChoiceReceipt | None = Field(
        None, description="Only where there are several, or a trace."
    )


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[Choice]
    usage: Usage
    steering: Receipt


class FunctionDelta(BaseModel):
    name: str | None = Field(None, description="With the call's first piece only.")
    arguments: str


class ToolCallDelta(BaseModel):
    index: int
    id: str | None = Field(None, description="With the call's first piece only.")
    type: Literal["function"] | None = None
    function: FunctionDelta


class Delta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChunkChoice(BaseModel):
    index: int = 0
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: ChatFinishReason | None = None
    steering: TracedReceipt | ChoiceReceipt | None = Field(
        None,
        description="With the finish reason, where there are several choices; with text, its "
        "`trace` and nothing else.",
    )


class ChatCompletionChunk(BaseModel):
    """One event of a stream; `[DONE]` follows the last one."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    steering: Receipt | None = Field(None, description="With the last finish reason only.")


class CompletionLogprobs(BaseModel):
    """Of the tokens that begin in the text; one that ends the reply is not among them."""

    tokens: list[str]
    token_logprobs: list[float] = Field(description="In the raw distribution.")
    top_logprobs: list[dict[str, float]]
    text_offset: list[int] = Field(description="Characters of the choice's text before each.")


class CompletionChoice(BaseModel):
    index: int = 0
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = Field(description="Null in a stream, but for the last.")
    steering: TracedReceipt | ChoiceReceipt | None = Field(
        None, description="Only where there are several, or a trace."
    )


class Completion(BaseModel):
    """A completion, or one event of a stream, which `[DONE]` ends."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    steering: Receipt | None = Field(None, description="In a stream, with the last finish reason.")


class Tokens(BaseModel):
    """What a prompt is to the model."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "pilothouse"
    root: str = Field(description="The model behind it.")
    parent: str | None = Field(description="The served name, for a model with a profile.")
    profile: str | None = Field(description="Null for an experiment, which chooses one.")
    experiment: str | None = None
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class ProfileCard(BaseModel):
    name: str
    object: Literal["steering.profile"] = "steering.profile"
    model: str = Field(description="A value of `model` that asks for this profile.")
    method: str
    fingerprint: str
    strength: float
    default: bool
    identity: bool = Field(description="It has no edits: the unedited model.")
    folded: bool = Field(description="It is part of the weights (`--fold`).")
    red_team: bool
    derived_base: bool = Field(description="Fitted on other weights than the ones served.")
    layers: int = Field(description="Blocks of the model, of which the edits' sites name some.")
    edits: list[dict[str, Any]]
    card: dict[str, Any]
    provenance: dict[str, Any]


class ProfileList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ProfileCard]


class ProfileDeleted(BaseModel):
    name: str
    object: Literal["steering.profile.deleted"] = "steering.profile.deleted"
    deleted: Literal[True] = True


class ArmCard(BaseModel):
    name: str
    profile: str
    strength: float | None = Field(description="Null: the profile's own.")
    weight: float
    stopped: dict[str, Any] | None = Field(
        description="Since when and why its units get the control; null while it is open."
    )


class ExperimentCard(BaseModel):
    """An experiment, its latest version, and what became of it."""

    model_config = ConfigDict(extra="allow")

    name: str
    object: Literal["steering.experiment"] = "steering.experiment"
    model: str = Field(description="A value of `model` that takes part.")
    version: int
    versions: list[int] = Field(description="All there were; `report?version=` takes any.")
    status: Literal["scheduled", "running", "ended"]
    default: bool = Field(description="Takes in requests that name neither a profile nor another.")
    source: Literal["settings", "api"]
    ended: float | None = Field(description="When somebody ended it, in seconds since 1970.")
    arms: list[ArmCard] = Field(description="The first is the control.")


class ExperimentList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ExperimentCard]


class ExperimentEnded(BaseModel):
    name: str
    object: Literal["steering.experiment.ended"] = "steering.experiment.ended"
    ended: Literal[True] = True


class Score(Answerer):
    """What is read of a conversation before an answer. Null where nothing was read."""

    id: str
    object: Literal["steering.score"] = "steering.score"
    model: str
    refusal_score: float | None = Field(
        description="Log-odds of a refusal's opening, from this profile's first logits."
    )
    answer_probability: float | None = Field(description="That this profile will answer.")
    benign_probability: float | None = Field(
        description="That the prompt is benign, as the unedited model sees it."
    )
    prompt_class: PromptClass = Field(description="What the benign probability amounts to.")
    edit_norm: float | None = Field(
        description="Norm of the edits' change over the hidden state's, at the last prompt token."
    )
    gate_values: list[float | None] = Field(
        description="Of gates that are read once per prompt, in the order of the edits."
    )
    usage: Usage


class Status(BaseModel):
    status: str


class Health(Status):
    records: Literal["ok", "behind", "failing", "off"]


class Version(BaseModel):
    version: str


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str


class ErrorEnvelope(BaseModel):
    error: ErrorBody
