"""The protocol between the server and an engine, and nothing else.

A request is tokens, sampling parameters and edits; an engine answers with a stream of tokens. What
a profile is called, who may use it and how text becomes tokens is the server's business; an engine
sees profiles only to get ready for their edits.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

from steering.edit import AppliedEdit
from steering.profile import Profile

FinishReason = Literal["stop", "length"]
MonitorRead = Literal["always", "when-free", "off"]
"""When the benign probe is read: at the price of a second pass over the prompt where need be, only
where that costs no pass, or never."""


class EngineError(Exception):
    """Base of everything an engine raises for a request."""


class PromptTooLongError(EngineError):
    """The prompt, or the prompt and the tokens asked for, cannot fit. Raised before admission."""


class QueueFullError(EngineError):
    """Too many requests wait already. Raised before admission."""


class EngineStoppedError(EngineError):
    """The engine is not running (not started, shut down, or its thread died)."""


class StepFailedError(EngineError):
    """A forward pass that held this request failed; the engine lives on."""


class DeadlineExceededError(EngineError):
    """The request was not done in its time. It may have been answered in part."""


class ConstraintError(EngineError):
    """A reply cannot go on as its constraint wants it."""


class RankLimitError(EngineError):
    """A profile has more rank at a site than the engine has room for there."""


class ProfileRemovedError(EngineError):
    """An edit of the request is not registered, or not any more. Raised before admission."""


class SamplingError(ValueError):
    """A sampling parameter that has no meaning.

    Args:
        field: its name.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field} {message}")
        self.field = field


MAX_TOP_LOGPROBS = 20


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens. `server.engine.sampling` says in which order these act.

    Args:
        temperature: 0 takes the most likely token.
        top_p: keep the smallest set of tokens with this probability mass.
        top_k: keep this many tokens; 0 keeps all.
        min_p: keep tokens at least this share as likely as the most likely one.
        presence_penalty: taken from the logit of every token that was generated.
        frequency_penalty: the same, times how often.
        repetition_penalty: divides the positive and multiplies the negative logits of tokens of
            the prompt and of those generated (CTRL, arXiv 1909.05858).
        logit_bias: added to the logits of these token ids.
        seed: makes the choice reproducible, whoever else is in the batch.
        max_tokens: end with finish reason `length` after this many.
        top_logprobs: report this many of the most likely tokens with each token.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    max_tokens: int = 256
    top_logprobs: int = 0


class TokenConstraint(Protocol):
    """Says which tokens may come next in one reply, as a grammar does. V is the vocabulary.

    What a method raises fails the request it belongs to, and no other. An engine asks it for the
    tokens, or follows the grammar by its own means.
    """

    @property
    def grammar(self) -> str:
        """The whole grammar: Lark, as llguidance reads it."""
        ...

    def allowed(self) -> Tensor:
        """Bool `[V]` on the CPU: the tokens that may come next, at least one of them. Asked once
        before each token. Columns of the logits beyond V are not allowed."""
        ...

    def accept(self, token_id: int) -> None:
        """Move on by the token that was chosen; an end token is told too."""
        ...

    def copy(self) -> TokenConstraint:
        """An independent constraint in the same state. Each reply has its own."""
        ...


@dataclass(frozen=True)
class EngineRequest:
    """One sequence to generate.

    Args:
        prompt_ids: token ids of the rendered prompt, at least one.
        answer_probe: key of the monitor's answer probe to read: a profile's fingerprint, `""` for
            raw; None to read none.
        client: who asks; requests of different clients share the engine fairly. Those of clients
            without a name count as one client's.
        deadline: on `time.monotonic`'s clock; waiting or running, the request ends then.
        constraint: which tokens may come next. The engine works on a copy, so that requests may
            share one.
        benign_read: whether to read the monitor's benign probe.
        refusal_score: whether the first token generated is a reply's, so that it has one.
        priority: above 0 for what nobody waits for. It gets a slot only when nothing of a lower
            number waits, and is turned down where the queue is more than half full.
        trace: whether each token comes with what was read when it was chosen.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: Sampling = field(default_factory=Sampling)
    edits: tuple[AppliedEdit, ...] = ()
    answer_probe: str | None = None
    client: str = ""
    deadline: float = math.inf
    constraint: TokenConstraint | None = None
    benign_read: MonitorRead = "always"
    refusal_score: bool = True
    priority: int = 0
    trace: bool = False


@dataclass(frozen=True)
class PromptScores:
    """What was read when the prompt was processed. None where it was not read.

    Args:
        refusal_score: log-odds of a refusal opening, from this profile's logits.
        answer_probability: that this profile will answer.
        benign_probability: that the prompt is benign, from the unedited model.
        edit_norm: norm of the edits' change over the hidden state's, at the last prompt token.
        gate_values: of gates that latch, in the order of the edits.
    """

    refusal_score: float | None = None
    answer_probability: float | None = None
    benign_probability: float | None = None
    edit_norm: float | None = None
    gate_values: tuple[float, ...] = ()


@dataclass(frozen=True)
class TokenTrace:
    """What was read in the forward call that chose a token, at the position before it.

    That of the first token is read at the last prompt token, as `PromptScores` are. None where
    there is nothing to read it with.

    Args:
        answer_probability: of the request's own answer probe.
        benign_probability: of the best benign probe, in this request's own pass. Edits before it
            change it, so that it may differ from the `PromptScores`' one, which is the unedited
            model's.
        edit_norm: norm of the edits' change over the hidden state's, the largest over the sites.
    """

    answer_probability: float | None = None
    benign_probability: float | None = None
    edit_norm: float | None = None


@dataclass(frozen=True)
class EngineToken:
    """One generated token.

    Args:
        token_id: an end-of-sequence token is reported too, with finish reason `stop`.
        logprob: natural log of its probability in the raw distribution (before temperature,
            penalties, bias and constraint).
        top_logprobs: ids and natural logs of the likeliest tokens in the raw distribution, best
            first, as many as were asked for.
        finish_reason: set on the last token only.
        scores: on the first token only.
        queue_seconds: on the first token only, time from submission to admission.
        cached_tokens: on the first token only, prompt tokens that were not computed again.
        trace: on every token of a request that asks for it.
    """

    token_id: int
    logprob: float
    top_logprobs: tuple[tuple[int, float], ...] = ()
    finish_reason: FinishReason | None = None
    scores: PromptScores | None = None
    queue_seconds: float | None = None
    cached_tokens: int | None = None
    trace: TokenTrace | None = None


@dataclass(frozen=True)
class EngineStats:
    """A snapshot for the metrics page.

    Args:
        waiting: requests that somebody waits for.
    """

    running: int
    waiting: int
    slots: int
    slots_used: int


class Engine(Protocol):
    """What the server needs of an engine."""

    @property
    def max_model_len(self) -> int:
        """Longest prompt plus reply in tokens."""
        ...

    def start(self) -> None:
        """Begin to serve. Returns when the engine is ready; raises if it cannot be."""
        ...

    def register(self, profile: Profile) -> None:
        """Test on the model that it does what the profile says, and get ready to apply it.

        Requests under way go on. Waits: from an event loop, call it in a thread. Raises
        ProfileError if it does not, RankLimitError if there is no room, EngineStoppedError; then
        nothing has changed.
        """
        ...

    def retain(self, profiles: Iterable[Profile]) -> None:
        """Give up what no other profile needs, each when no request uses it any more. Waits."""
        ...

    def check(self, request: EngineRequest) -> None:
        """Raise PromptTooLongError or ValueError (SamplingError where a parameter of sampling is
        to blame) if the request could never run."""
        ...

    def generate(self, request: EngineRequest) -> AsyncGenerator[EngineToken, None]:
        """Submit at once and stream tokens.

        Closing the iterator (or cancelling the task that reads it) cancels the request and frees
        its slot in the next step. Raises EngineError subclasses.
        """
        ...

    def generate_all(
        self, requests: Sequence[EngineRequest]
    ) -> list[AsyncGenerator[EngineToken, None]]:
        """Submit requests together: all are admitted to the queue, or QueueFullError is raised
        and none is."""
        ...

    def stats(self) -> EngineStats: ...

    def healthy(self) -> bool:
        """True while the engine can serve requests."""
        ...

    def close(self) -> None:
        """Stop; requests under way fail with EngineStoppedError. May be called twice."""
        ...
