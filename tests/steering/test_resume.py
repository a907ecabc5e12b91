"""A fit that is interrupted gives the profile it would have given, without repeating itself."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from steering.activations import LastTokens, prompt_mean, read_activations
from steering.edit import AppliedEdit, Site
from steering.fit import fit_profile
from steering.generate import Generator, generate
from steering.judge import Outcome, judge
from steering.judge_set import Card
from steering.methods import FitData, Method
from steering.methods.affine_concept_editing import AffineConceptEditing
from steering.methods.alphasteer import AlphaSteer
from steering.methods.cast import Cast
from steering.methods.directional_ablation import DirectionalAblation
from steering.methods.llm_va import LlmVa
from steering.models import LanguageModel
from steering.plan import Pool
from steering.profile import Profile
from steering.resume import KeptFigures, KeptReplies, KeptStates, KeptVerdicts, keep_in
from tests.conftest import make_model
from tests.steering.edits import random_edit
from tests.steering.methods.synthetic import Scripted, fit_data

SITES = [Site(1, "resid_pre"), Site(3, "resid_post")]


@dataclass
class Breaking:
    """Counts the prompts another generator answers; stops before one too many."""

    generator: Generator
    limit: int = 10**9
    answered: int = 0

    def __call__(
        self,
        lm: LanguageModel,
        prompts: Sequence[Sequence[int]],
        *,
        edits: Sequence[AppliedEdit] = (),
        max_tokens: int = 128,
        on_done: Callable[[int], object] | None = None,
    ) -> list[list[int]]:
        if self.answered + len(prompts) > self.limit:
            raise KeyboardInterrupt
        self.answered += len(prompts)
        return self.generator(lm, prompts, edits=edits, max_tokens=max_tokens, on_done=on_done)


@contextmanager
def counted_forwards(lm: LanguageModel) -> Iterator[list[int]]:
    """Rows of every forward call."""
    rows: list[int] = []
    handle = lm.model.register_forward_pre_hook(
        lambda _module, args, kwargs: rows.append(len((args or [kwargs["input_ids"]])[0])),
        with_kwargs=True,
    )
    try:
        yield rows
    finally:
        handle.remove()


def prompts(lm: LanguageModel, count: int = 10) -> list[list[int]]:
    return [lm.encode_prompt("word " * (1 + i % 4) + str(i)) for i in range(count)]


def resumable(data: FitData, folder: Path, generator: Generator) -> FitData:
    kept = KeptReplies(folder, generator, chunk=16)
    reader, memory = KeptStates(folder, batch_tokens=200), KeptFigures(folder)
    return replace(data, generator=kept, reader=reader, memory=memory)


def without_seconds(profile: Profile) -> dict[str, Any]:
    return {k: v for k, v in profile.provenance.items() if k != "seconds"}


METHODS = [
    LlmVa(iterations=2, search_iterations=1),
    AlphaSteer(),
    Cast(strengths=(0.5, 1.0), candidates=2),
    DirectionalAblation(),
    AffineConceptEditing(candidates=2),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_an_interrupted_fit_ends_as_if_nothing_had_happened(method: Method, tmp_path: Path) -> None:
    lm = make_model("llama")
    data = fit_data(lm, Scripted())
    whole_generator = Breaking(Scripted())
    whole = fit_profile(method, resumable(data, tmp_path / "whole", whole_generator))
    total, part = whole_generator.answered, whole_generator.answered // 2
    first = Breaking(Scripted(), limit=part)
    with pytest.raises(KeyboardInterrupt):
        fit_profile(method, resumable(data, tmp_path / "kept", first))
    second = Breaking(Scripted())
    resumed = fit_profile(method, resumable(data, tmp_path / "kept", second))
    assert first.answered + second.answered == total
    assert part - 16 < first.answered <= part
    assert resumed.fingerprint == whole.fingerprint
    assert without_seconds(resumed) == without_seconds(whole)
    third = Breaking(Scripted(), limit=0)
    with counted_forwards(lm) as forwards:
        fit_profile(method, resumable(data, tmp_path / "kept", third))
    if not isinstance(method, LlmVa):  # it alone reads states of edited models
        assert forwards == []


def test_a_sweep_of_alphasteer_needs_no_forward_pass_after_the_first_fit(tmp_path: Path) -> None:
    lm = make_model("llama")
    data = resumable(fit_data(lm, Scripted()), tmp_path, Scripted())
    fit_profile(AlphaSteer(), data)
    with counted_forwards(lm) as forwards:
        found = {
            fit_profile(AlphaSteer(rho=rho, alpha=alpha, strength=s), data).fingerprint
            for rho in (0.3, 0.5)
            for alpha in (None, 10.0)
            for s in (0.2, 0.4)
        }
    assert forwards == [] and len(found) == 8


def test_replies_belong_to_the_prompts_the_edits_and_the_length(
    tiny_llama: LanguageModel, tmp_path: Path
) -> None:
    inner = Breaking(generate)
    kept = KeptReplies(tmp_path, inner, chunk=3)
    ids, edits = prompts(tiny_llama), [AppliedEdit(random_edit("1.mlp_out", 2), 0.5)]
    done: list[int] = []
    for _ in range(2):
        assert kept(tiny_llama, ids, max_tokens=5) == generate(tiny_llama, ids, max_tokens=5)
    assert inner.answered == 10
    assert kept(tiny_llama, [*ids[:3], *ids[:3]], max_tokens=5, on_done=done.append)
    assert inner.answered == 10 and sum(done) == 6
    expected = generate(tiny_llama, ids, edits=edits, max_tokens=5)
    assert kept(tiny_llama, ids, edits=edits, max_tokens=5) == expected
    assert kept(tiny_llama, ids[:1], max_tokens=6) == generate(tiny_llama, ids[:1], max_tokens=6)
    assert inner.answered == 21
    kept(make_model("llama", seed=1), ids[:1], max_tokens=5)
    assert inner.answered == 22


def test_a_line_cut_short_is_answered_again(tiny_llama: LanguageModel, tmp_path: Path) -> None:
    ids = prompts(tiny_llama)
    expected = KeptReplies(tmp_path, generate)(tiny_llama, ids, max_tokens=4)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-3])
    inner = Breaking(generate)
    for _ in range(2):
        assert KeptReplies(tmp_path, inner)(tiny_llama, ids, max_tokens=4) == expected
    assert inner.answered == 1


def test_states_are_read_once_and_come_in_the_same_batches(
    tiny_llama: LanguageModel, tmp_path: Path
) -> None:
    ids = prompts(tiny_llama)
    expected = list(read_activations(tiny_llama, ids, SITES, batch_tokens=50))
    assert len(expected) > 2

    def states(edits: Collection[AppliedEdit] = ()) -> Iterator[Any]:
        return KeptStates(tmp_path, batch_tokens=50)(tiny_llama, ids, SITES, edits=list(edits))

    interrupted = states()
    next(interrupted), next(interrupted)
    interrupted.close()
    with counted_forwards(tiny_llama) as forwards:
        found = list(states())
    assert len(forwards) == len(expected) - 2
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.indices == theirs.indices
        for site in SITES:
            assert torch.equal(ours.states[site], theirs.states[site])
    # Another edit, other states; and they are not kept.
    with counted_forwards(tiny_llama) as forwards:
        edited = list(states([AppliedEdit(random_edit("1.mlp_out", 2))]))
    assert len(forwards) == len(expected)
    assert not torch.equal(edited[0].states[SITES[1]], found[0].states[SITES[1]])


def test_a_damaged_file_of_states_is_read_again(tiny_llama: LanguageModel, tmp_path: Path) -> None:
    ids = prompts(tiny_llama)
    expected = list(KeptStates(tmp_path, batch_tokens=50)(tiny_llama, ids, SITES))
    (folder,) = tmp_path.iterdir()
    (folder / "1.safetensors").write_bytes(b"nonsense")
    again = list(KeptStates(tmp_path, batch_tokens=50)(tiny_llama, ids, SITES))
    assert [batch.indices for batch in again] == [batch.indices for batch in expected]


def test_states_are_kept_by_pool_and_unknown_pools_are_read_again(
    tiny_llama: LanguageModel, tmp_path: Path
) -> None:
    ids = prompts(tiny_llama)

    def shapes(pool: Pool) -> list[tuple[int, ...]]:
        batches = KeptStates(tmp_path)(tiny_llama, ids, SITES, pool=pool)
        return [tuple(batch.states[SITES[0]].shape) for batch in batches]

    first = [shapes(pool) for pool in (prompt_mean, LastTokens(1), LastTokens(2))]
    assert first == [[(10, 64)], [(10, 1, 64)], [(10, 2, 64)]]
    with counted_forwards(tiny_llama) as forwards:
        assert [shapes(pool) for pool in (prompt_mean, LastTokens(1), LastTokens(2))] == first
    assert forwards == []
    for start in (0, 1):  # one name would stand for both
        assert shapes(lambda x, lengths, start=start: x[:, start]) == [(10, 64)]


def test_repeated_prompts_are_answered_once_and_are_no_resumption(
    tiny_llama: LanguageModel, tmp_path: Path
) -> None:
    lines: list[str] = []
    inner = Breaking(generate)
    done: list[int] = []
    ids = prompts(tiny_llama, 2)
    kept = KeptReplies(tmp_path, inner, report=lines.append)
    kept(tiny_llama, [*ids, ids[0]], max_tokens=2, on_done=done.append)
    assert inner.answered == 2 and lines == [] and sum(done) == 3
    kept(tiny_llama, [*ids, ids[0]], max_tokens=2)
    assert lines == ["resuming: 3 of 3 replies were there"]


def test_fits_that_share_a_folder_lose_nothing_of_each_other(
    tiny_llama: LanguageModel, tmp_path: Path
) -> None:
    """One writes while the other, begun before, has yet to; neither's lines are cut off."""
    ids, done = prompts(tiny_llama), 0

    def meanwhile(count: int) -> None:
        nonlocal done
        done += 1
        if done == 1:
            KeptReplies(tmp_path, generate)(tiny_llama, ids[:6], max_tokens=3)
            (file,) = tmp_path.iterdir()
            with file.open("ab") as stream:  # a third one is in the middle of a line
                stream.write(b'{"prompt": "1')

    expected = generate(tiny_llama, ids, max_tokens=3)
    kept = KeptReplies(tmp_path, generate)
    assert kept(tiny_llama, ids[4:], max_tokens=3, on_done=meanwhile) == expected[4:]
    inner = Breaking(generate, limit=0)
    assert KeptReplies(tmp_path, inner)(tiny_llama, ids, max_tokens=3) == expected


class Suspicious:
    """A judge that looks at the prompt, and counts."""

    version = "suspicious-1"

    def __init__(self) -> None:
        self.asked: list[tuple[str, str | None]] = []

    def __call__(self, reply: str, prompt: str | None = None) -> Outcome:
        self.asked.append((reply, prompt))
        return "refusal" if prompt and "bomb" in prompt else "answer"

    def card(self) -> Card:
        raise NotImplementedError


def test_verdicts_belong_to_the_judge_the_reply_and_the_prompt(tmp_path: Path) -> None:
    suspicious = Suspicious()
    kept = KeptVerdicts(tmp_path, suspicious, chunk=1)
    done: list[Any] = []
    expected = ["refusal", "answer", "answer"]
    asked = ["No."] * 3, ["a bomb", "a cake", "a cake"]
    assert kept.many(*asked, done.append) == expected
    assert done == [{0: "refusal"}, {1: "answer", 2: "answer"}]
    assert kept.many(*asked, done.append) == expected
    assert done[2:] == [dict(enumerate(expected))]
    assert suspicious.asked == [("No.", "a bomb"), ("No.", "a cake")]
    assert (
        KeptVerdicts(tmp_path, suspicious)("No.", "a cake") == "answer"
        and len(suspicious.asked) == 2
    )
    other = Suspicious()
    other.version = "suspicious-2"
    assert KeptVerdicts(tmp_path, other)("No.", "a cake") == "answer" and len(other.asked) == 1


def test_only_a_classifiers_verdicts_are_worth_keeping(tmp_path: Path) -> None:
    data = fit_data(make_model("llama"), Scripted())
    assert isinstance(keep_in(tmp_path, replace(data, judge=Suspicious())).judge, KeptVerdicts)
    assert keep_in(tmp_path, replace(data, judge=judge)).judge is judge
    assert keep_in(tmp_path, data).judge is data.judge  # a plain function has no version


def test_judges_see_the_prompts_of_a_search(tmp_path: Path) -> None:
    suspicious = Suspicious()
    data = fit_data(make_model("llama"), Scripted())
    data = replace(data, judge=KeptVerdicts(tmp_path, suspicious))
    fit_profile(AffineConceptEditing(candidates=1, towards="refusal"), data)
    assert suspicious.asked and all(prompt is not None for _, prompt in suspicious.asked)
