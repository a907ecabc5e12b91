"""Does this model really do what a profile says? Asked once per profile, before it is served.

A short prompt and one generated token go through the model with the profile's edits, every gate
forced to 1. At each edited site the change must equal the edit computed from its definition, to
the dtype's rounding; a row without edits in the same batch must not change there at all; and at
strength 0 the logits must be those of the model without hooks, bit for bit.

Not covered: whether the profile is any good, and gate values (random prompts say nothing about
them), beyond that the outputs are finite with real gates too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import DynamicCache

from steering.edit import AppliedEdit, Site
from steering.models import LanguageModel
from steering.plan import BatchPlan, RowEdits, Steering, Step, sites_of
from steering.profile import Profile, ProfileError

_PROMPT = "Hello, who are you?"


T = TypeVar("T")
Run = Callable[[Callable[[], Any]], Any]
"""Calls a function and returns its result."""


def _here(function: Callable[[], T]) -> T:
    return function()


@torch.inference_mode()
def self_test(lm: LanguageModel, profile: Profile, run: Run = _here) -> None:
    """Raise ProfileError, saying where and by how much, if the model does not apply the profile.

    One without edits passes: there is nothing to apply.

    Args:
        run: calls whatever touches the model or its hooks, one piece after the other: six forward
            passes over at most two rows of one short prompt. A server lets the thread that owns
            the model do them between its steps; everything else happens here.
    """
    edits = profile.applied()
    if not edits:
        return
    ids = prompt_ids(lm)
    tokens = torch.tensor([ids], device=lm.device)
    steering = Steering(lm.sites)
    try:
        plain = run(lambda: lm.model(tokens, use_cache=False).logits)
        run(lambda: steering.attach(sites_of(profile.edits)))
        try:
            _check_strength_zero(lm, steering, profile, tokens, plain, run)
            _check_edits(lm, steering, edits, ids, run)
            _run(lm, steering, [edits], ids, run, force_gates=None)
        finally:
            run(steering.detach)
    except (ValueError, RuntimeError) as error:
        raise ProfileError(f"profile {profile.name} fails its self-test: {error}") from error


def prompt_ids(lm: LanguageModel) -> list[int]:
    """The test's prompt, as tokens."""
    if lm.tokenizer.chat_template:
        return lm.encode_prompt(_PROMPT)
    return list(lm.tokenizer(_PROMPT)["input_ids"])


def _check_strength_zero(
    lm: LanguageModel,
    steering: Steering,
    profile: Profile,
    tokens: Tensor,
    plain: Tensor,
    run: Run,
) -> None:
    length = tokens.shape[1]
    plan = BatchPlan(
        [RowEdits(profile.applied(0.0), length)],
        hidden_size=lm.sites.hidden_size,
        device=lm.device,
    )

    def forward() -> Tensor:
        with steering.step(plan, [0], [length]):
            return lm.model(tokens, use_cache=False).logits  # type: ignore[no-any-return]

    if not torch.equal(plain, run(forward)):
        raise ValueError("at strength 0 the logits are not those of the model without hooks")


def _check_edits(
    lm: LanguageModel, steering: Steering, edits: Sequence[AppliedEdit], ids: list[int], run: Run
) -> None:
    # The second row has no edits: nothing may reach it.
    for start, recorded in _run(lm, steering, [edits, ()], ids, run, force_gates=1.0):
        when = "while generating" if start else "on the prompt"
        for site in _active_sites(edits, generating=start > 0):
            if site not in recorded:
                raise ValueError(f"no edit ran at {site} {when}")
            before, after = recorded[site]
            if not torch.equal(before[1], after[1]):
                raise ValueError(f"the edit at {site} reached a row without edits {when}")
            positions = torch.arange(start, start + len(before[0]))
            check_change(
                site, when, edits, before[0], before[0], after[0], positions, len(ids),
                before.dtype,
            )  # fmt: skip


def _active_sites(edits: Sequence[AppliedEdit], *, generating: bool) -> list[Site]:
    idle = "prompt" if generating else "generation"
    return sorted({a.edit.site for a in edits if a.edit.phase != idle}, key=lambda s: s.order)


def check_change(
    site: Site,
    when: str,
    edits: Sequence[AppliedEdit],
    x: Tensor,
    before: Tensor,
    after: Tensor,
    positions: Tensor,
    prompt_length: int,
    dtype: torch.dtype,
) -> None:
    """Raise ValueError unless `before` became `after` as the edits' definition has it.

    The bound is per entry: rounding of the stored values, and of the plan's float32 arithmetic in
    proportion to the sum of absolute terms, which is what cancellation leaves behind.

    Args:
        x: the states `[T, d]` that the edits read.
        before, after: what they are added to, and the sum; the states themselves, or a part.
        positions: `[T]`, of the states in their sequence.
        dtype: in which the sum was stored.
    """
    x, before, after = (tensor.double().cpu() for tensor in (x, before, after))
    change, terms = torch.zeros_like(x), torch.zeros_like(x)
    for applied in edits:
        edit = applied.edit
        if edit.site != site:
            continue
        mask = {
            "prompt": positions < prompt_length,
            "generation": positions >= prompt_length,
            "all": positions >= 0,
        }[edit.phase]
        if edit.skip_first_token:
            mask = mask & (positions > 0)
        met = mask.double()[:, None]
        change += met * applied.strength * edit.change(x)
        linear = x.abs() @ edit.read.double().abs() @ edit.write.double().abs().mT
        terms += met * abs(applied.strength) * (linear + edit.shift.double().abs())
    expected = before + change
    rounding = 4 * torch.finfo(dtype).eps * (expected.abs() + before.abs())
    error = (after - expected).abs()
    excess = error - rounding - 64 * torch.finfo(torch.float32).eps * terms - 1e-12
    if not bool((excess <= 0).all()):  # so written that NaN fails too
        raise ValueError(
            f"the change at {site} {when} is not the edit's: off by {float(error.max()):.3g} where "
            f"the edit's largest entry is {float(change.abs().max()):.3g}"
        )


def _run(
    lm: LanguageModel,
    steering: Steering,
    rows: Sequence[Sequence[AppliedEdit]],
    ids: list[int],
    run: Run,
    *,
    force_gates: float | None,
) -> list[tuple[int, dict[Site, tuple[Tensor, Tensor]]]]:
    """A prompt step and a generated one: start and recorded states of each."""
    plan = BatchPlan(
        [RowEdits(row, len(ids)) for row in rows],
        hidden_size=lm.sites.hidden_size,
        device=lm.device,
    )
    cache = DynamicCache(config=lm.model.config)
    tokens = torch.tensor([ids] * len(rows), device=lm.device)

    def forward(tokens: Tensor, start: int) -> tuple[Tensor, Step]:
        starts, counts = [start] * len(rows), [tokens.shape[1]] * len(rows)
        with steering.step(plan, starts, counts, record=True, force_gates=force_gates) as step:
            logits = lm.model(tokens, past_key_values=cache, logits_to_keep=1).logits[:, -1]
        return logits, step

    start, steps = 0, []
    for _ in range(2):
        logits, step = run(partial(forward, tokens, start))
        if not torch.isfinite(logits).all():
            raise ValueError("the edited model's logits are not finite; use a lower strength")
        steps.append((start, step.recorded))
        start += tokens.shape[1]
        tokens = logits.argmax(-1, keepdim=True)
    return steps
