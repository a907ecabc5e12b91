"""`pilothouse experiments`: what the records of an experiment show."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

SUMMARY = "analyse the records of an experiment"


def register(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
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


def run(arguments: argparse.Namespace) -> int:
    from server.experiments.record_file import read_definition, read_records
    from server.experiments.report import make_report
    from steering.judge import make_judge

    records, events = read_records(arguments.file)
    experiment = read_definition(arguments.definition, records)
    card = None if arguments.judge == "none" else make_judge(arguments.judge).card()
    report = make_report(experiment, records, events, judge_card=card)
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
