"""What is not in the README does not exist for anybody: settings, endpoints, commands, metrics."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from server.app import create_app
from server.cli import make_parser
from server.experiments.definitions import Arm, Experiment, GuardRail
from server.metrics import Metrics
from server.settings import Settings, flag
from tests.server.fakes import make_host

README = Path(__file__).parents[2] / "README.md"


def commands() -> list[str]:
    """`pilothouse serve`, `pilothouse profiles list`, ..."""

    def below(parser: argparse.ArgumentParser, name: str) -> list[str]:
        # argparse has no public way to ask for subcommands.
        groups = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        found = [f"{name} {verb}" for group in groups for verb in group.choices]
        parsers = [child for group in groups for child in group.choices.values()]
        return found + [
            deeper
            for path, child in zip(list(found), parsers, strict=True)
            for deeper in below(child, path)
        ]

    return below(make_parser(), "pilothouse")


def endpoints() -> list[str]:
    document = create_app(make_host()).openapi()
    return sorted(document["paths"])


def needed() -> dict[str, list[str]]:
    """Everything that must be named, by kind."""
    return {
        "settings": [flag(name) for name in Settings.model_fields],
        "endpoints": endpoints(),
        "commands": commands(),
        "metrics": Metrics([]).names,
        "fields of an experiment": [
            f"`{name}`"
            for model in (Experiment, Arm, GuardRail)
            for name in model.model_fields
            if name != "creator"  # set by the server
        ],
    }


@pytest.mark.parametrize(
    "kind", ["settings", "endpoints", "commands", "metrics", "fields of an experiment"]
)
def test_the_readme_names_every_one_of_the(kind: str) -> None:
    text = README.read_text("utf-8")
    missing = [name for name in needed()[kind] if name not in text]
    assert not missing, f"README.md does not name these {kind}: {', '.join(missing)}"


if __name__ == "__main__":
    for kind, names in needed().items():
        print(f"{kind}: {' '.join(names) if kind != 'commands' else ', '.join(names)}\n")
