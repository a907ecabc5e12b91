"""Flags that name prompt files, and what they mean."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from steering.prompts import PromptSet


def register(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "prompts", "files are .txt, .csv, .json or .jsonl; every flag may be repeated"
    )
    for flag, text in (
        ("--harmful", "prompts to refuse, whatever label the file states"),
        ("--harmless", "prompts to answer, whatever label the file states"),
        ("--prompts", "a data set that states the labels of its prompts, as XSTest does"),
    ):
        group.add_argument(flag, type=Path, action="append", default=[], metavar="FILE", help=text)
    group.add_argument(
        "--dataset",
        action="append",
        default=[],
        metavar="[FILE=]NAME",
        help="how to read the files, or one of them, where the columns do not tell",
    )


def load(arguments: argparse.Namespace, report: Callable[[str], None]) -> PromptSet:
    """The prompts of all flags, in their order. Reports labels that flags overrule.

    Raises ValueError naming the file, or the flag that is missing.
    """
    from steering.datasets import NoLabelError
    from steering.prompts import Prompt, PromptSet, load_prompts

    formats, default = _formats(arguments)
    found = list[Prompt]()
    for files, label in (
        (arguments.harmful, True),
        (arguments.harmless, False),
        (arguments.prompts, None),
    ):
        for file in files:
            dataset = formats.get(file, default)
            try:
                loaded = load_prompts(file, harmful=label, dataset=dataset)
            except NoLabelError as error:
                raise ValueError(f"{error}. Flags for it: --harmful, --harmless") from None
            if label is not None:
                _report_overruled(file, dataset, label, report)
            found += loaded.prompts
    prompts = PromptSet(tuple(found))
    for name, there in (("harmful", prompts.harmful), ("harmless", prompts.benign)):
        if not there:
            raise ValueError(f"there are no {name} prompts: give some with --{name} or --prompts")
    return prompts


def _formats(arguments: argparse.Namespace) -> tuple[dict[Path, str], str | None]:
    """Data sets by file, and the one of all other files."""
    files = {*arguments.harmful, *arguments.harmless, *arguments.prompts}
    by_file, default = dict[Path, str](), None
    for value in arguments.dataset:
        file, equals, name = value.rpartition("=")
        if not equals:
            default = value
        elif Path(file) in files:
            by_file[Path(file)] = name
        else:
            raise ValueError(f"--dataset {value}: {file} is not one of the prompt files")
    return by_file, default


def _report_overruled(
    file: Path, dataset: str | None, label: bool, report: Callable[[str], None]
) -> None:
    """Says so where a file states another label than its flag."""
    from steering.prompts import load_prompts

    try:
        stated = load_prompts(file, dataset=dataset).prompts
    except ValueError:  # it states none
        return
    if other := sum(prompt.harmful != label for prompt in stated):
        names = ("harmless", "harmful")
        report(
            f"warning: {file} states that {other} of its {len(stated)} prompts are "
            f"{names[not label]}; --{names[label]} takes them as {names[label]}"
        )
