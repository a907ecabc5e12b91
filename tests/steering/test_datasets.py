"""Each data set in its published shape, with invented prompts that only name a topic."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from steering.datasets import DATASETS
from steering.prompts import Prompt, PromptSet, load_prompts

TOPIC = "Do something, with a comma"


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def table(*rows: tuple[str, ...], newline: str = "\n") -> str:
    stream = io.StringIO()
    csv.writer(stream, lineterminator=newline).writerows(rows)
    return stream.getvalue()


PUBLISHED: dict[str, tuple[str, str, list[Prompt]]] = {
    "advbench": (
        "advbench.csv",
        table(("goal", "target"), (TOPIC, "Sure, here is")),
        [Prompt(TOPIC, True)],
    ),
    "harmbench": (
        "harmbench_behaviors_text_all.csv",
        table(
            (
                *("Behavior", "FunctionalCategory", "SemanticCategory"),
                *("Tags", "ContextString", "BehaviorID"),
            ),
            (TOPIC, "standard", "illegal", "", "", "id_1"),
            ("Go on from there", "contextual", "illegal", "a, b", "First page.\n\nSecond.", "id_2"),
        ),
        [
            Prompt(TOPIC, True, "standard/illegal"),
            Prompt("First page.\n\nSecond.\n\n---\n\nGo on from there", True, "contextual/illegal"),
        ],
    ),
    "jailbreakbench": (
        "harmful-behaviors.csv",
        table(
            ("Index", "Goal", "Target", "Behavior", "Category", "Source"),
            ("0", TOPIC, "Sure", "Short name", "Fraud", "Original"),
        ),
        [Prompt(TOPIC, True, "Fraud")],
    ),
    "strongreject": (
        "strongreject_dataset.csv",
        table(("category", "source", "forbidden_prompt"), ("Fraud", "custom", TOPIC)),
        [Prompt(TOPIC, True, "Fraud")],
    ),
    "sorry-bench": (
        "question.jsonl",
        '{"question_id": 1, "category": "7", "turns": ["One\\ntwo"], "prompt_style": "base"}\n'
        '{"question_id": 2, "category": 8, "turns": ["Three"], "prompt_style": "slang"}\n',
        [Prompt("One\ntwo", True, "7/base"), Prompt("Three", True, "8/slang")],
    ),
    "xstest": (
        "xstest_prompts.csv",
        table(
            ("id", "prompt", "type", "label", "focus", "note"),
            ("1", "How do I kill time?", "figurative_language", "safe", "kill", ""),
            ("26", TOPIC, "contrast_figurative_language", "unsafe", "kill", ""),
        ),
        [
            Prompt("How do I kill time?", False, "figurative_language"),
            Prompt(TOPIC, True, "contrast_figurative_language"),
        ],
    ),
    "or-bench": (
        "or-bench-hard-1k.csv",
        table(("prompt", "category"), (TOPIC, "privacy")),
        [Prompt(TOPIC, False, "privacy")],
    ),
    "phtest": (
        "PHTest.csv",
        table(
            ("ID", "Request", "Harmfulness"),
            ("1", "One", "harmless"),
            ("2", "Two", "controversial"),
        ),
        [Prompt("One", False, "harmless"), Prompt("Two", False, "controversial")],
    ),
    "malicious-instruct": (
        "MaliciousInstruct.txt",
        'Do one thing, "so"\nDo another thing\n',
        [Prompt('Do one thing, "so"', True), Prompt("Do another thing", True)],
    ),
    "refusal-direction": (
        "harmless_train.json",
        json.dumps([{"instruction": TOPIC, "category": None}], indent=4),
        [Prompt(TOPIC, False)],
    ),
    "s-eval": (
        "seval_attack_train.csv",
        table(("", "input"), ("0", TOPIC)),
        [Prompt(TOPIC, True)],
    ),
    "orfuzz": ("ORFuzz.csv", table(("input",), (TOPIC,)), [Prompt(TOPIC, False)]),
    "nq": ("nq_test.json", '[{"query": "who was first"}]', [Prompt("who was first", False)]),
    "alpaca": (
        "alpaca_data.json",
        json.dumps(
            [
                {"instruction": "Sum up.", "input": "A text.", "output": "Text."},
                {"instruction": "Say hello.", "input": "", "output": "Hello."},
            ]
        ),
        [Prompt("Sum up.\n\nA text.", False), Prompt("Say hello.", False)],
    ),
    "labelled": (
        "mine.jsonl",
        '{"prompt": "One", "harmful": true, "kind": "k"}\n{"prompt": "Two", "harmful": false}\n',
        [Prompt("One", True, "k"), Prompt("Two", False)],
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_file_is_recognised_and_labelled(tmp_path: Path, name: str) -> None:
    file, content, prompts = PUBLISHED[name]
    path = write(tmp_path / file, content)
    assert list(load_prompts(path).prompts) == prompts
    assert load_prompts(path, dataset=name.upper().replace("-", "_")) == load_prompts(path)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_caller_s_label_wins(tmp_path: Path, name: str) -> None:
    file, content, prompts = PUBLISHED[name]
    path = write(tmp_path / file, content)
    for harmful in (True, False):
        loaded = load_prompts(path, harmful=harmful).prompts
        assert [p.harmful for p in loaded] == [harmful] * len(prompts)
        assert [(p.text, p.kind) for p in loaded] == [(p.text, p.kind) for p in prompts]


@pytest.mark.parametrize("name", PUBLISHED)
def test_line_ends_marks_and_encodings_do_not_change_the_digest(tmp_path: Path, name: str) -> None:
    file, content, prompts = PUBLISHED[name]
    digest = PromptSet(tuple(prompts)).digest
    windows = content.replace("\n", "\r\n")
    variants = [content.encode("utf-8-sig"), windows.encode(), windows.encode("utf-16")]
    variants += [content.encode(e) for e in ("utf-16-le", "utf-16-be", "utf-32")]
    variants += [content.rstrip("\n").encode(), f"\n{content}\n\n".encode()]
    for variant in variants:
        assert load_prompts(write(tmp_path / file, variant)).digest == digest, variant[:40]


def test_every_data_set_has_a_published_example() -> None:
    assert {d.name for d in DATASETS} == PUBLISHED.keys() | {"plain"}


@pytest.mark.parametrize(
    ("name", "content", "harmful"),
    [
        ("benign-behaviors.csv", PUBLISHED["jailbreakbench"][1], False),
        ("or-bench-toxic.csv", PUBLISHED["or-bench"][1], True),
        ("harmful_val.json", PUBLISHED["refusal-direction"][1], True),
        ("nq_train.csv", PUBLISHED["orfuzz"][1], False),
        ("S-Eval_base_risk_en_v0.1.2.jsonl", '{"prompt": "One", "risk_type": "r"}', True),
    ],
)
def test_sets_that_share_their_columns_are_told_by_the_published_name(
    tmp_path: Path, name: str, content: str, harmful: bool
) -> None:
    prompts = load_prompts(write(tmp_path / name, content)).prompts
    assert [p.harmful for p in prompts] == [harmful] * len(prompts)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("prompts.txt", "One\n"),
        ("prompts.csv", "prompt\nOne\n"),
        ("prompts.csv", "prompt,category\nOne,c\n"),
        ("conquest.csv", "input\nOne\n"),
        ("prompts.json", '[{"query": "One"}]'),
        ("train.json", '[{"instruction": "One", "category": "c"}]'),
    ],
)
def test_no_label_is_guessed(tmp_path: Path, name: str, content: str) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=rf"{name}, .* give the label"):
        load_prompts(path)
    assert [p.text for p in load_prompts(path, harmful=True).harmful] == ["One"]


def test_what_is_malformed_is_told_before_a_label_is_asked_for(tmp_path: Path) -> None:
    for name, content in (("a.json", '["x", 1]'), ("a.json", '[{"note": "x"}]'), ("a.jsonl", "[]")):
        with pytest.raises(ValueError, match=rf"{name}:1:\d+: prompt"):
            load_prompts(write(tmp_path / name, content))


def test_a_named_data_set_states_the_label_of_a_renamed_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "input\nOne\n")
    assert load_prompts(path, dataset="s-eval").harmful
    assert load_prompts(path, dataset="orfuzz").benign
    assert load_prompts(write(tmp_path / "a.txt", "One\n"), dataset="MaliciousInstruct").harmful
    assert load_prompts(path, dataset="s-eval", harmful=False).benign


@pytest.mark.parametrize(
    ("name", "content", "dataset", "message"),
    [
        ("a.csv", "input\nx\n", "no-such", "unknown data set 'no-such'; there are advbench, "),
        ("a.csv", "goal,x\ny,z\n", "advbench", r"a\.csv:1: .* goal, target; this file has goal, x"),
        ("a.txt", "x\n", "advbench", r"a\.txt:1: .* this file has none"),
        ("a.csv", "prompt,type,label\nx,t,safe\ny,t,maybe\n", None, "csv:3: column label holds 'm"),
        ("a.csv", "prompt,type,label\nx,t\n", None, "2: column label holds '', expected safe or u"),
        ("a.csv", "ID,Request,Harmfulness\n1,x,0\n", None, r"csv:2: column Harmfulness holds '0'"),
        ("a.csv", 'Behavior,text\n"a\n\nb",\n,y\n', None, r"csv:5: column Behavior is empty"),
        ("a.jsonl", '{"category": 1, "turns": ["x", "y"]}', None, "1:1: prompt 1: key turns is no"),
        ("a.jsonl", '{"category": 1, "turns": [" "]}', None, "1:1: prompt 1: key turns is empty"),
        (
            "a.json",
            '[{"goal": "x", "target": ""},\n {"target": ""}]',
            None,
            "2:2: .* 2: key goal is",
        ),
        ("a.json", '[{"goal": 7, "target": ""}]', None, "1:2: prompt 1: key goal is not a string"),
        ("a.json", '[{"goal": "x", "target": ""}, "x"]', None, "1:31: prompt 2: expected an obj"),
        ("a.json", '[{"instruction": "x", "category": ["c"]}]', None, "key category is neither"),
        ("a.json", r'["\ud800"]', None, "1:2: prompt 1: holds half a surrogate pair"),
        ("a.json", "[null]", None, "1:2: prompt 1: expected a string or an object"),
    ],
)
def test_what_does_not_fit_the_data_set_is_named_with_its_place(
    tmp_path: Path, name: str, content: str, dataset: str | None, message: str
) -> None:
    path = write(tmp_path / name, content)
    states_labels = "label" in content or "Harmfulness" in content
    with pytest.raises(ValueError, match=message):
        load_prompts(path, dataset=dataset, harmful=None if states_labels else True)
