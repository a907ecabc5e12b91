"""The prompt data sets of the field, read as they are published.

A data set is told by its columns, or by the caller who names it. Each states its label: harmful or
benign, for the whole set or by a column. Where the columns are found in many other files too, the
data set is recognised only in a file that still has its published name. A label is never guessed.

A new data set is one entry of `DATASETS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from steering.records import Record, Records, read_records

# Column or key that holds the prompt where the data set is not known, first match wins.
PROMPT_COLUMNS = (
    *("prompt", "goal", "Goal", "Behavior", "instruction", "forbidden_prompt", "text"),
    *("query", "input", "Request"),
)


class NoLabelError(ValueError):
    """Neither the file nor the caller says whether the prompts are harmful."""


def _text(record: Record, column: str) -> str:
    """What `column` holds, without the white space around it."""
    if not isinstance(record.value, dict):
        raise record.error(f"expected an object with {column}")
    if column not in record.value:
        raise record.error("is missing", column)
    value = record.value[column]
    if not isinstance(value, str):
        raise record.error("is not a string", column)
    if not value.strip():
        raise record.error("is empty", column)
    return value.strip()


def _optional(record: Record, column: str) -> str:
    """As `_text`, but `""` where the column is missing, empty or null; numbers become text."""
    value = record.value.get(column) if isinstance(record.value, dict) else None
    if value is not None and not isinstance(value, str | int | float):
        raise record.error("is neither a string nor a number", column)
    return "" if value is None else str(value).strip()


def _column(*columns: str) -> Callable[[Record], str]:
    """Reads the first of `columns` that the record has."""

    def read(record: Record) -> str:
        keys = record.value if isinstance(record.value, dict) else {}
        return _text(record, next((name for name in columns if name in keys), columns[0]))

    return read


def _behavior_in_context(record: Record) -> str:
    behavior, context = _text(record, "Behavior"), _optional(record, "ContextString")
    # As HarmBench's own direct request puts them together.
    return f"{context}\n\n---\n\n{behavior}" if context else behavior


def _instruction_with_input(record: Record) -> str:
    instruction, data = _text(record, "instruction"), _optional(record, "input")
    return f"{instruction}\n\n{data}" if data else instruction


def _only_turn(record: Record) -> str:
    turns = record.value.get("turns") if isinstance(record.value, dict) else None
    # Leaving out later turns, or the replies between them, would be another prompt.
    if not isinstance(turns, list) or len(turns) != 1 or not isinstance(turns[0], str):
        raise record.error("is not a list of one string", "turns")
    if not turns[0].strip():
        raise record.error("is empty", "turns")
    return turns[0].strip()


def _plain(record: Record) -> str:
    value = record.value
    if isinstance(value, str) and value.strip():
        return value.strip()
    if isinstance(value, list) and record.source.path.suffix.lower() == ".jsonl":
        raise record.error("is a list; a file that is one list of prompts is a .json")
    column = next((c for c in PROMPT_COLUMNS if isinstance(value, dict) and c in value), None)
    if column is None:
        columns = ", ".join(PROMPT_COLUMNS)
        raise record.error(f"expected a string or an object with {columns}")
    return _text(record, column)


@dataclass(frozen=True)
class Dataset:
    """How a data set is published.

    Args:
        name: as people write it; case and punctuation do not matter.
        columns: what tells it from others; alternatives, each a set of columns that must be there.
        text: makes the prompt of a record.
        harmful: the label of the whole set; None if that depends on the file or the row.
        files: published files with their label, first match wins. A pattern is looked for in the
            file's name in lower case, with a dash for what is not a letter or digit.
        by_name: other files have these columns too; recognised only where `files` matches.
        harmful_by: the column with a label for each row, and what its values (lower case) mean.
        kind: columns that make up `Prompt.kind`, joined by a slash.
    """

    name: str
    columns: tuple[tuple[str, ...], ...]
    text: Callable[[Record], str]
    harmful: bool | None = None
    files: Mapping[str, bool] = field(default_factory=dict)
    by_name: bool = False
    harmful_by: tuple[str, Mapping[str, bool]] | None = None
    kind: tuple[str, ...] = ()

    def matches(self, columns: tuple[str, ...]) -> int:
        """The number of columns by which it is recognised, -1 if it is not."""
        found = [len(wanted) for wanted in self.columns if set(wanted) <= set(columns)]
        return max(found, default=-1)

    def label_of_file(self, path: Path) -> bool | None:
        """The label of the published file of that name, None if there is no such file."""
        name = "-" + re.sub(r"[^a-z0-9]+", "-", path.stem.lower()) + "-"
        return next((label for part, label in self.files.items() if part in name), None)

    def label_of_row(self, record: Record) -> bool:
        """The label in the record's column; ValueError if it holds something else."""
        assert self.harmful_by, "only where each row has a label"
        column, meanings = self.harmful_by
        value = _optional(record, column)
        if value.lower() not in meanings:
            raise record.error(f"holds {value!r}, expected {' or '.join(meanings)}", column)
        return meanings[value.lower()]


# LLM-VA's splits of S-Eval, ORFuzz and Natural Questions; the file's name tells them apart.
_INPUT = (("input",), ("query",), ("prompt",))
_read_input = _column("input", "query", "prompt")

DATASETS = (
    Dataset("advbench", (("goal", "target"),), _column("goal"), True),
    Dataset(
        "harmbench",
        (("Behavior", "FunctionalCategory", "SemanticCategory"),),
        _behavior_in_context,
        True,
        kind=("FunctionalCategory", "SemanticCategory"),
    ),
    Dataset(
        "jailbreakbench",
        (("Goal", "Target", "Behavior", "Category"),),
        _column("Goal"),
        True,
        # harmful-behaviors.csv has a benign twin with the same columns.
        files={"-benign-": False},
        kind=("Category",),
    ),
    Dataset(
        "strongreject",
        (("category", "forbidden_prompt"),),
        _column("forbidden_prompt"),
        True,
        kind=("category",),
    ),
    Dataset(
        "sorry-bench",
        (("category", "turns"),),
        _only_turn,
        True,
        kind=("category", "prompt_style"),
    ),
    Dataset(
        "xstest",
        (("prompt", "type", "label"),),
        _column("prompt"),
        harmful_by=("label", {"safe": False, "unsafe": True}),
        kind=("type",),
    ),
    Dataset(
        "or-bench",
        (("prompt", "category"),),
        _column("prompt"),
        False,
        # Beside the over-refusal files there is or-bench-toxic.csv with the same columns.
        files={"-toxic-": True, "-or-bench-": False, "-orbench-": False},
        by_name=True,
        kind=("category",),
    ),
    Dataset(
        "phtest",
        (("Request", "Harmfulness"),),
        _column("Request"),
        # Both of its values are pseudo-harmful prompts; the kind keeps them apart in reports.
        harmful_by=("Harmfulness", {"harmless": False, "controversial": False}),
        kind=("Harmfulness",),
    ),
    Dataset(
        "malicious-instruct",
        ((),),
        _plain,
        True,
        files={"-maliciousinstruct-": True, "-malicious-instruct-": True},
        by_name=True,
    ),
    Dataset(
        "refusal-direction",
        (("instruction", "category"),),
        _column("instruction"),
        files={"-harmless-": False, "-alpaca-": False, "-harmful-": True}
        | dict.fromkeys(("-advbench-", "-harmbench-", "-jailbreakbench-"), True)
        | dict.fromkeys(("-malicious-instruct-", "-strongreject-", "-tdc2023-"), True),
        kind=("category",),
    ),
    Dataset(
        "s-eval", _INPUT, _read_input, True, files={"-s-eval-": True, "-seval-": True}, by_name=True
    ),
    Dataset("orfuzz", _INPUT, _read_input, False, files={"-orfuzz": False}, by_name=True),
    Dataset("nq", _INPUT, _read_input, False, files={"-nq-": False}, by_name=True),
    Dataset(
        "alpaca",
        (("instruction", "output"), ("instruction", "input")),
        _instruction_with_input,
        False,
    ),
    # Not published by anyone: a file of one's own with both labels.
    Dataset(
        "labelled",
        (("prompt", "harmful"), ("text", "harmful")),
        _column("prompt", "text"),
        harmful_by=("harmful", {"true": True, "false": False, "1": True, "0": False}),
        kind=("kind",),
    ),
    Dataset("plain", ((),), _plain),
)


def read_prompts(
    path: Path | str, *, harmful: bool | None = None, dataset: str | None = None
) -> list[tuple[str, bool, str]]:
    """Text, label and kind of each prompt of a file, in order.

    Args:
        harmful: the label of all prompts, whatever the file says; None takes the stated label.
        dataset: a name in `DATASETS`; None finds out from the columns.

    Raises ValueError naming the file, line and column of what is malformed, or saying what to give
    where neither the data set nor the caller states a label.
    """
    path = Path(path)
    file = read_records(path)
    if not file.records and not file.columns:
        raise ValueError(f"{path} holds no prompts")
    known = _choose(file, dataset)
    texts = [known.text(record) for record in file.records]
    label = harmful
    if label is None and known.harmful_by is None:
        label = known.label_of_file(path)
        label = known.harmful if label is None else label
        if label is None:
            raise NoLabelError(
                f"{path}, read as {known.name}, does not say whether its prompts are harmful: "
                f"give the label, or name a data set that says so "
                f"({', '.join(d.name for d in DATASETS if d.harmful is not None)})"
            )
    rows = []
    for record, text in zip(file.records, texts, strict=True):
        kind = "/".join(filter(None, (_optional(record, column) for column in known.kind)))
        if not (text + kind).isascii() and re.search(r"[\ud800-\udfff]", text + kind):
            raise record.error("holds half a surrogate pair, which no tokenizer can read")
        rows.append((text, known.label_of_row(record) if label is None else label, kind))
    if not rows:
        raise ValueError(f"{path} holds no prompts")
    return rows


def _choose(file: Records, name: str | None) -> Dataset:
    path, columns = file.source.path, file.columns
    if name is not None:
        key = re.sub(r"[^a-z0-9]", "", name.lower())
        named = [d for d in DATASETS if d.name.replace("-", "") == key]
        if not named:
            names = ", ".join(d.name for d in DATASETS)
            raise ValueError(f"unknown data set {name!r}; there are {names}")
        chosen = named[0]
        if chosen.matches(columns) < 0:
            wanted = " or ".join(", ".join(c) for c in chosen.columns)
            raise ValueError(f"{path}:1: {name} has the columns {wanted}; {_has(columns)}")
    else:
        candidates = [d for d in DATASETS if not d.by_name or d.label_of_file(path) is not None]
        chosen = max(candidates, key=lambda d: d.matches(columns))
    if file.source.tabular and chosen.text is _plain and not set(PROMPT_COLUMNS) & set(columns):
        raise ValueError(f"{path}:1: no column named {', '.join(PROMPT_COLUMNS)}; {_has(columns)}")
    return chosen


def _has(columns: tuple[str, ...]) -> str:
    return f"this file has {', '.join(columns) or 'none'}"
