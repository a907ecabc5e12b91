"""The subcommands of `pilothouse`, one file each.

A command's module has `SUMMARY`, `register(parser)`, which adds its flags, and `run(arguments)`,
which does the work and returns the exit status. Heavy imports belong inside `run`, so that
`--help` is quick. Adding a command is adding a file and its name to `NAMES`; a file whose name
Python reserves ends in an underscore.
"""

from __future__ import annotations

import argparse
import importlib
import keyword
from typing import Protocol, cast

NAMES = (
    "serve",
    "chat",
    "fit",
    "eval",
    "profiles",
    "export",
    "import",
    "judge",
    "keys",
    "experiments",
    "demo",
)


class Command(Protocol):
    """What a command's module offers."""

    SUMMARY: str

    def register(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, arguments: argparse.Namespace) -> int: ...


def load(name: str) -> Command:
    module = f"{name}_" if keyword.iskeyword(name) else name
    return cast(Command, importlib.import_module(f"{__name__}.{module}"))
