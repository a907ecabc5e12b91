"""`pilothouse experiments`: reports of A/B tests, and the database of their records."""

from __future__ import annotations

import argparse
import json
import urllib.parse
from pathlib import Path

from server.commands import remote

SUMMARY = "report on experiments, or bring their database up to date"


def register(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    report = verbs.add_parser("report", help="print an experiment's report")
    report.add_argument("name", help="of the experiment")
    report.add_argument(
        "--url", default="http://127.0.0.1:8000", help="of the server (default: %(default)s)"
    )
    report.add_argument("--version", type=int, help="of the experiment; default: the latest")
    report.add_argument(
        "--format", choices=("text", "json", "html"), default="text", help="default: text"
    )
    remote.add_key(report)
    analyse = verbs.add_parser("analyse", help="report on a file of records, without a server")
    analyse.add_argument("file", type=Path, help="records and events, one JSON object a line")
    analyse.add_argument(
        "definition", type=Path, help="of the experiment: .json, or .toml with [[experiments]]"
    )
    analyse.add_argument(
        "--format", choices=("text", "json", "html"), default="text", help="default: text"
    )
    analyse.add_argument("--out", type=Path, help="file to write; default: standard output")
    analyse.add_argument(
        "--judge",
        default="phrases",
        metavar="SPEC",
        help="the judge of the records, whose errors rates are corrected for: phrases (default), "
        "hf:ID of a classifier, or none",
    )
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
    verbs = {"report": _report, "analyse": _analyse, "migrate": _migrate}
    return verbs[arguments.verb](arguments)


def _report(arguments: argparse.Namespace) -> int:
    print(fetch_report(arguments).rstrip("\n"))
    return 0


def _analyse(arguments: argparse.Namespace) -> int:
    from server.experiments.interfaces import with_judgements
    from server.experiments.record_file import read_definition, read_records
    from server.experiments.report import make_report
    from steering.judge import make_judge

    records, events = read_records(arguments.file)
    experiment = read_definition(arguments.definition, records)
    card = None if arguments.judge == "none" else make_judge(arguments.judge).card()
    report = make_report(experiment, with_judgements(records), events, judge_card=card)
    if arguments.format == "text":
        text = report.to_text()
    elif arguments.format == "json":
        text = json.dumps(report.to_json(), indent=2, allow_nan=False) + "\n"
    else:
        text = report.to_html()
    if arguments.out is None:
        print(text, end="")
    else:
        arguments.out.write_text(text, "utf-8")
    return 0


def _migrate(arguments: argparse.Namespace) -> int:
    from server.experiments.store import database_of

    database = database_of(arguments.experiments_db, arguments.config)
    try:
        database.migrate()
    finally:
        database.close()
    print(f"{database.name} is up to date")
    return 0


def fetch_report(arguments: argparse.Namespace) -> str:
    """Raises ValueError with what the server says is wrong, or where there is no server."""
    query = {"format": arguments.format}
    if arguments.version is not None:
        query["version"] = str(arguments.version)
    name = urllib.parse.quote(arguments.name, safe="")
    path = f"/v1/experiments/{name}/report?{urllib.parse.urlencode(query)}"
    with remote.request(remote.base_of(arguments.url), path, key=arguments.key) as response:
        return response.read().decode()
