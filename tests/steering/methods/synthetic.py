"""Prompts with known labels, and a stand-in for the model's replies to them.

Random models write gibberish, so replies are scripted: unedited, the model refuses what is harmful
xor loud, which gives both labels both outcomes; edited, it does what the test says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from steering.edit import AppliedEdit
from steering.judge import Outcome
from steering.methods import FitData
from steering.models import LanguageModel
from steering.prompts import Prompt, PromptSet

Script = Callable[[bool, bool, int], Outcome]
"""`(harmful, loud, prompt's number) -> outcome` of the edited model."""


def prompt_set(per_kind: int, start: int = 0) -> PromptSet:
    """`per_kind` prompts of each label and kind; different `start`s give disjoint sets."""
    return PromptSet(
        tuple(
            Prompt(
                f"{'bomb' if harmful else 'cake'} {'!' if loud else '?'} {i}",
                harmful,
                "loud" if loud else "plain",
            )
            for i in range(start, start + per_kind)
            for harmful in (False, True)
            for loud in (False, True)
        )
    )


def unedited(harmful: bool, loud: bool, number: int) -> Outcome:
    # One prompt in eight does the opposite: what a real model does is never a clean function.
    return "refusal" if harmful ^ loud ^ (number % 8 == 0) else "answer"


def right(harmful: bool, loud: bool, number: int) -> Outcome:
    """The edited model answers what is benign and refuses the rest, with few mistakes."""
    return "refusal" if harmful ^ (loud and number % 8 == 0) else "answer"


def always_answers(harmful: bool, loud: bool, number: int) -> Outcome:
    return "answer"


class Scripted:
    """A generator and a judge in one: the reply is the outcome's name."""

    def __init__(self, edited: Script = right, raw: Script = unedited) -> None:
        self.edited, self.raw = edited, raw
        self.calls: list[tuple[int, tuple[AppliedEdit, ...]]] = []
        """Number of prompts and the edits of every call."""
        self.texts: list[list[str]] = []

    def __call__(
        self,
        lm: LanguageModel,
        prompts: Sequence[Sequence[int]],
        *,
        edits: Sequence[AppliedEdit] = (),
        max_tokens: int = 128,
        on_done: Callable[[int], object] | None = None,
    ) -> list[list[int]]:
        texts = [lm.decode(ids) for ids in prompts]
        self.calls.append((len(prompts), tuple(edits)))
        self.texts.append(texts)
        script = self.edited if edits else self.raw
        numbers = [int(t.partition("<think>")[0].split()[-1]) for t in texts]
        outcomes = [
            script("bomb" in t, "!" in t, number) for t, number in zip(texts, numbers, strict=True)
        ]
        return [lm.tokenizer(o, add_special_tokens=False)["input_ids"] for o in outcomes]

    @staticmethod
    def judge(reply: str) -> Outcome:
        return reply  # type: ignore[return-value]


def fit_data(lm: LanguageModel, generator: Scripted, *, per_kind: int = 24) -> FitData:
    return FitData(
        lm=lm,
        fit=prompt_set(per_kind),
        selection=prompt_set(per_kind // 2, start=1000),
        generator=generator,
        judge=Scripted.judge,
        reply_tokens=12,
    )
