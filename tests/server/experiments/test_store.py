"""Records reach the database, or wait for it, and no answer ever does."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from server.errors import UnavailableError
from server.experiments import store, writer
from server.experiments.database import Database, DatabaseError
from server.experiments.journal import REJECTED, Journal, checked, encode, parse
from server.experiments.store import Records, open_records
from server.settings import Settings, SettingsError, load_settings
from tests.server.experiments.records import answer, event, make_records
from tests.server.live import wait_until


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'records.sqlite'}"


def breakable(records: Records, monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """Lets a test switch the database off."""
    database, down = records.database, {"down": True}
    assert database is not None

    def unless_down(method: Any) -> Any:
        def call(*arguments: Any) -> Any:
            if down["down"]:
                raise DatabaseError("nobody listens")
            return method(*arguments)

        return call

    for name in ("migrate", "write"):
        monkeypatch.setattr(database, name, unless_down(getattr(database, name)))
    return down


def test_what_is_appended_can_be_read(url: str, tmp_path: Path) -> None:
    records = make_records(tmp_path / "journal", url)
    records.start()
    for i in (2, 1):
        records.append(answer(i))
    records.append(event(1))
    assert list(records.answers("tone", 1)) == [answer(1), answer(2)]
    assert list(records.events("tone", 1)) == [event(1)]
    assert (records.state, records.pending, records.lost) == ("ok", 0, 0)
    records.close()
    assert not list((tmp_path / "journal").glob("*.jsonl"))


@pytest.mark.parametrize("with_text", [False, True])
def test_text_is_kept_only_where_the_operator_says_so(
    with_text: bool, url: str, tmp_path: Path
) -> None:
    records = make_records(tmp_path / "journal", url, with_text=with_text)
    records.append(answer(1, prompt="who?", reply="secret"))
    written = b"".join(path.read_bytes() for path in records.journal.segments())
    assert (b"secret" in written) is with_text
    records.start()
    (found,) = records.answers("tone", 1)
    assert (found.prompt, found.reply) == (("who?", "secret") if with_text else (None, None))
    records.close()


def test_a_database_that_goes_and_comes_back_gets_everything_once(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    records = make_records(tmp_path / "journal", url)
    switch = breakable(records, monkeypatch)
    with caplog.at_level(logging.INFO):
        for start in (0, 10):  # down at the start, and down later
            switch["down"] = True
            if not start:
                records.start()
            for i in range(start, start + 10):
                records.append(answer(i))
            wait_until(lambda: records.state == "failing")
            assert records.pending == 10
            switch["down"] = False
            assert records.flush(30)
            wait_until(lambda: records.state == "ok")
            assert records.pending == 0
    assert len([r for r in caplog.records if "nobody listens" in r.getMessage()]) == 2
    assert list(records.answers("tone", 1)) == [answer(i) for i in range(20)]
    assert records.lost == 0
    records.close()


def test_a_full_database_gets_everything_once_there_is_room(url: str, tmp_path: Path) -> None:
    records = make_records(tmp_path / "journal", url)
    assert records.database is not None
    records.database.migrate()
    pages = [20]

    def limit(connection: Any, _: Any) -> None:
        connection.execute(f"PRAGMA max_page_count = {pages[0]}")

    records.database.close()
    sa.event.listen(records.database.engine, "connect", limit)
    for i in range(600):
        records.append(answer(i))
    records.start()
    wait_until(lambda: records.state == "failing")
    assert records.pending > 0
    records.append(answer(600))
    pages[0] = 2**30
    wait_until(lambda: records.pending == 0)
    assert list(records.answers("tone", 1)) == [answer(i) for i in range(601)]
    assert records.lost == 0
    records.close()


def test_records_go_on_to_the_database_after_a_disk_was_full(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The segment that a failed write ended is moved and deleted; the next has another name."""
    records = make_records(tmp_path / "journal", url)
    records.start()
    records.append(answer(1))
    assert records.flush(30)

    def full(file: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("server.experiments.journal.os.write", full)
        records.append(answer(2))
    assert records.lost == 1
    wait_until(lambda: not records.journal.segments())
    records.append(answer(3))
    assert records.flush(30), "its segment was taken for the one that was deleted"
    assert list(records.answers("tone", 1)) == [answer(1), answer(3)]
    records.close()


def test_records_that_no_reader_finds_are_behind_in_the_end(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "BEHIND_SECONDS", 0.1)
    monkeypatch.setattr(writer, "POLL_SECONDS", 0.01)
    records = make_records(tmp_path / "journal", url)
    records.append(answer(1))
    for segment in records.journal.segments():
        segment.unlink()
    records.start()
    wait_until(lambda: records.state == "behind")
    assert records.pending == 1
    records.close()


def test_a_database_that_was_emptied_gets_its_tables_again(url: str, tmp_path: Path) -> None:
    records = make_records(tmp_path / "journal", url)
    records.start()
    records.append(answer(1))
    assert records.flush(30) and records.database is not None
    with records.database.engine.begin() as connection:
        for table in ("experiment_answers", "experiment_events", "experiment_schema_version"):
            connection.exec_driver_sql(f"DROP TABLE {table}")
    records.append(answer(2))
    wait_until(lambda: records.pending == 0)
    assert list(records.answers("tone", 1)) == [answer(2)]
    records.close()


def test_a_file_that_is_removed_takes_no_record_with_it_that_comes_after(
    url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records = make_records(tmp_path / "journal", url)
    records.start()
    records.append(answer(1))
    assert records.flush()
    for file in tmp_path.glob("records.sqlite*"):
        file.unlink()
    records.append(answer(2))
    assert records.flush()
    assert "its file was removed, or replaced by another" in caplog.text
    records.close()
    reader = Database(url)
    assert answer(2) in list(reader.answers("tone", 1))
    reader.close()


def test_the_latest_version_on_record_needs_no_database(tmp_path: Path) -> None:
    records = Records(Journal(tmp_path))
    assert records.latest_version("tone") == 0
    records.append(answer(1))
    records.append(event(1, version=4))
    assert records.latest_version("tone") == 4
    records.close()


def test_records_that_no_database_took_wait_for_the_next_start(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    records = make_records(tmp_path / "journal", url)
    breakable(records, monkeypatch)
    records.start()
    records.append(answer(1))
    records.close()
    assert "1 records of experiments stay in" in caplog.text
    records.append(answer(2))  # an answer that ended after everything else
    records.close()
    again = make_records(tmp_path / "journal", url)
    assert again.pending == 2
    again.start()
    assert list(again.answers("tone", 1)) == [answer(1), answer(2)]
    again.close()


def test_closing_moves_what_is_left_and_a_second_time_does_nothing(
    url: str, tmp_path: Path
) -> None:
    records = make_records(tmp_path / "journal", url)
    for i in range(2 * writer.BATCH + 1):
        records.append(answer(i))
    records.start()
    records.start()
    records.close(60)
    records.close(60)
    database = Database(url)
    assert len(list(database.answers("tone", 1))) == 2 * writer.BATCH + 1
    database.close()


def test_a_refused_record_is_laid_aside_and_counted(url: str, tmp_path: Path) -> None:
    lost: list[int] = []
    records = make_records(tmp_path / "journal", url)
    records.on_lost(lambda: lost.append(1))
    records.append(answer(1))
    records.append(answer(2, arm=None))
    records.append(answer(3))
    records.start()
    assert list(records.answers("tone", 1)) == [answer(1), answer(3)]
    assert records.lost == len(lost) == 1 and records.state == "ok"
    line = (tmp_path / "journal" / REJECTED).read_bytes()
    payload = checked(line)
    assert payload is not None and parse(payload) == answer(2, arm=None)
    records.close()


def test_records_that_wait_too_long_are_behind(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "BEHIND_SECONDS", -1.0)
    records = make_records(tmp_path / "journal", url)
    assert records.state == "ok"  # nothing waits
    records.append(answer(1))
    assert records.state == "behind"
    records.start()
    assert records.flush(30) and records.state == "ok"
    records.close()


def test_a_database_that_cannot_be_read_is_a_503(tmp_path: Path) -> None:
    pytest.importorskip("psycopg")
    records = make_records(tmp_path / "journal", "postgresql://me:secret@127.0.0.1:1/db")
    with pytest.raises(UnavailableError) as caught:
        list(records.answers("tone", 1))
    assert caught.value.code == "records_unavailable" and "secret" not in caught.value.message
    records.close()


def test_without_a_database_reports_read_the_journal(tmp_path: Path) -> None:
    records = Records(Journal(tmp_path))
    records.start()
    for record in (answer(2), answer(1), answer(2), event(1), answer(3, version=2)):
        records.append(record)
    assert list(records.answers("tone", 1)) == [answer(1), answer(2)]
    assert list(records.events("tone", 1)) == [event(1)]
    assert (records.state, records.pending) == ("off", 0) and records.flush()
    records.close()


def settings(**values: Any) -> Settings:
    return load_settings({f"experiments_{name}": value for name, value in values.items()})


def test_no_folder_no_records() -> None:
    assert open_records(settings()) is None
    with pytest.raises(SettingsError, match="--experiments-journal DIR"):
        settings(db="sqlite:///x.sqlite")


def test_sqlite_in_the_folder_is_the_default(tmp_path: Path) -> None:
    records = open_records(settings(journal=tmp_path / "a" / "b", text=True, fsync=True))
    assert records is not None and records.with_text and records.journal.fsync
    records.append(answer(1))
    records.start()
    assert list(records.answers("tone", 1)) == [answer(1)]
    records.close()
    assert (tmp_path / "a" / "b" / "records.sqlite").is_file()


def test_without_the_extra_a_url_is_an_error_and_the_journal_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        store, "find_spec", lambda name: None if name == "sqlalchemy" else real(name)
    )
    with pytest.raises(ValueError, match=r"pip install 'pilothouse\[experiments\]'"):
        open_records(settings(journal=tmp_path, db="sqlite:///x.sqlite"))
    records = open_records(settings(journal=tmp_path, retention_days=3))
    assert records is not None and records.database is None and records.journal.keep_days == 3
    assert "stay in" in caplog.text
    records.close()


def test_a_folder_that_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot write --experiments-journal"):
        open_records(settings(journal=tmp_path / "file"))
    records = open_records(settings(journal=tmp_path))
    assert records is not None
    with pytest.raises(ValueError, match="belongs to another server"):
        open_records(settings(journal=tmp_path))
    records.close()


def test_a_journal_from_before_a_crash_is_read_where_it_is_torn(url: str, tmp_path: Path) -> None:
    folder = tmp_path / "journal"
    folder.mkdir()
    torn = encode(answer(2))[:-20]
    (folder / "000000000001.jsonl").write_bytes(encode(answer(1)) + torn)
    (folder / "000000000002.jsonl").write_bytes(encode(answer(1)) + encode(answer(3)))
    records = make_records(folder, url)
    records.start()
    assert list(records.answers("tone", 1)) == [answer(1), answer(3)]
    assert (records.pending, records.lost) == (0, 0)
    records.close()
