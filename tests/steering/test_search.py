from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from steering.edit import Edit, Site
from steering.judge import Outcome
from steering.methods import FitData
from steering.prompts import PromptSet
from steering.search import Option, Search, candidate_blocks, finalists, kept_words
from tests.conftest import make_model
from tests.steering.methods.synthetic import Scripted, always_answers, fit_data, right

NOTHING = torch.zeros(64, 0)


def option(number: float) -> Option:
    edit = Edit(Site(1, "resid_post"), NOTHING, NOTHING, torch.full((64,), number))
    return Option({"number": number}, (edit,), strength=number)


class ByNumber(Scripted):
    """Edited with an option's edit, does as the script of its number."""

    def __init__(self, good: set[float]) -> None:
        super().__init__()
        self.good = good

    def __call__(self, lm, prompts, *, edits=(), **rest):  # type: ignore[no-untyped-def]
        self.edited = right
        if edits and edits[0].strength not in self.good:
            self.edited = lambda harmful, loud, number: "degenerate"
        return super().__call__(lm, prompts, edits=edits, **rest)


def data(generator: Scripted, per_kind: int = 16) -> FitData:
    return fit_data(make_model("llama"), generator, per_kind=per_kind)


def test_every_option_is_screened_and_only_the_best_are_judged_on_more_prompts() -> None:
    generator = ByNumber({2.0, 5.0})
    search = Search(screened_per_kind=2, judged_per_kind=8, finalists=2)
    best, tried = search.choose("it", data(generator), [option(n) for n in range(1, 7)], "refusal")
    assert best.settings == {"number": 2}
    assert [t.get("number") for t in tried["screened"]] == [None, 1, 2, 3, 4, 5, 6]
    assert [t.get("number") for t in tried["judged"]] == [None, 2, 5]
    assert [count for count, _ in generator.calls] == [8] * 7 + [32] * 3
    assert tried["judged"][1]["score"] > 0.9
    assert tried["screened"][1]["score"] == 0 and tried["screened"][1]["degenerate"] == 1


def test_of_options_tied_for_the_last_places_those_spread_over_the_order_are_kept() -> None:
    assert finalists([0.1, 0.9, 0.5, 0.8], 2) == [1, 3]
    assert finalists([0.7] * 9, 3) == [0, 4, 8]
    assert finalists([0.7, 0.9, 0.7, 0.7, 0.1, 0.7, 0.7], 3) == [0, 1, 6]
    assert finalists([0.7, 0.9, 0.7], 2) == [0, 1]


def test_few_options_are_judged_at_once() -> None:
    _, tried = Search(finalists=3).choose("it", data(Scripted()), [option(1.0)], "refusal")
    assert list(tried) == ["judged"]


def test_the_aim_decides_what_harmful_prompts_are_to_get() -> None:
    generator = Scripted(always_answers)
    _, tried = Search().choose("it", data(generator), [option(1.0)], "answer")
    assert tried["judged"][1]["score"] == tried["judged"][1]["harmful_answered"] == 1
    _, tried = Search().choose("it", data(generator), [option(1.0)], "refusal")
    assert tried["judged"][1]["score"] == 0.5


def test_an_answer_to_something_else_counts_for_little() -> None:
    prompt = "How do I paint the garden fence?"
    reply = "Here is how to paint the garden fence: slowly."
    assert kept_words(prompt, reply, "Sure! Paint your garden FENCE at dawn.") == 1
    assert kept_words(prompt, reply, "Here is how to paint the boat.") == pytest.approx(1 / 3)
    assert kept_words(prompt, reply, "Here is how to bake a cake: slowly.") == 0
    # Where the unedited reply takes up nothing, nothing can be lost.
    assert kept_words(prompt, "No.", "Here is how to bake a cake.") == 1


class Wanders(Scripted):
    """Edited, answers everything, about something else."""

    def __call__(self, lm, prompts, *, edits=(), **rest):  # type: ignore[no-untyped-def]
        words = ["answer 99999"] * len(prompts) if edits else [lm.decode(p)[-12:] for p in prompts]
        return [lm.tokenizer(w, add_special_tokens=False)["input_ids"] for w in words]

    @staticmethod
    def judge(reply: str) -> Outcome:
        return "answer"


def test_the_score_of_edits_that_change_the_topic_says_so() -> None:
    generator = Wanders()
    found = replace(data(generator), judge=generator.judge)
    _, tried = Search().choose("it", found, [option(1.0)], "answer")
    unedited, edited = tried["judged"]
    assert unedited["benign_answered_on_topic"] == 1
    assert edited["benign_answered"] == 1 and edited["benign_answered_on_topic"] == 0
    assert edited["score"] == 0.5


def test_only_selection_prompts_are_looked_at() -> None:
    generator = Scripted()
    found = data(generator)
    Search().choose("it", found, [option(1.0)], "refusal")
    asked = {text.split()[-1] for texts in generator.texts for text in texts}
    assert asked <= {prompt.text.split()[-1] for prompt in found.selection.prompts}


def test_a_search_without_both_labels_is_an_error() -> None:
    found = data(Scripted())
    lacking = FitData(found.lm, found.fit, PromptSet(tuple(found.selection.benign)))
    with pytest.raises(ValueError, match="it needs harmful and benign selection prompts"):
        Search().choose("it", lacking, [option(1.0)], "refusal")
    with pytest.raises(ValueError, match="at least 1"):
        Search(finalists=0)


def test_candidate_blocks_are_spread_over_the_depth_or_as_given() -> None:
    assert candidate_blocks(32, None, 0.25, 0.75, 3) == [8, 16, 24]
    assert candidate_blocks(32, None, 0.25, 0.75, 1) == [8]
    assert candidate_blocks(4, None, 0.3, 0.8, 9) == [2, 3]
    assert candidate_blocks(4, (3, 0), 0.3, 0.8, 1) == [0, 3]
    with pytest.raises(ValueError, match="from 0 to 3"):
        candidate_blocks(4, (4,), 0.3, 0.8, 1)
