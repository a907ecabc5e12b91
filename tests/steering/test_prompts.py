from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from steering.prompts import (
    Prompt,
    PromptSet,
    Repeat,
    find_duplicates,
    find_leaks,
    load_prompts,
    normalize,
)


def test_every_format_gives_the_same_prompts(tmp_path: Path) -> None:
    files = {
        "a.txt": "first one\n\nsecond, one\n",
        "a.csv": 'goal,target\nfirst one,x\n"second, one",y\n',
        "a.json": '["first one", {"instruction": "second, one", "category": "c"}]',
        "a.jsonl": '{"prompt": "first one"}\n"second, one"\n',
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text, "utf-8")
        prompts = load_prompts(tmp_path / name, harmful=True)
        assert [p.text for p in prompts.prompts] == ["first one", "second, one"], name
        assert prompts.benign == []


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "x,y\n1,2\n", "no column named"),
        ("a.csv", "goal,y\na,2\n,3\n", r"a\.csv:3: column goal is empty"),
        ("a.json", "[1, ", r"a\.json:1:\d+"),
        ("a.json", '{"prompt": "x"}', "expected a list"),
        ("a.jsonl", '"x"\n{bad\n', r"a\.jsonl:2:\d+"),
        ("a.jsonl", '"x"\n{"other": 1}\n', "prompt 2: expected a string"),
        ("a.txt", "\n \n", "holds no prompts"),
        ("a.pt", "x", "expected one of"),
    ],
)
def test_a_malformed_file_is_named_with_the_place(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    (tmp_path / name).write_text(text, "utf-8")
    with pytest.raises(ValueError, match=message):
        load_prompts(tmp_path / name, harmful=True)


def test_a_file_that_is_not_text_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="UTF-8"):
        load_prompts(tmp_path / "a.txt", harmful=False)


def test_splits_are_disjoint_in_text_and_hold_both_labels() -> None:
    prompts = PromptSet(tuple(Prompt(f"prompt {i % 40}", harmful=i % 40 < 20) for i in range(80)))
    first, second = prompts.split(0.7, seed=1)
    assert not {p.text for p in first.prompts} & {p.text for p in second.prompts}
    assert len(first.prompts) == 56 and len(second.prompts) == 24
    assert len(first.harmful) == 28 and first.split(0.5, 0)[0].harmful
    assert prompts.split(0.7, seed=1)[0].digest == first.digest
    assert prompts.split(0.7, seed=2)[0].digest != first.digest


def test_too_few_prompts_cannot_be_split() -> None:
    with pytest.raises(ValueError, match="too few distinct harm"):
        PromptSet((Prompt("one", True), Prompt("two", False))).split(0.5, 0)


def test_the_digest_of_equal_content_is_the_same_in_every_release() -> None:
    prompts = PromptSet((Prompt("one", True), Prompt("zwei ü", False, "kind")))
    assert prompts.digest == "8f6aec8748be9b8f8d9589aab4c09ea5d0da20762726ee452d974703f3cf476b"


def test_duplicates_are_counted_by_text_and_after_normalizing() -> None:
    texts = ["Open the door.", "open  the door", "Shut it", "Open the door.", "other", "OTHER?!"]
    found = find_duplicates(PromptSet(tuple(Prompt(t, False) for t in texts)))
    assert (found.checked, found.exact, found.normalized, found.conflicts) == (6, 1, 2, 0)
    assert found.count == 3
    assert [(r.index, r.other, r.exact) for r in found.examples] == [
        (1, 0, False),
        (3, 0, True),
        (5, 4, False),
    ]


def test_leaks_are_looked_for_in_the_fit_set_only() -> None:
    fit = PromptSet((Prompt("One", True), Prompt("Two", False)))
    test = PromptSet(tuple(Prompt(t, False) for t in ("three", "three", "two!", "One")))
    found = find_leaks(fit, test, examples=1)
    assert (found.checked, found.exact, found.normalized, found.conflicts) == (4, 1, 1, 1)
    assert found.examples == (Repeat(3, 0, True, False, "One", "One"),)
    assert find_leaks(fit, PromptSet(())).count == 0


def test_a_report_can_show_an_overlap_as_json() -> None:
    prompts = PromptSet((Prompt("One", True), Prompt("one", False)))
    shown = json.loads(json.dumps(dataclasses.asdict(find_duplicates(prompts))))
    assert shown["conflicts"] == 1
    assert shown["examples"][0]["other_text"] == "One"


def test_splits_leak_nothing() -> None:
    prompts = PromptSet(tuple(Prompt(f"prompt {i % 40}", harmful=i % 40 < 20) for i in range(80)))
    first, second = prompts.split(0.7, seed=1)
    assert find_duplicates(prompts).exact == 40
    assert find_leaks(first, second).count == 0


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ("What's UP, doc?", "whats up doc", True),
        ("line one\nline two", " line one line two ", True),
        ("Straße", "STRASSE", True),
        ("\uff21\uff22 \ufb01ne", "ab fine", True),
        ("caf\u00e9", "cafe\u0301", True),
        ("“quoted” — text…", '"quoted" - text...', True),
        ("zero\u200bwidth", "zerowidth", True),
        ("cafe", "café", False),
        ("1 + 1", "1 = 1", False),
        ("कि", "का", False),
        ("?!", "...", False),
    ],
)
def test_normalized_text_ignores_case_space_and_punctuation(
    one: str, other: str, equal: bool
) -> None:
    assert (normalize(one) == normalize(other)) is equal
