"""`pilothouse judge`: how well a judge judges, or the judgement of a file of replies."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

SUMMARY = "measure a judge on labelled replies, or judge a file of replies"

REPLY_KEYS = ("reply", "response", "completion", "generation", "output")


def register(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file",
        nargs="?",
        type=Path,
        help="replies to judge: .jsonl, .json or .csv with reply (or "
        f"{', '.join(REPLY_KEYS[1:])}) and, if there is one, prompt; without a file the judge is "
        "measured on the labelled replies of this project",
    )
    parser.add_argument(
        "--judge",
        default="phrases",
        metavar="SPEC",
        help="phrases (default), hf:ID or hf:FORMAT=ID of a classifier",
    )
    parser.add_argument(
        "--part",
        choices=("held-out", "development"),
        default="held-out",
        help="of the labelled replies; rules were tuned on the development part",
    )
    parser.add_argument("--out", type=Path, help="with a file: where to write it with outcomes")
    parser.add_argument("--device", default="cpu", help="torch device of a classifier")


def run(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from steering.judge import make_judge
    from steering.judge_set import Part, labelled_replies, measure, render

    if arguments.file is not None:
        return _judge_file(arguments)
    if arguments.out is not None:
        raise ValueError("--out needs a file of replies")
    judge = make_judge(arguments.judge, device=arguments.device)
    part: Part = "held_out" if arguments.part == "held-out" else "development"
    with tqdm(total=len(labelled_replies(part)), leave=False, disable=None) as bar:
        measured = measure(judge, part, lambda found: bar.update(len(found)))
    for line in render(measured):
        print(line)
    return 0


def _judge_file(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from steering.judge import ask, make_judge
    from steering.judge_error import corrected_by

    records = _read_replies(arguments.file)  # before a classifier is loaded
    judge = make_judge(arguments.judge, device=arguments.device)
    replies, prompts = [reply for reply, _, _ in records], [prompt for _, prompt, _ in records]
    with tqdm(total=len(records), desc="judging", leave=False, disable=None) as bar:
        outcomes = ask(judge, replies, prompts, lambda found: bar.update(len(found)))
    if arguments.out is not None:
        with arguments.out.open("w", encoding="utf-8") as stream:
            for (_, _, record), outcome in zip(records, outcomes, strict=True):
                judged = {**record, "outcome": outcome, "judge": judge.version}
                stream.write(json.dumps(judged, ensure_ascii=False) + "\n")
    print(f"{len(outcomes)} replies judged by {judge.version}:")
    for line in _summary(outcomes):
        print(line)
    card = judge.card()
    print(f"The judge's sensitivity is {card.sensitivity}, its specificity {card.specificity}.")
    try:
        rate = corrected_by(card, outcomes.count("refusal"), len(outcomes))
    except ValueError as error:
        print(f"Not corrected: {error}")
    else:
        print(
            f"Refusals, corrected for them: {rate.estimate:.3f} [{rate.low:.3f}, {rate.high:.3f}]"
        )
    return 0


def _summary(outcomes: Sequence[str]) -> list[str]:
    from steering.judge import Outcome
    from steering.judge_set import Rate

    counts = Counter(outcomes)
    return [
        f"  {outcome:<10} {counts[outcome]:>6}  {Rate(counts[outcome], len(outcomes))}"
        for outcome in get_args(Outcome)
    ]


def _read_replies(path: Path) -> list[tuple[str, str | None, dict[str, Any]]]:
    """Reply, prompt and record of each. Raises ValueError naming the line without a reply."""
    from steering.records import read_records

    found = []
    for record in read_records(path).records:
        value = record.value
        if not isinstance(value, dict):
            raise record.error("expected an object with a reply")
        key = next((key for key in REPLY_KEYS if isinstance(value.get(key), str)), None)
        if key is None:
            raise record.error(f"no text under any of {', '.join(REPLY_KEYS)}")
        prompt = value.get("prompt")
        found.append((value[key], prompt if isinstance(prompt, str) else None, value))
    if not found:
        raise ValueError(f"{path}: no replies")
    return found
