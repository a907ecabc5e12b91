"""An edited model applied independently of the plan: one row, whole sequences, plain hooks.

Slow and obvious on purpose. Everything that serves edits is compared with this.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from steering.edit import AppliedEdit, Edit, Site
from steering.models import LanguageModel


def edited_logits(
    lm: LanguageModel, tokens: Sequence[int], prompt_length: int, edits: Sequence[AppliedEdit]
) -> Tensor:
    """Logits `[len(tokens), V]` of one sequence, every position computed afresh."""
    return _run(lm, tokens, _Reference(edits, prompt_length))


def edited_states(
    lm: LanguageModel,
    tokens: Sequence[int],
    prompt_length: int,
    edits: Sequence[AppliedEdit],
    sites: Collection[Site],
) -> tuple[dict[Site, Tensor], Tensor]:
    """States `[len(tokens), D]` of one sequence after the edits at these sites, and at each
    position the norm of the edits' change over the state's, the largest over their sites."""
    reference = _Reference(edits, prompt_length, sites)
    _run(lm, tokens, reference)
    return {site: reference.states[site] for site in sites}, reference.norms[: len(tokens)]


def _run(lm: LanguageModel, tokens: Sequence[int], state: _Reference) -> Tensor:
    handles = []
    for site in sorted(state.sites, key=lambda s: s.order):
        module = lm.sites.module_at(site)
        if site.point == "resid_pre":
            handles.append(
                module.register_forward_pre_hook(
                    lambda _m, args, kwargs, site=site: (
                        ((state.at(site, args[0]), *args[1:]), kwargs)
                        if args
                        else (
                            args,
                            {**kwargs, "hidden_states": state.at(site, kwargs["hidden_states"])},
                        )
                    ),
                    with_kwargs=True,
                )
            )
        else:
            handles.append(
                module.register_forward_hook(
                    lambda _m, _a, out, site=site: (
                        (state.at(site, out[0]), *out[1:])
                        if isinstance(out, tuple)
                        else state.at(site, out)
                    )
                )
            )
    try:
        with torch.inference_mode():
            return lm.model(torch.tensor([list(tokens)]), use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()


def greedy(
    lm: LanguageModel, prompt: Sequence[int], edits: Sequence[AppliedEdit], max_tokens: int
) -> list[int]:
    """Greedy reply, the whole sequence recomputed for every token; the end token is left out."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_tokens:
        token = int(edited_logits(lm, tokens, len(prompt), edits)[-1].argmax())
        if token in lm.eos_token_ids:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


class _Reference:
    def __init__(
        self, edits: Sequence[AppliedEdit], prompt_length: int, sites: Collection[Site] = ()
    ) -> None:
        self.edits = edits
        self.prompt_length = prompt_length
        gates = {a.edit.gate.site for a in edits if a.edit.gate}
        self.sites = {a.edit.site for a in edits} | gates | set(sites)
        self.states: dict[Site, Tensor] = {}
        self.norms = torch.zeros(1)
        self.gates: dict[int, Any] = {}
        self.by_site: dict[Site, list[int]] = defaultdict(list)
        for i, applied in enumerate(edits):
            self.by_site[applied.edit.site].append(i)

    def at(self, site: Site, hidden: Tensor) -> Tensor:
        x = hidden[0]
        for i, applied in enumerate(self.edits):
            gate = applied.edit.gate
            if gate is not None and gate.site == site:
                read = x @ gate.direction
                if gate.reduce == "last_prompt_token":
                    read = read[self.prompt_length - 1]
                elif gate.reduce == "prompt_mean":
                    read = read[: self.prompt_length].mean()
                if gate.comparator == ">":
                    read = (read > gate.threshold).float()
                elif gate.comparator == "<":
                    read = (read <= gate.threshold).float()
                self.gates[i] = read[:, None] if read.ndim else read
        total = torch.zeros_like(x)
        for i in self.by_site[site]:
            edit, s = self.edits[i].edit, self.edits[i].strength
            if s == 0:
                continue
            low_rank = x @ edit.read @ edit.write.T + edit.shift
            total += s * self.gates.get(i, 1.0) * low_rank * self._phase(edit, len(x))
        self.norms = torch.maximum(self.norms, total.norm(dim=-1) / x.norm(dim=-1))
        self.states[site] = x + total
        return (x + total)[None]

    def _phase(self, edit: Edit, length: int) -> Tensor:
        position = torch.arange(length)
        mask = torch.ones(length, dtype=torch.bool)
        if edit.phase == "prompt":
            mask = position < self.prompt_length
        elif edit.phase == "generation":
            mask = position >= self.prompt_length
        if edit.skip_first_token:
            mask = mask & (position > 0)
        return mask.float()[:, None]
