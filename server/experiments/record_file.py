"""Experiments' records and events in JSONL files, one object a line, as `to_json` writes them."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from server.experiments.definitions import Experiment
from server.experiments.records import AnswerRecord, EventRecord

_ANSWER, _EVENT = TypeAdapter(AnswerRecord), TypeAdapter(EventRecord)


def read_records(path: Path) -> tuple[list[AnswerRecord], list[EventRecord]]:
    """Answers and events; an object with `detail` is an event.

    Raises ValueError, with file and line, for what is neither.
    """
    answers, events = [], []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
                if isinstance(value, dict) and "detail" in value:
                    events.append(_EVENT.validate_python(value))
                else:
                    answers.append(_ANSWER.validate_python(value))
            except ValidationError as error:
                raise ValueError(f"{path}:{number}: {_told(error)}") from None
            except ValueError as error:
                raise ValueError(f"{path}:{number}: not JSON: {error}") from None
    return answers, events


def read_definition(path: Path, records: Sequence[AnswerRecord]) -> Experiment:
    """The experiment of a JSON or TOML file: one definition, or `[[experiments]]` of a settings
    file, of which it is the one that the records are of.

    Raises ValueError where there is no such definition.
    """
    try:
        text = path.read_text("utf-8")
        data: Any = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    found = data.get("experiments", [data]) if isinstance(data, dict) else data
    if not isinstance(found, list):
        raise ValueError(f"{path}: expected an experiment, or [[experiments]]")
    try:
        experiments = [Experiment.model_validate(each) for each in found]
    except ValidationError as error:
        raise ValueError(f"{path}: {_told(error)}") from None
    seen = {(record.experiment, record.version) for record in records}
    mine = [each for each in experiments if (each.name, each.version) in seen]
    if len(experiments) == 1 and not seen:
        return experiments[0]
    if len(mine) != 1:
        names = ", ".join(sorted({f"{name} version {version}" for name, version in seen})) or "none"
        raise ValueError(f"{path}: records are of {names}; give the definition of one of these")
    return mine[0]


def _told(error: ValidationError) -> str:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    return f"{place}: {first['msg']}" if place else str(first["msg"])
