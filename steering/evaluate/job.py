"""What to evaluate, on what and how: everything that decides the results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from steering.evaluate.arms import Decoding, NamedPrompts, distinct_names
from steering.evaluate.utility import MIN_KL_TOKENS, Choices, Passage
from steering.judge import Judge
from steering.judge import judge as phrase_judge
from steering.models import LanguageModel
from steering.profile import Profile


@dataclass(frozen=True)
class Utility:
    """What to measure utility on.

    Args:
        passages: for perplexity; none measures none.
        source: where they came from.
        questions: multiple-choice questions by the file's name.
        kl_tokens: of raw's own replies, teacher-forced; shorter replies down to 8 count too.
        kl_prompts: prompts of each label, at most, for the KL; 0 measures none.
    """

    passages: Sequence[Passage] = ()
    source: str = ""
    questions: Mapping[str, Sequence[Choices]] = field(default_factory=dict)
    kl_tokens: int = 16
    kl_prompts: int = 64

    def __post_init__(self) -> None:
        if self.kl_tokens < MIN_KL_TOKENS:
            raise ValueError(f"the KL is taken over at least {MIN_KL_TOKENS} tokens")


@dataclass(frozen=True)
class Evaluation:
    """Everything that decides the results.

    Args:
        profiles: besides raw, which is always compared.
        strengths: of the sweep; none sweeps nothing.
        progress: show bars.
    """

    lm: LanguageModel
    profiles: Sequence[Profile]
    sets: Sequence[NamedPrompts]
    decoding: Decoding = field(default_factory=Decoding)
    strengths: tuple[float, ...] = ()
    utility: Utility = field(default_factory=Utility)
    judge: Judge = phrase_judge
    progress: bool = False

    def __post_init__(self) -> None:
        distinct_names(self.sets)
        if not self.sets:
            raise ValueError("there are no prompts to evaluate on")
