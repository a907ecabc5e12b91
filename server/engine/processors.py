"""What a request changes in its own logits before a token is chosen.

In vLLM's order: the constraint (what it forbids becomes minus infinity), `logit_bias`, then
`repetition_penalty`, `frequency_penalty` and `presence_penalty`. Temperature, `min_p`, `top_k` and
`top_p` follow in `server.engine.sampling`. Every change is of a row's own numbers only, element by
element, so that a row comes out the same in any company; rows that ask for none of it are not
touched, and a batch without such rows is not even copied.

Shapes: N rows, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from server.engine.base import ConstraintError, EngineRequest, Sampling

logger = logging.getLogger(__name__)

Failure = str | ConstraintError
"""Why a row cannot go on."""

NOTHING_ALLOWED = "no token is allowed here"


class Processor:
    """The changes one request asks for, and what of its reply they depend on."""

    def __init__(self, request: EngineRequest) -> None:
        self.sampling = request.sampling
        self.constraint = None if request.constraint is None else request.constraint.copy()
        self.penalises = _penalises(request.sampling)
        self._prompt_ids = request.prompt_ids
        self._bias: tuple[Tensor, Tensor] | None = None
        self.counts: Tensor | None = None
        """`[V]`, how often each token was generated, once the first logits have come."""
        self.seen: Tensor | None = None
        """Bool `[V]`, the tokens of the prompt and those generated."""

    def prepare(self, logits: Tensor) -> None:
        """Make what is kept per token; V and device are known with the first logits `[N, V]`."""
        if self.penalises and self.counts is None:
            self.counts = logits.new_zeros(logits.shape[1])
            self.seen = torch.zeros_like(self.counts, dtype=torch.bool)
            self.seen[torch.tensor(self._prompt_ids, device=logits.device)] = True
        if self.sampling.logit_bias and self._bias is None:
            bias = self.sampling.logit_bias
            self._bias = (
                torch.tensor(list(bias), device=logits.device),
                logits.new_tensor(list(bias.values())),
            )

    def add_bias(self, row: Tensor) -> None:
        """Add the bias to a row `[V]`, in place."""
        if self._bias is not None:
            ids, values = self._bias
            row[ids] += values

    def forbid(self, row: Tensor) -> None:
        """Put minus infinity where the constraint forbids a token of a row `[V]`, in place."""
        if self.constraint is not None:
            allowed = self.constraint.allowed().to(row.device)
            row[: len(allowed)].masked_fill_(~allowed[: len(row)], -torch.inf)
            row[len(allowed) :] = -torch.inf

    def record(self, token_id: int) -> None:
        """A token was chosen. Raises what the constraint raises."""
        if self.counts is not None and self.seen is not None:
            self.counts[token_id] += 1
            self.seen[token_id] = True
        if self.constraint is not None:
            self.constraint.accept(token_id)


def make_processor(request: EngineRequest) -> Processor | None:
    """What changes this request's logits; None if nothing does. Raises what copying the request's
    constraint raises."""
    sampling = request.sampling
    if request.constraint is None and not (sampling.logit_bias or _penalises(sampling)):
        return None
    return Processor(request)


def failure(error: Exception) -> Failure:
    """What to tell of a constraint that raised this."""
    if isinstance(error, ConstraintError):  # it knows why
        return error
    logger.exception("the constraint of a reply failed")
    return f"the constraint failed: {type(error).__name__}: {error}"


def process(
    logits: Tensor, processors: Sequence[Processor | None]
) -> tuple[Tensor, dict[int, Failure]]:
    """Logits `[N, V]` as each row's processor changes them, and why rows cannot go on, by index.

    The logits given stay as they are.
    """
    asked = [(i, p) for i, p in enumerate(processors) if p is not None]
    if not asked:
        return logits, {}
    changed = logits[[i for i, _ in asked]]
    failed: dict[int, Failure] = {}
    for (i, processor), row in zip(asked, changed, strict=True):
        try:
            processor.prepare(logits)
            processor.forbid(row)
        except Exception as error:  # one request's constraint is no other request's trouble
            failed[i] = failure(error)
            continue
        processor.add_bias(row)
    penalised = [j for j, (i, p) in enumerate(asked) if p.penalises and i not in failed]
    if penalised:
        changed[penalised] = _penalise(changed[penalised], [asked[j][1] for j in penalised])
    dead = (changed.amax(-1) == -torch.inf).tolist()
    failed |= {i: NOTHING_ALLOWED for (i, _), d in zip(asked, dead, strict=True) if d}
    result = logits.clone()
    result[[i for i, _ in asked]] = changed
    return result, failed


def _penalise(logits: Tensor, processors: Sequence[Processor]) -> Tensor:
    """Rows `[N, V]` less their penalties."""

    def column(values: list[float]) -> Tensor:
        return logits.new_tensor(values)[:, None]

    samplings = [p.sampling for p in processors]
    counts = torch.stack([p.counts for p in processors if p.counts is not None])
    if any(s.repetition_penalty != 1 for s in samplings):
        seen = torch.stack([p.seen for p in processors if p.seen is not None])
        repetition = column([s.repetition_penalty for s in samplings])
        less = torch.where(logits > 0, logits / repetition, logits * repetition)
        logits = torch.where(seen, less, logits)
    logits = logits - column([s.frequency_penalty for s in samplings]) * counts
    return logits - column([s.presence_penalty for s in samplings]) * (counts > 0)


def _penalises(sampling: Sampling) -> bool:
    return bool(
        sampling.presence_penalty or sampling.frequency_penalty or sampling.repetition_penalty != 1
    )
