"""What a model does in a fit, without its cost: numbered prompts, scripted replies, made-up states.

Prompts are numbers. Their class can be read from the first two token ids, so that replies can be
scripted: unedited, a model refuses what is harmful xor odd, but for one prompt in eight.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from steering.activations import ActivationBatch, batches_by_length
from steering.edit import AppliedEdit, Site
from steering.methods import FitData, Method
from steering.models import LanguageModel
from steering.plan import Pool, last_token
from steering.prompts import Prompt, PromptSet


def numbered(count: int, start: int = 0) -> PromptSet:
    """Half of them harmful, half of each label odd."""
    return PromptSet(
        tuple(
            Prompt(str(i), bool(i % 2), "odd" if i // 2 % 2 else "plain")
            for i in range(start, start + count)
        )
    )


class Numbers:
    """A tokenizer of such prompts, 12 to 20 tokens each."""

    chat_template = "numbers"
    eos_token_id = None

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> dict[str, Any]:
        number = int(messages[0]["content"])
        g = torch.Generator().manual_seed(number)
        ids = torch.randint(100, 8000, (7 + number % 9,), generator=g).tolist()
        loud, odd = number % 2, number // 2 % 2
        return {"input_ids": [loud, odd, number % 8, *ids, 10 + loud, 20 + odd]}

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return "refusal" if ids[0] else "answer"

    def get_vocab(self) -> dict[str, int]:
        return {}


def numbered_model(lm: LanguageModel) -> LanguageModel:
    return replace(lm, tokenizer=Numbers())


class Replies:
    """A generator. Edited, a model does what the method is for."""

    def __init__(self, *, red_team: bool) -> None:
        self.red_team = red_team

    def __call__(
        self,
        lm: LanguageModel,
        prompts: Sequence[Sequence[int]],
        *,
        edits: Sequence[AppliedEdit] = (),
        max_tokens: int = 128,
        on_done: Callable[[int], object] | None = None,
    ) -> list[list[int]]:
        if edits:
            return [[int(ids[0] and not self.red_team)] for ids in prompts]
        return [[int(bool(ids[0]) ^ bool(ids[1]) ^ (ids[2] == 0))] for ids in prompts]


class States:
    """A reader of random states, apart by class; counts the prompts it was asked for."""

    def __init__(self) -> None:
        self.prompts = 0

    def __call__(
        self,
        lm: LanguageModel,
        prompts: Sequence[Sequence[int]],
        sites: Collection[Site],
        *,
        edits: Sequence[AppliedEdit] = (),
        pool: Pool = last_token,
        on_done: Callable[[int], object] | None = None,
    ) -> Iterator[ActivationBatch]:
        self.prompts += len(prompts)
        size = lm.sites.hidden_size
        g = torch.Generator().manual_seed(0)
        means = torch.randn(2, size, generator=g)
        for indices in batches_by_length([len(ids) for ids in prompts], 4096):
            classes = torch.tensor([prompts[i][:2] for i in indices]).float()
            rows = torch.randn(len(indices), size, generator=g) + classes @ means
            yield ActivationBatch(indices, dict.fromkeys(sites, rows), None)


def scripted_data(lm: LanguageModel, method: type[Method], prompts: int, **kwargs: Any) -> FitData:
    """A fit's data: 70 % of the prompts to fit, 30 % to choose by."""
    cut = round(0.7 * prompts) // 8 * 8
    return FitData(
        lm,
        numbered(cut),
        numbered(prompts - cut, start=cut),
        generator=Replies(red_team=method.red_team),
        judge=lambda reply: reply,  # type: ignore[arg-type,return-value]
        **kwargs,
    )
