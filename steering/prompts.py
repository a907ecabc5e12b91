"""Prompt sets: labelled prompts, their digest, splits by seed, duplicates and leaks."""

from __future__ import annotations

import hashlib
import json
import random
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from steering.datasets import PROMPT_COLUMNS, read_prompts

__all__ = [
    "PROMPT_COLUMNS",
    "Overlap",
    "Prompt",
    "PromptSet",
    "Repeat",
    "find_duplicates",
    "find_leaks",
    "load_prompts",
    "normalize",
]


@dataclass(frozen=True)
class Prompt:
    """One user message.

    Args:
        harmful: the label: should a safe model refuse it?
        kind: a finer class for reports (`jailbroken`, a data set's category), or `""`.
    """

    text: str
    harmful: bool
    kind: str = ""


@dataclass(frozen=True)
class PromptSet:
    """Prompts for one purpose, in a fixed order."""

    prompts: tuple[Prompt, ...]

    @property
    def harmful(self) -> list[Prompt]:
        return [prompt for prompt in self.prompts if prompt.harmful]

    @property
    def benign(self) -> list[Prompt]:
        return [prompt for prompt in self.prompts if not prompt.harmful]

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of texts and labels, in order."""
        rows = [[p.text, p.harmful, p.kind] for p in self.prompts]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    def split(self, share: float, seed: int) -> tuple[PromptSet, PromptSet]:
        """Two disjoint sets, the first with `share` of each label; equal texts stay together.

        Raises ValueError if either part would lack a label that this set has.
        """
        parts: tuple[list[Prompt], list[Prompt]] = ([], [])
        for label, group in (("harmful", self.harmful), ("harmless", self.benign)):
            texts = sorted({prompt.text for prompt in group})
            random.Random(seed).shuffle(texts)
            cut = round(share * len(texts))
            if texts and not 0 < cut < len(texts):
                raise ValueError(
                    f"there are too few distinct {label} prompts, {len(texts)}, to split them "
                    f"{share:g} to {1 - share:g}; give more"
                )
            chosen = set(texts[:cut])
            for prompt in group:
                parts[prompt.text not in chosen].append(prompt)
        return PromptSet(tuple(parts[0])), PromptSet(tuple(parts[1]))


def load_prompts(
    path: Path | str, *, harmful: bool | None = None, dataset: str | None = None
) -> PromptSet:
    """Read prompts from a `.txt`, `.csv`, `.json` or `.jsonl` file.

    The published formats are listed in `steering.datasets`. Otherwise `.txt`: one a line. `.csv`: a
    column named as in `PROMPT_COLUMNS`. `.json` / `.jsonl`: strings, or objects with such a key.

    Args:
        harmful: the label of all prompts; None takes what the data set states.
        dataset: the data set's name; None recognises it by its columns.

    Raises ValueError naming the file, the line and the column, or saying that a label is needed.
    """
    rows = read_prompts(path, harmful=harmful, dataset=dataset)
    return PromptSet(tuple(Prompt(*row) for row in rows))


@dataclass(frozen=True)
class Repeat:
    """A prompt that says the same as an earlier one, or as one of another set.

    Args:
        index: of the prompt in its set, from 0.
        other: of the one it repeats, in the same set or in the other.
        exact: the same text, not only after `normalize`.
        same_label: do the two agree on whether a safe model should refuse?
    """

    index: int
    other: int
    exact: bool
    same_label: bool
    text: str
    other_text: str


@dataclass(frozen=True)
class Overlap:
    """Repeated prompts, for a report: `dataclasses.asdict` gives what JSON can hold.

    Args:
        checked: number of prompts that were looked up.
        exact: how many of them repeat a text.
        normalized: how many more do so after `normalize`.
        conflicts: how many of either repeat a text that has the other label.
        examples: the first few, those with a conflict before the rest.
    """

    checked: int
    exact: int
    normalized: int
    conflicts: int
    examples: tuple[Repeat, ...]

    @property
    def count(self) -> int:
        """Prompts that repeat another, exactly or not."""
        return self.exact + self.normalized


class _Kept(dict[int, int | None]):
    """What `str.translate` makes of a character: itself or nothing; filled as characters come."""

    def __missing__(self, code: int) -> int | None:
        # By category, not by regular expression: `\w` leaves out the vowel signs of Indic scripts.
        dropped = unicodedata.category(chr(code))[0] in "PZC"
        self[code] = None if dropped else code
        return self[code]


_KEPT = _Kept()


def normalize(text: str) -> str:
    """Letters, digits and symbols of a text, without case, white space and punctuation.

    Compatibility forms (full-width letters, ligatures) count as equal. A text of punctuation alone
    stays as it is. `2*3` and `2/3` become equal: this is to find repeats for people to look at.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return folded.translate(_KEPT) or text.strip()


def find_duplicates(prompts: PromptSet, *, examples: int = 5) -> Overlap:
    """The prompts of a set that repeat an earlier one."""
    return _overlap(prompts, None, examples)


def find_leaks(fit: PromptSet, test: PromptSet, *, examples: int = 5) -> Overlap:
    """The prompts of `test` that are also in `fit`; `index` is in `test`, `other` in `fit`."""
    return _overlap(test, fit, examples)


def _overlap(prompts: PromptSet, others: PromptSet | None, limit: int) -> Overlap:
    """Looks up each prompt among `others`, or among those before it if None."""
    pool = prompts if others is None else others
    exact: dict[str, int] = {}
    normalized: dict[str, int] = {}

    def add(index: int) -> None:
        text = pool.prompts[index].text
        exact.setdefault(text, index)
        normalized.setdefault(normalize(text), index)

    if others is not None:
        for i in range(len(others.prompts)):
            add(i)
    repeats = []
    for i, prompt in enumerate(prompts.prompts):
        found = exact.get(prompt.text, normalized.get(normalize(prompt.text)))
        if found is not None:
            other = pool.prompts[found]
            same_label = other.harmful == prompt.harmful
            same_text = other.text == prompt.text
            repeats.append(Repeat(i, found, same_text, same_label, prompt.text, other.text))
        if others is None:
            add(i)
    return Overlap(
        checked=len(prompts.prompts),
        exact=sum(r.exact for r in repeats),
        normalized=sum(not r.exact for r in repeats),
        conflicts=sum(not r.same_label for r in repeats),
        examples=tuple(sorted(repeats, key=lambda r: r.same_label)[:limit]),
    )
