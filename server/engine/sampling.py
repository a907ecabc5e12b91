"""Choose the next token of every row, each by its own parameters and its own random numbers.

In vLLM's order: raw logprobs are taken; the row's processors change its logits (constraint,
`logit_bias`, penalties: `server.engine.processors`); greedy rows take the best token; of the others
the logits are divided by `temperature`, then `min_p`, then `top_k`, then `top_p` cut the
distribution, and what is left is drawn from.

A row draws one uniform number per token from its own generator and looks it up in its cumulative
distribution, so its choice does not depend on who else is in the batch.

Shapes: N rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from server.engine.base import MAX_TOP_LOGPROBS, Sampling, SamplingError
from server.engine.processors import Failure, Processor, process

_HEAD = 1024
"""Tokens looked at before a whole row is sorted. Fixed, since how ties are ordered may depend on
it, and a seed must mean the same tokens in any company."""

_COLDEST = 1e-5


NOT_FINITE = "the model produced values that are not finite"


@dataclass(frozen=True)
class Choice:
    """What was chosen for each row.

    Args:
        logprobs: natural logs in the raw distribution, before anything that a request asks for.
        top_logprobs: of each row, the ids and raw logprobs of as many tokens as it asks for.
        errors: why a row cannot go on, else None; its token means nothing then.
    """

    token_ids: list[int]
    logprobs: list[float]
    top_logprobs: list[tuple[tuple[int, float], ...]]
    errors: list[Failure | None]


_RANGES: dict[str, tuple[float, float]] = {
    "min_p": (0, 1),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "repetition_penalty": (0.01, 100),  # further out, float32 logits could overflow
    "top_logprobs": (0, MAX_TOP_LOGPROBS),
}
MAX_BIAS = 100


def check_sampling(sampling: Sampling, vocabulary: int | None = None) -> None:
    """Raise SamplingError, which names the field, on parameters that have no meaning.

    Args:
        vocabulary: token ids must be below it.
    """
    if not (math.isfinite(sampling.temperature) and sampling.temperature >= 0):
        raise SamplingError(
            "temperature", f"must be finite and at least 0, got {sampling.temperature}"
        )
    if not 0 < sampling.top_p <= 1:
        raise SamplingError("top_p", f"must be above 0 and at most 1, got {sampling.top_p}")
    if not 0 <= sampling.top_k < 2**31:
        raise SamplingError("top_k", f"must be at least 0 and below 2**31, got {sampling.top_k}")
    if sampling.max_tokens < 1:
        raise SamplingError("max_tokens", f"must be at least 1, got {sampling.max_tokens}")
    for name, (least, most) in _RANGES.items():
        if not least <= (value := getattr(sampling, name)) <= most:
            raise SamplingError(name, f"must be between {least} and {most}, got {value}")
    for token_id, bias in sampling.logit_bias.items():
        if token_id < 0 or (vocabulary is not None and token_id >= vocabulary):
            below = "" if vocabulary is None else f" and below {vocabulary}"
            raise SamplingError(
                "logit_bias", f"must hold token ids of at least 0{below}, got {token_id}"
            )
        if not -MAX_BIAS <= bias <= MAX_BIAS:
            raise SamplingError(
                "logit_bias", f"must hold values between -{MAX_BIAS} and {MAX_BIAS}, got {bias}"
            )


def is_greedy(sampling: Sampling) -> bool:
    """True where only the most likely token can be chosen: below this temperature any other one's
    probability would vanish, or the division overflow."""
    return sampling.temperature < _COLDEST


def make_generator(sampling: Sampling) -> torch.Generator | None:
    """The row's source of random numbers, on the CPU so that every device draws the same ones."""
    if is_greedy(sampling):
        return None
    generator = torch.Generator()
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed % 2**63)
    return generator


def sample(
    logits: Tensor,
    samplings: Sequence[Sampling],
    generators: Sequence[torch.Generator | None],
    processors: Sequence[Processor | None] = (),
) -> Choice:
    """Choose a token per row from `logits` `[N, V]`, which stay as they are."""
    logits = logits.float()
    normaliser = logits.logsumexp(-1)  # not finite exactly where the row has NaN or infinity
    changed, failed = process(logits, processors)
    tokens = changed.argmax(-1)
    drawn = [i for i, s in enumerate(samplings) if not is_greedy(s)]
    if drawn:
        uniforms = [
            float(torch.rand((), generator=generators[i], dtype=torch.float64)) for i in drawn
        ]
        index = torch.tensor(drawn, device=logits.device)
        tokens[index] = _draw(changed[index], [samplings[i] for i in drawn], uniforms)
    logprobs = logits.gather(1, tokens[:, None])[:, 0] - normaliser
    finite = normaliser.isfinite().tolist()
    return Choice(
        tokens.tolist(),
        logprobs.tolist(),
        _top_logprobs(logits, normaliser, samplings),
        [failed.get(i) if ok else NOT_FINITE for i, ok in enumerate(finite)],
    )


def _top_logprobs(
    logits: Tensor, normaliser: Tensor, samplings: Sequence[Sampling]
) -> list[tuple[tuple[int, float], ...]]:
    """The likeliest tokens of the rows that ask for some, best first."""
    found: list[tuple[tuple[int, float], ...]] = [()] * len(samplings)
    asking = [i for i, s in enumerate(samplings) if s.top_logprobs]
    if asking:
        # As many for every row, since how ties are ordered may depend on the number.
        best, ids = logits[asking].topk(min(MAX_TOP_LOGPROBS, logits.shape[1]))
        best -= normaliser[asking][:, None]
        for i, row_ids, row in zip(asking, ids.tolist(), best.tolist(), strict=True):
            found[i] = tuple(zip(row_ids, row, strict=True))[: samplings[i].top_logprobs]
    return found


def _draw(logits: Tensor, samplings: Sequence[Sampling], uniforms: Sequence[float]) -> Tensor:
    """One token `[N]` per row of `logits`, by temperature, then min_p, then top_k,
    then top_p."""
    device, count = logits.device, logits.shape[1]
    temperatures = torch.tensor([s.temperature for s in samplings], device=device)
    # Relative to the best token, so that a tiny temperature cannot overflow.
    scaled = (logits - logits.amax(-1, keepdim=True)) / temperatures[:, None]
    probabilities = scaled.softmax(-1).nan_to_num_()
    _cut_min_p(probabilities, samplings)
    u = torch.tensor(uniforms, device=device, dtype=torch.float64)
    tokens = torch.empty(len(samplings), dtype=torch.long, device=device)

    cut = [i for i, s in enumerate(samplings) if s.top_k or s.top_p < 1]
    if len(cut) < len(samplings):
        whole = [i for i in range(len(samplings)) if i not in set(cut)]
        tokens[whole] = _look_up(probabilities[whole], u[whole])
    if cut:
        head, ids = probabilities[cut].topk(min(_HEAD, count))
        _draw_sorted(head, ids, cut, samplings, u, tokens)
        masses = dict(zip(cut, head.sum(-1).tolist(), strict=True))
        far = [i for i in cut if not _covers(samplings[i], head.shape[1], masses[i])]
        if far and head.shape[1] < count:
            _draw_sorted(*probabilities[far].sort(descending=True), far, samplings, u, tokens)
    return tokens


def _cut_min_p(probabilities: Tensor, samplings: Sequence[Sampling]) -> None:
    """Put 0 where rows `[N, V]` fall below their min_p, and make the rest sum to 1, in place."""
    asking = [i for i, s in enumerate(samplings) if s.min_p]
    if asking:
        rows = probabilities[asking]
        shares = rows.new_tensor([samplings[i].min_p for i in asking])[:, None]
        rows.masked_fill_(rows < shares * rows.amax(-1, keepdim=True), 0.0)
        probabilities[asking] = rows / rows.sum(-1, keepdim=True)


def _covers(sampling: Sampling, width: int, mass: float) -> bool:
    """Whether the `width` best tokens, of this mass, hold all that the cuts leave."""
    return sampling.top_k <= width if sampling.top_k else mass >= sampling.top_p


def _draw_sorted(
    probabilities: Tensor,
    columns: Tensor,
    rows: list[int],
    samplings: Sequence[Sampling],
    uniforms: Tensor,
    tokens: Tensor,
) -> None:
    """Cut these rows, given in descending order, and write their draws into `tokens`."""
    kept = _keep(probabilities, [samplings[i] for i in rows])
    found = _look_up(kept, uniforms[rows])
    tokens[rows] = columns.gather(1, found[:, None])[:, 0]


def _keep(probabilities: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """Rows `[N, W]` sorted in descending order, with 0 beyond their top_k and then their top_p."""
    device, width = probabilities.device, probabilities.shape[1]
    top_k = torch.tensor([s.top_k or width for s in samplings], device=device)[:, None]
    top_p = torch.tensor([s.top_p for s in samplings], device=device)[:, None]
    cut_k = torch.tensor([s.top_k > 0 for s in samplings], device=device)[:, None]
    kept = probabilities.masked_fill(torch.arange(width, device=device) >= top_k, 0.0)
    # A head of the row is not all of it: only top_k makes what is left sum to 1 anew.
    mass = torch.where(cut_k, kept.sum(-1, keepdim=True), 1.0)
    before = kept.cumsum(-1) - kept
    beyond = (before >= top_p * mass) & (top_p < 1)
    beyond[:, 0] = False  # a top_p that rounds to nothing still leaves the best token
    return kept.masked_fill_(beyond, 0.0)


def _look_up(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Inverse of the cumulative distribution: `[N]` columns for uniform numbers `[N]`."""
    cumulative = probabilities.double().cumsum(-1)
    # Strictly below the total, and past columns of probability 0.
    target = uniforms * cumulative[:, -1]
    columns = torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]
    return columns.clamp_(max=probabilities.shape[1] - 1)
