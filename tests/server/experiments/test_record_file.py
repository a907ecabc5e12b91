"""Reports on files of records, as the command line makes them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from server.cli import main
from server.experiments.database import Database
from server.experiments.interfaces import JUDGED_LATER
from server.experiments.record_file import read_records
from tests.server.experiments.samples import START, event, experiment, traffic

TOML = """
[[experiments]]
name = "other"
arms = [{ name = "raw", profile = "raw" }, { name = "a", profile = "a" }]

[[experiments]]
name = "test"
arms = [{ name = "raw", profile = "raw" }, { name = "a", profile = "a" }]
"""


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    rows = [*traffic([0.2, 0.4], 3000), event("registered", None, START)]
    records, definition = tmp_path / "records.jsonl", tmp_path / "settings.toml"
    records.write_text("".join(json.dumps(row.to_json()) + "\n" for row in rows), "utf-8")
    definition.write_text(TOML, "utf-8")
    return records, definition


def test_a_file_of_records_has_a_verdict(
    files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["experiments", "analyse", *map(str, files), "--judge", "none"]) == 0
    assert "a against raw: worse" in capsys.readouterr().out


def test_forms_are_written_to_files(files: tuple[Path, Path], tmp_path: Path) -> None:
    for form in ("json", "html"):
        out = tmp_path / f"report.{form}"
        arguments = [*map(str, files), "--judge", "none", "--format", form, "--out", str(out)]
        assert main(["experiments", "analyse", *arguments]) == 0
    found = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert found["comparisons"][0]["decision"]["verdict"] == "worse"
    assert found["events"][0]["kind"] == "registered"
    assert "<h2>Verdict</h2>" in (tmp_path / "report.html").read_text("utf-8")


def test_plots_are_written_as_png(files: tuple[Path, Path], tmp_path: Path) -> None:
    arguments = [*map(str, files), "--judge", "none", "--plots", str(tmp_path / "plots")]
    assert main(["experiments", "analyse", *arguments]) == 0
    found = {path.name: path.read_bytes() for path in (tmp_path / "plots").iterdir()}
    assert found.keys() == {"a-units.png", "rates.png"}
    assert all(data.startswith(b"\x89PNG") for data in found.values())


def test_where_there_is_nothing_to_plot_the_command_says_so(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = json.loads(files[0].read_text("utf-8").split("\n")[0])
    files[0].write_text(json.dumps(first | {"outcome": None}))
    arguments = [*map(str, files), "--judge", "none", "--plots", str(tmp_path / "plots")]
    assert main(["experiments", "analyse", *arguments]) == 2
    assert "nothing was judged yet" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [("{", "2: not JSON"), ("[]", "2: "), ('{"id": "x"}', "2: time: "), ("7", "2: ")],
)
def test_a_line_that_is_no_record_is_named(
    files: tuple[Path, Path], line: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    records, definition = files
    first = records.read_text("utf-8").split("\n")[0]
    records.write_text(f"{first}\n{line}\n", "utf-8")
    assert main(["experiments", "analyse", str(records), str(definition)]) == 2
    assert f"records.jsonl:{message}" in capsys.readouterr().err


def test_the_definition_must_be_of_the_records(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records, definition = files
    definition.write_text(TOML.replace('"test"', '"third"'), "utf-8")
    assert main(["experiments", "analyse", str(records), str(definition)]) == 2
    assert "records are of test version 1" in capsys.readouterr().err
    one = tmp_path / "one.json"
    one.write_text(experiment(name="third").model_dump_json(), "utf-8")
    assert main(["experiments", "analyse", str(records), str(one)]) == 2
    assert "records are of test version 1" in capsys.readouterr().err
    one.write_text(experiment(alpha=0.01).model_dump_json(), "utf-8")
    assert main(["experiments", "analyse", str(records), str(one), "--judge", "none"]) == 0
    assert "alpha 0.01" in capsys.readouterr().out


def test_what_a_database_holds_is_exported_as_it_is_read(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records, definition = files
    answers, events = read_records(records)
    late = dataclasses.replace(answers[0], id=answers[0].id + JUDGED_LATER, outcome="degenerate")
    url = f"sqlite:///{tmp_path / 'records.sqlite'}"
    database = Database(url)
    database.migrate()
    database.write([*answers, *events, late, dataclasses.replace(late, id="old", version=7)])
    database.close()
    export = ["experiments", "export", "test", "--experiments-db", url]
    assert main([*export, "--version", "1"]) == 0
    records.write_text(capsys.readouterr().out, "utf-8")
    found, again = read_records(records)
    assert found == [dataclasses.replace(answers[0], outcome="degenerate"), *answers[1:]]
    assert again == events
    assert main(["experiments", "analyse", str(records), str(definition), "--judge", "none"]) == 0
    assert "a against raw: worse" in capsys.readouterr().out
    assert main(export) == 0
    assert json.loads(capsys.readouterr().out)["version"] == 7
    assert main([*export, "--version", "3"]) == 2
    assert "no answers of test version 3" in capsys.readouterr().err
