"""The methods that fit edits, one file each, discovered by looking into this folder.

A method is a frozen dataclass whose fields are its hyper-parameters and nothing else, with a `fit`
that turns data into edits. Its module names it in `METHOD`. Adding one is adding a file.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor
from tqdm import tqdm

from steering.activations import ActivationBatch, Reader, gather, read_activations
from steering.clock import Clock
from steering.edit import AppliedEdit, Edit, Site
from steering.generate import Generator, generate
from steering.judge import AnyJudge, Outcome, ask, judge
from steering.models import LanguageModel
from steering.plan import Pool, last_token
from steering.prompts import Prompt, PromptSet


class Memory(Protocol):
    """Something that remembers figures computed from a model's logits, or computes them."""

    def __call__(
        self,
        lm: LanguageModel,
        what: Sequence[Any],
        prompts: Sequence[Sequence[int]],
        edits: Sequence[AppliedEdit],
        compute: Callable[[], list[float]],
    ) -> list[float]:
        """Figures of a kind and settings (`what`, JSON values), of prompts (token ids) under
        edits."""
        ...


def forget(
    lm: LanguageModel,
    what: Sequence[Any],
    prompts: Sequence[Sequence[int]],
    edits: Sequence[AppliedEdit],
    compute: Callable[[], list[float]],
) -> list[float]:
    """The `Memory` that computes everything again."""
    return compute()


@dataclass(frozen=True)
class FitData:
    """Everything a method may look at.

    Args:
        fit: prompts to learn from, both labels.
        selection: disjoint prompts for choosing hyper-parameters; never the test set.
        generator: answers prompts (token ids) with an edited model, greedily.
        reader: reads prompts' states.
        memory: of figures. `steering.resume` has a generator, a reader and a memory that keep what
            is done on disk.
        judge: outcome of a reply's text; a `Judge` sees the prompt too.
        reply_tokens: tokens of a reply that are judged.
        report: called with a line of progress for people.
        progress: show a bar while prompts are read or answered.
        clock: counts the seconds spent `collecting` states, `generating` replies and `selecting`.
    """

    lm: LanguageModel
    fit: PromptSet
    selection: PromptSet
    generator: Generator = generate
    reader: Reader = read_activations
    memory: Memory = forget
    judge: AnyJudge = judge
    reply_tokens: int = 128
    seed: int = 0
    report: Callable[[str], None] = lambda line: None
    progress: bool = False
    clock: Clock = field(default_factory=Clock)

    def encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Token ids of each prompt as a chat request makes them.

        Raises ValueError for one that leaves no room for its reply.
        """
        room = self.lm.context_length - self.reply_tokens
        encoded = [self.lm.encode_prompt(prompt.text) for prompt in prompts]
        for prompt, ids in zip(prompts, encoded, strict=True):
            if len(ids) > room:
                raise ValueError(
                    f"the prompt {prompt.text[:40]!r}... has {len(ids)} tokens, and with "
                    f"{self.reply_tokens} of reply the model takes {self.lm.context_length}: leave "
                    "it out, or judge shorter replies"
                )
        return encoded

    def replies(
        self, prompts: Sequence[Prompt], edits: Sequence[AppliedEdit] = ()
    ) -> list[list[int]]:
        """Greedy replies (token ids) of the (edited) model to each prompt."""
        with self.clock.timed("generating"), self._bar("answering", prompts) as bar:
            return self.generator(
                self.lm,
                self.encode(prompts),
                edits=edits,
                max_tokens=self.reply_tokens,
                on_done=bar.update,
            )

    def outcomes(
        self, prompts: Sequence[Prompt], edits: Sequence[AppliedEdit] = ()
    ) -> list[Outcome]:
        """Judged replies of the (edited) model to each prompt."""
        return self.judged(prompts, self.replies(prompts, edits))

    def judged(self, prompts: Sequence[Prompt], replies: Sequence[Sequence[int]]) -> list[Outcome]:
        """Outcomes of replies (token ids) to each prompt."""
        texts = [self.lm.decode(ids) for ids in replies]
        return ask(self.judge, texts, [prompt.text for prompt in prompts])

    def states(
        self,
        prompts: Sequence[Prompt],
        sites: Collection[Site],
        edits: Sequence[AppliedEdit] = (),
        pool: Pool = last_token,
    ) -> Iterator[ActivationBatch]:
        """States at the last prompt token, or pooled otherwise, batch by batch; nothing is kept."""
        with self._bar("reading", prompts) as bar:
            batches = self.reader(
                self.lm, self.encode(prompts), sites, edits=edits, pool=pool, on_done=bar.update
            )
            while True:
                with self.clock.timed("collecting"):  # not what the caller does with a batch
                    batch = next(batches, None)
                if batch is None:
                    return
                yield batch

    def logits(self, prompts: Sequence[Prompt], edits: Sequence[AppliedEdit] = ()) -> Tensor:
        """`[len(prompts), V]` float32 on the CPU: the (edited) model's, of the first position to
        be generated."""
        found = torch.empty(len(prompts), self.lm.config.vocab_size)
        with self._bar("reading", prompts) as bar:
            for batch in read_activations(
                self.lm, self.encode(prompts), (), edits=edits, logits=True, on_done=bar.update
            ):
                assert batch.logits is not None
                found[batch.indices] = batch.logits.cpu()
        return found

    def figures(
        self,
        what: Sequence[Any],
        prompts: Sequence[Prompt],
        edits: Sequence[AppliedEdit],
        compute: Callable[[], list[float]],
    ) -> list[float]:
        """What `compute` makes of the (edited) model's logits, unless `memory` knows it.

        Args:
            what: JSON values that, with prompts and edits, decide the figures.
        """
        return self.memory(self.lm, what, self.encode(prompts), edits, compute)

    def all_states(
        self,
        prompts: Sequence[Prompt],
        sites: Collection[Site],
        edits: Sequence[AppliedEdit] = (),
    ) -> dict[Site, Tensor]:
        """The same at once, `[len(prompts), d]` by site, for methods that need every row."""
        batches = self.states(prompts, sites, edits)
        return gather(batches, sites, len(prompts), self.lm.sites.hidden_size)

    def _bar(self, what: str, prompts: Sequence[Prompt]) -> tqdm[Any]:
        return tqdm(
            total=len(prompts), desc=what, unit="prompt", leave=False, disable=not self.progress
        )


@dataclass(frozen=True)
class Fitted:
    """What a method found.

    Args:
        edits: the profile's edits.
        strength: the strength it recommends.
        diagnostics: JSON values for the profile's provenance: choices made, held-out figures.
        red_team: whether these edits remove refusals, where a hyper-parameter decides it; None for
            what the method says of itself.
    """

    edits: tuple[Edit, ...]
    strength: float = 1.0
    diagnostics: dict[str, Any] = field(default_factory=dict)
    red_team: bool | None = None


@runtime_checkable
class Method(Protocol):
    """What every module of this folder offers as `METHOD`."""

    name: ClassVar[str]
    summary: ClassVar[str]
    """One sentence for cards and help texts."""
    red_team: ClassVar[bool]
    """True if it removes refusals, unless what it has fitted says otherwise."""

    def fit(self, data: FitData) -> Fitted:
        """Fit the edits. Raises ValueError saying what data or setting is missing."""
        ...


def names() -> list[str]:
    """Every method's name, from the file names: nothing heavy is imported."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


@cache
def discover() -> dict[str, type[Method]]:
    """Every method by name."""
    found: dict[str, type[Method]] = {}
    for name in names():
        method = getattr(importlib.import_module(f"{__name__}.{name}"), "METHOD", None)
        if method is None or method.name != name:
            raise ImportError(f"steering/methods/{name}.py does not hold a METHOD of that name")
        found[name] = method
    return found
