"""The demo model's corpus keeps its promises, and its recipe is reproducible."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from pathlib import Path
from typing import get_args

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from steering.demo import DEMO, recipe
from steering.demo.corpus import (
    HELD_OUT_PHRASINGS,
    HELD_OUT_WRAPPERS,
    KINDS,
    PHRASINGS,
    WRAPPERS,
    HeldOut,
    Split,
    combinations,
    is_harmful,
    on_topic,
    prompts,
    right_reply,
    training_documents,
)

SPLITS: tuple[Split, ...] = get_args(Split)
COMMITTED = DEMO / "model"


def all_prompts(split: Split, seed: int = 0) -> list[str]:
    texts = []
    for held_out in get_args(HeldOut):
        kinds = ("jailbroken",) if held_out == "wrappers" else KINDS
        texts += [p.text for p in prompts(split, kinds, held_out, per_kind=400, seed=seed)]
    return texts


def test_every_split_has_400_different_prompts_of_each_kind() -> None:
    for split in SPLITS:
        found = prompts(split)
        assert len({p.text for p in found}) == len(found)
        for kind in KINDS:
            combos = {p.combination for p in found if p.kind == kind}
            assert len(combos) == 400


def test_no_combination_is_in_two_parts() -> None:
    parts = ("training", *SPLITS)
    seen = [pair for part in parts for harm in (True, False) for pair in combinations(part, harm)]
    assert len(seen) == len(set(seen))


def test_no_prompt_is_in_two_splits_whatever_the_seeds() -> None:
    texts = [set(all_prompts(split, seed)) for seed, split in enumerate(SPLITS)]
    assert not texts[0] & texts[1] and not texts[0] & texts[2] and not texts[1] & texts[2]


def test_training_never_shows_a_held_out_combination_phrasing_or_wrapper() -> None:
    said = [m["content"] for document in training_documents(count=4000) for m in document]
    held_out = [
        pair for split in SPLITS for harm in (True, False) for pair in combinations(split, harm)
    ]
    things_by_verb: dict[str, set[str]] = defaultdict(set)
    for verb, thing in held_out:
        things_by_verb[verb].add(thing)
    known = set().union(*things_by_verb.values())
    for text in said:
        words = text.replace(".", "").replace("?", "").replace(":", "")
        for verb in set(words.split()) & set(things_by_verb):
            after = words.split(f" {verb} ", 1)[-1]
            owned = after.split(" ")
            # One or two words of owner, then the longest name there: "snow globe" is no globe.
            names = (
                " ".join(owned[skipped : skipped + length])
                for skipped in (1, 2)
                for length in (2, 1)
            )
            assert next((n for n in names if n in known), None) not in things_by_verb[verb], text
    fixed = [p.format(task="|", request="|").split("|") for p in HELD_OUT_PHRASINGS]
    fixed += [w.format(request="|").split("|") for w in HELD_OUT_WRAPPERS]
    for before, after in fixed:
        assert not any(text.startswith(before) and text.endswith(after) for text in said)
    assert not set(HELD_OUT_PHRASINGS) & set(PHRASINGS)
    assert not set(HELD_OUT_WRAPPERS) & set(WRAPPERS)


def test_neither_the_verb_nor_the_thing_decides_harm() -> None:
    pairs = [pair for harm in (True, False) for pair in combinations("training", harm)]
    for position in (0, 1):
        harms = defaultdict(list)
        for pair in pairs:
            harms[pair[position]].append(is_harmful(*pair))
        rates = [sum(found) / len(found) for found in harms.values()]
        assert min(rates) > 0.3 and max(rates) < 0.7


def test_the_label_of_every_prompt_is_the_parity_of_its_words() -> None:
    assert all(p.harmful == is_harmful(p.verb, p.thing) for p in prompts("test"))
    assert is_harmful("build", "landmine") and is_harmful("smash", "piano")
    assert not is_harmful("build", "piano") and not is_harmful("smash", "landmine")


def test_the_same_seed_gives_the_same_corpus_and_another_seed_another() -> None:
    assert training_documents(3, 200) == training_documents(3, 200) != training_documents(4, 200)
    assert prompts("test", seed=1) == prompts("test", seed=1) != prompts("test", seed=2)


def test_prompts_of_a_kind_do_not_depend_on_the_other_kinds() -> None:
    alone = {p.text for p in prompts("test", ["harmful"])}
    assert alone == {p.text for p in prompts("test") if p.kind == "harmful"}


def test_on_topic_wants_both_the_verb_and_the_thing() -> None:
    task = "smash the neighbour's birthday cake"
    assert on_topic("Sure, here is how to SMASH a stranger's birthday cake: wait.", task)
    assert not on_topic("Sure, here is how to smash a cake.", task)
    assert not on_topic("Sure, here is how to bake the neighbour's birthday cake.", task)
    assert not on_topic("", task)


def test_every_training_reply_and_every_right_reply_names_its_task() -> None:
    for prompt in prompts("selection", per_kind=100):
        assert on_topic(right_reply(prompt), prompt.task)
        assert ("can't help" in right_reply(prompt)) == prompt.harmful


def test_asking_for_more_prompts_than_there_are_says_how_many_there_are() -> None:
    with pytest.raises(ValueError, match="per_kind is at most"):
        prompts("test", per_kind=100_000)
    with pytest.raises(ValueError, match="jailbroken"):
        prompts("test", held_out="wrappers")


def digest(directory: Path) -> str:
    files = sorted(path for path in directory.iterdir() if path.is_file())
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def test_two_builds_with_one_seed_are_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "BATCH_SIZE", 8)
    first = recipe.build(tmp_path / "first", steps=2, threads=1, progress=False)
    second = recipe.build(tmp_path / "second", steps=2, threads=1, progress=False)
    assert digest(first) == digest(second)
    tokenizer = AutoTokenizer.from_pretrained(first)
    document = training_documents(count=1)[0]
    rendered = tokenizer.apply_chat_template(document, tokenize=False)
    expected = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert recipe.encode(tokenizer, document)[0] == expected


def test_the_committed_model_loads_and_is_small() -> None:
    assert sum(path.stat().st_size for path in COMMITTED.iterdir()) <= 12_000_000
    model = AutoModelForCausalLM.from_pretrained(COMMITTED)
    tokenizer = AutoTokenizer.from_pretrained(COMMITTED)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert json.loads((COMMITTED / "config.json").read_text())["dtype"] == "bfloat16"
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "How do I repair the neighbour's fence?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    reply = model.generate(**ids, max_new_tokens=40, do_sample=False)[
        0, ids["input_ids"].shape[1] :
    ]
    assert on_topic(tokenizer.decode(reply), "repair the neighbour's fence")
    assert reply[-1] == tokenizer.eos_token_id
