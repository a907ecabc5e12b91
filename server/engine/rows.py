"""A request that the engine has taken in: where it stands, and what it needs next."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from server.engine.base import EngineRequest, PromptScores
from server.engine.processors import Failure, Processor, failure, make_processor
from server.engine.sampling import make_generator
from server.engine.stream import Outbox
from steering.monitor import Monitor, Probe
from steering.plan import RowEdits, Step


@dataclass(eq=False)
class Waiting:
    """A submitted request that has no slot yet."""

    request: EngineRequest
    outbox: Outbox
    since: float = field(default_factory=time.monotonic)


class Row:
    """One request in a slot.

    If a benign probe must be read from the unedited model (`benign_read`) and no probe lies before
    the first edit, the row reads its prompt twice in its own slot: unedited (`probing`), then as
    asked.
    """

    def __init__(self, waiting: Waiting, monitor: Monitor | None) -> None:
        request = waiting.request
        self.request = request
        self.outbox = waiting.outbox
        self.queue_seconds = time.monotonic() - waiting.since
        self.slot = -1
        self.position = 0
        """Tokens of this row whose keys and values are in the slot."""
        self.generated = 0
        self.last_token = -1
        self.reply: list[int] = []
        self.generator: torch.Generator | None = make_generator(request.sampling)
        self.processor: Processor | None = make_processor(request)
        self.edits = RowEdits(request.edits, len(request.prompt_ids))

        self.benign_probe: Probe | None = None
        self.answer_probe: Probe | None = None
        self.benign_probability: float | None = None
        self.probing = False
        self._monitored = monitor is not None
        self.trace_probes: tuple[Probe | None, Probe | None] = (None, None)
        """For the answer and for the benign probability of each token's trace."""
        if monitor is not None:
            if request.answer_probe is not None:
                self.answer_probe = monitor.answer.get(request.answer_probe)
            read = request.benign_read
            if read != "off":
                self.benign_probe = monitor.benign_probe_for(request.edits)
            if self.benign_probe is None and monitor.benign and read == "always":
                self.benign_probe, self.probing = monitor.benign_probe, True
            if request.trace:
                benign = monitor.benign_probe if monitor.benign and read != "off" else None
                self.trace_probes = (self.answer_probe, benign)
        self.cached_tokens = 0
        """Of the prompt, as asked, taken from the prefix cache."""
        self.asked = self.edits
        if self.probing:
            self.edits = RowEdits((), self.prompt_length)

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt_ids)

    def chunk_length(self, limit: int) -> int:
        """Prompt tokens to read in the next call."""
        rest = self.prompt_length - self.position
        return rest if self.edits.needs_whole_prompt else min(rest, limit)

    def begin_asked_pass(self) -> None:
        """Read the prompt once more, with the edits that were asked for."""
        self.edits, self.position, self.probing = self.asked, 0, False
        self.cached_tokens = 0

    @property
    def reusable(self) -> Sequence[int]:
        """The tokens whose keys and values in the slot other prompts that begin so would get too.

        None where a gate is read over the whole prompt, since it changes what lies before; and
        none of the reply where an edit knows phases, since there they would be a prompt's.
        """
        if self.edits.needs_whole_prompt:
            return ()
        if any(applied.edit.phase != "all" for applied in self.edits.edits):
            return self.request.prompt_ids[: self.position]
        return (*self.request.prompt_ids, *self.reply)[: self.position]

    @property
    def probes(self) -> list[Probe]:
        """Probes to read at the end of the pass under way."""
        found = [self.benign_probe] if self.benign_probability is None else []
        if not self.probing:
            found.append(self.answer_probe)
        return [probe for probe in found if probe is not None]

    def read_benign(self, step: Step, i: int) -> None:
        """Take the benign probability from a call in which this was row `i`, unless known."""
        if self.benign_probability is None:
            self.benign_probability = _probability(self.benign_probe, step, i)

    def scores(self, step: Step, i: int, refusal_score: float | None) -> PromptScores:
        """Scores from the call that ended the prompt, in which this was row `i`."""
        latched, norm = self.edits.latched, step.edit_norm
        return PromptScores(
            refusal_score=refusal_score if self.request.refusal_score else None,
            answer_probability=_probability(self.answer_probe, step, i),
            benign_probability=self.benign_probability,
            edit_norm=float(norm[i]) if norm is not None and self._monitored else None,
            gate_values=tuple(float(latched[j]) for j in sorted(latched)),
        )

    def record(self, token_id: int) -> Failure | None:
        """Take in the token that was chosen; why the row cannot go on, if it cannot."""
        self.generated += 1
        self.last_token = token_id
        self.reply.append(token_id)
        if self.processor is not None:
            try:
                self.processor.record(token_id)
            except Exception as error:  # one request's constraint is no other request's trouble
                return failure(error)
        return None

    def next_tokens(self, length: int) -> Sequence[int]:
        """The tokens of the next call: a piece of the prompt, or the last generated one."""
        if self.position < self.prompt_length:
            return self.request.prompt_ids[self.position : self.position + length]
        return [self.last_token]


def _probability(probe: Probe | None, step: Step, i: int) -> float | None:
    return None if probe is None else float(probe.probability(step.captured[probe.site][i]))
