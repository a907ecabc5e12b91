"""What a server shows of its records, and that the commands beside it work."""

from __future__ import annotations

import json
from pathlib import Path

import httpx2
import pytest

from server.app import create_app
from server.cli import main
from server.experiments.database import Database, DatabaseError
from server.experiments.definitions import Experiment
from server.hosting import open_host
from server.settings import Settings
from tests.server.experiments.records import answer, make_records
from tests.server.fakes import make_host
from tests.server.live import live_server, wait_until


def metric(address: str, name: str) -> float:
    (line,) = [
        line
        for line in httpx2.get(f"{address}/metrics").text.splitlines()
        if line.startswith(f"steering_{name} ")
    ]
    return float(line.split()[1])


def health(address: str) -> dict[str, str]:
    response = httpx2.get(f"{address}/health")
    assert response.status_code == 200
    found: dict[str, str] = response.json()
    return found


def test_without_records_there_is_nothing_to_worry_about() -> None:
    with live_server(make_host()) as address:
        assert health(address) == {"status": "ok", "records": "off"}
        assert metric(address, "records_pending") == metric(address, "records_lost_total") == 0


def test_a_server_whose_database_is_down_stays_alive_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = make_host()
    records = make_records(tmp_path / "journal", f"sqlite:///{tmp_path / 'records.sqlite'}")
    host.records = records
    database, down = records.database, True
    assert database is not None
    write = database.write

    def unless_down(batch: list[object]) -> object:
        if down:
            raise DatabaseError("nobody listens")
        return write(batch)  # type: ignore[arg-type]

    monkeypatch.setattr(database, "write", unless_down)
    with live_server(host) as address:
        assert health(address) == {"status": "ok", "records": "ok"}
        records.append(answer(1))
        records.append(None)  # type: ignore[arg-type]
        assert health(address)["records"] == "failing"
        records.append(answer(2))
        wait_until(lambda: records.state == "failing")
        assert health(address)["records"] == "failing"
        assert metric(address, "records_pending") == 2
        assert metric(address, "records_lost_total") == 1
        down = False
        wait_until(lambda: health(address)["records"] == "ok")
        assert metric(address, "records_pending") == 0
        records.append(answer(3))
    # Closing the host moved the last one.
    check = Database(f"sqlite:///{tmp_path / 'records.sqlite'}")
    assert list(check.answers("tone", 1)) == [answer(1), answer(2), answer(3)]
    check.close()


@pytest.mark.parametrize("kept", [True, False])
def test_a_server_says_when_records_will_end_with_it(
    kept: bool, model_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arms = [{"name": name, "profile": "raw"} for name in ("control", "same")]
    host = open_host(
        Settings(
            model=str(model_path),
            experiments=[Experiment.model_validate({"name": "trial", "arms": arms})],
            experiments_journal=tmp_path if kept else None,
        )
    )
    host.close()
    assert ("kept in memory" in caplog.text) != kept


def test_the_health_of_records_is_documented() -> None:
    schema = create_app(make_host()).openapi()["components"]["schemas"]["Health"]
    assert set(schema["properties"]["records"]["enum"]) == {"ok", "behind", "failing", "off"}


def test_the_command_migrates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"sqlite:///{tmp_path / 'new.sqlite'}"
    assert main(["experiments", "migrate", "--experiments-db", url]) == 0
    assert f"{url} is up to date" in capsys.readouterr().out
    database = Database(url)
    database.write([answer(1)])
    assert main(["experiments", "migrate", "--experiments-db", url]) == 0
    assert list(database.answers("tone", 1)) == [answer(1)]
    database.close()
    config = tmp_path / "pilothouse.toml"
    config.write_text(f"experiments_journal = {json.dumps(str(tmp_path / 'journal'))}")
    assert main(["experiments", "migrate", "--config", str(config)]) == 0
    assert (tmp_path / "journal" / "records.sqlite").is_file()
    assert main(["experiments", "migrate"]) == 2
    assert "name a database with --experiments-db" in capsys.readouterr().err


def test_the_command_says_in_one_line_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    for url in ("mysql://host/db", "postgresql://me:secret@127.0.0.1:1/db"):
        assert main(["experiments", "migrate", "--experiments-db", url]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "secret" not in error
