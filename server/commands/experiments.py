"""`pilothouse experiments`: reports of A/B tests, and the database of their records."""

from __future__ import annotations

import argparse
import json
import urllib.parse
from base64 import b64decode
from collections.abc import Mapping
from pathlib import Path

from server.commands import remote

SUMMARY = "report on experiments, export records, or bring their database up to date"


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
    report.add_argument("--plots", type=Path, metavar="DIR", help="folder for plots, as PNG files")
    analyse = verbs.add_parser("analyse", help="report on a file of records, without a server")
    analyse.add_argument("file", type=Path, help="records and events, one JSON object a line")
    analyse.add_argument(
        "definition", type=Path, help="of the experiment: .json, or .toml with [[experiments]]"
    )
    analyse.add_argument(
        "--format", choices=("text", "json", "html"), default="text", help="default: text"
    )
    analyse.add_argument("--out", type=Path, help="file to write; default: standard output")
    analyse.add_argument("--plots", type=Path, metavar="DIR", help="folder for plots, as PNG files")
    analyse.add_argument(
        "--judge",
        default="phrases",
        metavar="SPEC",
        help="the judge of the records, whose errors rates are corrected for: phrases (default), "
        "hf:ID of a classifier, or none",
    )
    export = verbs.add_parser(
        "export", help="write what is on record of an experiment, as `analyse` reads it"
    )
    export.add_argument("name", help="of the experiment")
    export.add_argument("--version", type=int, help="of the experiment; default: the latest")
    _name_database(export)
    migrate = verbs.add_parser(
        "migrate",
        help="bring the tables of the database up to date, as a server does when it starts",
    )
    _name_database(migrate)


def _name_database(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--experiments-db",
        metavar="URL",
        help="sqlite:///FILE or postgresql://USER@HOST/NAME; default: what the variables and "
        "--config of `serve` say",
    )
    parser.add_argument("--config", type=Path, help="TOML file with the settings of `serve`")


def run(arguments: argparse.Namespace) -> int:
    verbs = {"report": _report, "analyse": _analyse, "export": _export, "migrate": _migrate}
    return verbs[arguments.verb](arguments)


def _report(arguments: argparse.Namespace) -> int:
    print(fetch_report(arguments, arguments.format).rstrip("\n"))
    if arguments.plots is not None:
        files = json.loads(fetch_report(arguments, "plots"))
        _write_plots(arguments.plots, {name: b64decode(data) for name, data in files.items()})
    return 0


def _analyse(arguments: argparse.Namespace) -> int:
    from server.experiments.interfaces import with_judgements
    from server.experiments.record_file import read_definition, read_records
    from server.experiments.report_making import make_report
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
    if arguments.plots is not None:
        _write_plots(arguments.plots, {plot.file: plot.png for plot in report.plots()})
    if arguments.out is None:
        print(text, end="")
    else:
        arguments.out.write_text(text, "utf-8")
    return 0


def _write_plots(folder: Path, files: Mapping[str, bytes]) -> None:
    """Raises ValueError where there are none."""
    if not files:
        raise ValueError(
            "there are no plots: nothing was judged yet, or matplotlib is missing where the report "
            "is made (pip install 'pilothouse[eval]')"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / Path(name).name).write_bytes(data)  # whatever a server calls it


def _export(arguments: argparse.Namespace) -> int:
    from server.experiments.interfaces import with_judgements
    from server.experiments.store import database_of

    database, name = database_of(arguments.experiments_db, arguments.config), arguments.name
    try:
        versions = [seen.version for seen in database.experiments() if seen.experiment == name]
        version = max(versions, default=0) if arguments.version is None else arguments.version
        if version not in versions:
            raise ValueError(f"{database.name} has no answers of {name} version {version or 1}")
        for answer in with_judgements(database.answers(name, version)):
            print(json.dumps(answer.to_json()))
        for event in database.events(name, version):
            print(json.dumps(event.to_json()))
    finally:
        database.close()
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


def fetch_report(arguments: argparse.Namespace, format: str) -> str:
    """Raises ValueError with what the server says is wrong, or where there is no server."""
    query = {"format": format}
    if arguments.version is not None:
        query["version"] = str(arguments.version)
    name = urllib.parse.quote(arguments.name, safe="")
    path = f"/v1/experiments/{name}/report?{urllib.parse.urlencode(query)}"
    with remote.request(remote.base_of(arguments.url), path, key=arguments.key) as response:
        return response.read().decode()
