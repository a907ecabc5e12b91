"""`pilothouse experiments`: the records of A/B tests."""

from __future__ import annotations

import argparse
from pathlib import Path

SUMMARY = "bring the database of experiments up to date"


def register(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    migrate = verbs.add_parser(
        "migrate",
        help="bring the tables of the database up to date, as a server does when it starts",
    )
    migrate.add_argument(
        "--experiments-db",
        metavar="URL",
        help="sqlite:///FILE or postgresql://USER@HOST/NAME; default: what the variables and "
        "--config of `serve` say",
    )
    migrate.add_argument("--config", type=Path, help="TOML file with the settings of `serve`")


def run(arguments: argparse.Namespace) -> int:
    from server.experiments.store import database_of

    if arguments.verb == "migrate":
        database = database_of(arguments.experiments_db, arguments.config)
        try:
            database.migrate()
        finally:
            database.close()
        print(f"{database.name} is up to date")
    return 0
