"""Interrupted fits go on where they stopped: what was computed lies on disk.

Replies are one `.jsonl` per edited model, a line per prompt, and a classifier's verdicts on replies
and figures made of logits are lines too; states of the unedited model are safetensors, a file per
batch. File names are digests of everything that decides the content (the model, the edits, the
prompts, the libraries), so nothing stale is read, and fits of several methods or settings on the
same prompts share what they have in common: a sweep over AlphaSteer's rho, penalty and strength
reads no state twice. Several fits may share a folder at the same time.

Not covered: states of edited models. They are many, and read again in a fraction of the time that
the replies of the same models take.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from steering.activations import ActivationBatch, name_of, read_activations
from steering.edit import AppliedEdit, Site, edits_digest, effective_edits
from steering.fit import library_versions
from steering.generate import Generator
from steering.judge import Judge, OnJudged, Outcome, PhraseJudge, ask
from steering.methods import FitData
from steering.models import LanguageModel
from steering.plan import Pool, last_token
from steering.storage import read_safetensors, write_safetensors

if TYPE_CHECKING:
    from steering.judge_set import Card

CACHE = ".cache"
"""What people call the folder, where they save the profiles."""

_METADATA_KEY = "pilothouse_states"


def keep_in(folder: Path, data: FitData) -> FitData:
    """The same data for a fit that goes on where it stopped, by what is kept in `folder`.

    `data.report` is called with a line where something was found. The default judge's verdicts are
    not kept: they cost less than reading them.
    """
    judge = data.judge
    if isinstance(judge, Judge) and not isinstance(judge, PhraseJudge):
        judge = KeptVerdicts(folder, judge)
    return replace(
        data,
        generator=KeptReplies(folder, data.generator, report=data.report),
        reader=KeptStates(folder, report=data.report),
        memory=KeptFigures(folder),
        judge=judge,
    )


class KeptReplies:
    """A generator that writes replies down, and asks another for those it does not find.

    Args:
        chunk: prompts answered before their replies are written; what an interruption can cost.
        report: called with a line for people where replies are found.
    """

    def __init__(
        self,
        folder: Path,
        generator: Generator,
        *,
        chunk: int = 256,
        report: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.folder, self.generator = folder, generator
        self.chunk, self.report = chunk, report

    def __call__(
        self,
        lm: LanguageModel,
        prompts: Sequence[Sequence[int]],
        *,
        edits: Sequence[AppliedEdit] = (),
        max_tokens: int = 128,
        on_done: Callable[[int], object] | None = None,
    ) -> list[list[int]]:
        key = _digest(*_circumstances(lm), edits_digest(edits), max_tokens)
        lines = _Lines(self.folder / f"replies-{key[:32]}.jsonl", "prompt", "reply")
        known = lines.read()
        keys = [_digest(list(ids)) for ids in prompts]
        missing = {key: ids for key, ids in zip(keys, prompts, strict=True) if key not in known}
        if found := sum(key in known for key in keys):
            self.report(f"resuming: {found} of {len(prompts)} replies were there")
        if on_done is not None and len(missing) < len(prompts):  # repeated prompts are asked once
            on_done(len(prompts) - len(missing))
        waiting = list(missing.items())
        for at in range(0, len(waiting), self.chunk):
            part = waiting[at : at + self.chunk]
            replies = self.generator(
                lm,
                [ids for _, ids in part],
                edits=edits,
                max_tokens=max_tokens,
                on_done=on_done,
            )
            answered = {key: reply for (key, _), reply in zip(part, replies, strict=True)}
            lines.append(answered)
            known.update(answered)
        return [list(known[key]) for key in keys]


class KeptVerdicts:
    """A judge that writes its verdicts down, for one that costs more than reading them.

    Args:
        chunk: replies judged before their verdicts are written.
    """

    def __init__(self, folder: Path, judge: Judge, *, chunk: int = 256) -> None:
        self.judge, self.chunk = judge, chunk
        file = folder / f"verdicts-{_digest(judge.version, library_versions())[:32]}.jsonl"
        self._lines = _Lines(file, "reply", "outcome")

    @property
    def version(self) -> str:
        return self.judge.version

    def card(self, on_done: OnJudged = None) -> Card:
        return self.judge.card(on_done)

    def __call__(self, reply: str, prompt: str | None = None) -> Outcome:
        return self.many([reply], [prompt])[0]

    def many(
        self,
        replies: Sequence[str],
        prompts: Sequence[str | None],
        on_done: OnJudged = None,
    ) -> list[Outcome]:
        """Outcomes of replies to prompts.

        Args:
            on_done: called with outcomes by index as they are known.
        """
        known = self._lines.read()
        pairs = list(zip(replies, prompts, strict=True))
        keys = [_digest(reply, prompt) for reply, prompt in pairs]

        def tell(keys_done: Collection[str]) -> None:
            found = {i: known[key] for i, key in enumerate(keys) if key in keys_done}
            if found and on_done is not None:
                on_done(found)

        tell(known)
        waiting = [
            (key, pair)
            for key, pair in dict(zip(keys, pairs, strict=True)).items()
            if key not in known
        ]
        for at in range(0, len(waiting), self.chunk):
            part = waiting[at : at + self.chunk]
            found = ask(self.judge, [reply for _, (reply, _) in part], [p for _, (_, p) in part])
            judged = {key: outcome for (key, _), outcome in zip(part, found, strict=True)}
            self._lines.append(judged)
            known.update(judged)
            tell(judged)
        return [known[key] for key in keys]


class KeptFigures:
    """A `steering.methods.Memory` on disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(
        self,
        lm: LanguageModel,
        what: Sequence[Any],
        prompts: Sequence[Sequence[int]],
        edits: Sequence[AppliedEdit],
        compute: Callable[[], list[float]],
    ) -> list[float]:
        lines = _Lines(
            self.folder / f"figures-{_digest(*_circumstances(lm))[:32]}.jsonl", "of", "figures"
        )
        key = _digest(list(what), [list(ids) for ids in prompts], edits_digest(edits))
        known = lines.read()
        if key in known:
            return list(known[key])
        figures = compute()
        lines.append({key: figures})
        return figures


class KeptStates:
    """A reader that writes the unedited model's states down, and reads only what it does not find.

    Batches come in the same order with the same rows, whether found or read, so sums over them are
    the same to the last bit.
    """

    def __init__(
        self,
        folder: Path,
        *,
        batch_tokens: int = 4096,
        report: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.folder, self.batch_tokens, self.report = folder, batch_tokens, report

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
        def read(prompts: Sequence[Sequence[int]]) -> Iterator[ActivationBatch]:
            return read_activations(
                lm,
                prompts,
                sites,
                edits=edits,
                batch_tokens=self.batch_tokens,
                pool=pool,
                on_done=on_done,
            )

        pooled = name_of(pool)
        if effective_edits(edits) or pooled is None:
            yield from read(prompts)
            return
        names = sorted(map(str, sites))
        texts = [list(ids) for ids in prompts]
        key = _digest(*_circumstances(lm), texts, names, self.batch_tokens, pooled)
        folder = self.folder / f"states-{key[:32]}"
        rest, number = set(range(len(prompts))), 0
        while (found := _read_batch(folder / f"{number}.safetensors", sites)) is not None:
            rest -= set(found.indices)
            number += 1
            yield found
            if on_done is not None:
                on_done(len(found.indices))
        if number:
            self.report(
                f"resuming: states of {len(prompts) - len(rest)} of {len(prompts)} were there"
            )
        # What is left, in its old order, makes the batches that it would have made.
        left = sorted(rest)
        for batch in read([prompts[i] for i in left]):
            states = {site: _own(rows) for site, rows in batch.states.items()}
            batch = ActivationBatch([left[i] for i in batch.indices], states, None)
            _write_batch(folder / f"{number}.safetensors", batch)
            number += 1
            yield batch


def _circumstances(lm: LanguageModel) -> list[Any]:
    """What decides a model's numbers besides its input: rounding, too."""
    return [
        lm.fingerprint.digest,
        str(lm.dtype),
        lm.device.type,
        sorted(lm.eos_token_ids),
        library_versions(),
    ]


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class _Lines:
    """A file of JSON objects, a line each, of a key and what is known under it.

    Whole chunks are appended in one write, so that processes can share the file; a line that an
    interruption cut short, or that two of them mixed up, is as if it were not there.
    """

    def __init__(self, file: Path, key: str, value: str) -> None:
        self.file, self.key, self.value = file, key, value

    def read(self) -> dict[str, Any]:
        if not self.file.is_file():
            return {}
        found = {}
        for line in self.file.read_bytes().split(b"\n"):
            try:
                record = json.loads(line)
                found[str(record[self.key])] = record[self.value]
            except (ValueError, KeyError, TypeError):
                continue
        return found

    def append(self, found: Mapping[str, Any]) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        lines = (json.dumps({self.key: key, self.value: value}) for key, value in found.items())
        # The line end before them closes a line that was cut short; an empty line is no record.
        text = "\n" + "".join(f"{line}\n" for line in lines)
        with self.file.open("ab", buffering=0) as stream:
            left = memoryview(text.encode())
            while left:
                left = left[stream.write(left) :]


def _write_batch(path: Path, batch: ActivationBatch) -> None:
    tensors: dict[str, Tensor] = {str(site): rows for site, rows in batch.states.items()}
    write_safetensors(path, _METADATA_KEY, {"indices": batch.indices}, tensors)


def _read_batch(path: Path, sites: Collection[Site]) -> ActivationBatch | None:
    """The batch, or None where there is no such file or it is damaged: it is then read again."""
    try:
        header, tensors = read_safetensors(path, _METADATA_KEY, "kept state", ValueError)
        states = {site: _own(tensors[str(site)]) for site in sites}
        return ActivationBatch(header["indices"], states, None)
    except (ValueError, KeyError):
        return None


def _own(rows: Tensor) -> Tensor:
    """A copy in memory of its own: how rows are aligned decides how sums over them are rounded."""
    return rows.cpu().contiguous().clone()
