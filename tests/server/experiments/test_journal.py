"""The journal keeps what it was given, in one write, and knows a torn line from a whole one."""

from __future__ import annotations

import logging
import os
import resource
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.experiments.journal import (
    Journal,
    JournalInUseError,
    JournalReader,
    checked,
    encode,
    parse,
)
from tests.server.experiments.records import answer, event


def everything(reader: JournalReader, most: int = 1000) -> list[Any]:
    found: list[Any] = []
    while (batch := reader.read(most)).lines:
        found += [record for record, _ in batch.records]
    return found


def test_records_come_back_in_order_and_only_the_owner_reads_them(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "journal"
    journal = Journal(folder)
    expected = [answer(1, reply="a\nb\r\u2028 é"), event(2), answer(3)]
    for record in expected:
        journal.append(record)
    assert list(journal.read()) == expected == everything(JournalReader(journal), most=2)
    (segment,) = journal.segments()
    assert stat.S_IMODE(segment.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    journal.close()


def test_a_record_is_one_write_to_a_file_for_appending(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    real, writes = os.write, []

    def write(file: int, data: bytes) -> int:
        assert fcntl.fcntl(file, fcntl.F_GETFL) & os.O_APPEND
        writes.append(data)
        return real(file, data)

    journal = Journal(tmp_path)
    monkeypatch.setattr("server.experiments.journal.os.write", write)
    journal.append(answer(1))
    journal.append(answer(2, reply="x" * 100_000))
    monkeypatch.undo()
    assert writes == [encode(answer(1)), encode(answer(2, reply="x" * 100_000))]
    journal.close()


def test_fsync_waits_for_the_disk_at_each_record_and_only_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for fsync in (False, True):
        journal = Journal(tmp_path / str(fsync), fsync=fsync)
        journal.append(answer(0))
        synced: list[int] = []
        monkeypatch.setattr("server.experiments.journal.os.fsync", synced.append)
        journal.append(answer(1))
        monkeypatch.undo()
        assert len(synced) == fsync
        journal.close()


@given(st.data())
def test_a_journal_cut_off_anywhere_gives_all_records_before_the_cut(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    journal = Journal(tmp_path_factory.mktemp("journal"))
    records = [answer(i, reply="é" * (i % 5)) for i in range(6)]
    for record in records:
        journal.append(record)
    (segment,) = journal.segments()
    journal.close()
    whole = segment.read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    segment.write_bytes(whole[:cut])
    again = Journal(journal.folder)
    kept = whole[:cut].count(b"\n")
    assert again.lines == kept
    assert everything(JournalReader(again)) == records[:kept]
    again.append(answer(9))  # never to the torn file
    assert everything(JournalReader(again)) == [*records[:kept], answer(9)]
    again.close()


@given(st.data())
def test_a_damaged_line_costs_itself_only(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    journal = Journal(tmp_path_factory.mktemp("journal"))
    records = [answer(i) for i in range(4)]
    for record in records:
        journal.append(record)
    (segment,) = journal.segments()
    whole = bytearray(segment.read_bytes())
    where = data.draw(st.integers(0, len(whole) - 1))
    damage = data.draw(st.integers(0, 255).filter(lambda byte: byte not in (whole[where], 10)))
    if whole[where] == 10:  # two lines become one
        hit = {whole[:where].count(b"\n"), whole[:where].count(b"\n") + 1}
    else:
        hit = {whole[:where].count(b"\n")}
    whole[where] = damage
    segment.write_bytes(whole)
    expected = [record for i, record in enumerate(records) if i not in hit]
    assert everything(JournalReader(journal)) == expected
    journal.close()


@given(st.text(st.characters()), st.floats(), st.lists(st.text(st.characters())))
def test_any_text_and_number_is_made_storable(text: str, number: float, texts: list[str]) -> None:
    for record in (
        answer(1, reply=text, refusal_score=number),
        event(1, detail={"a": {text: number}, "b": texts}),
    ):
        line = encode(record)
        assert line.count(b"\n") == 1 and line.endswith(b"\n")
        payload = checked(line)
        assert payload is not None
        again = parse(payload)
        assert encode(again) == line
        assert "\x00" not in str(again.to_json()) and "nan" not in str(again.to_json().values())
        str(again.to_json()).encode()  # no halves of surrogate pairs


def test_segments_end_at_their_size_and_are_read_across(tmp_path: Path) -> None:
    journal = Journal(tmp_path, segment_bytes=1500)
    reader = JournalReader(journal)
    found, ended = [], []
    for i in range(20):
        journal.append(answer(i))
        batch = reader.read(3)
        found += [record for record, _ in batch.records]
        ended += batch.ended
        assert journal.live not in batch.ended
    assert found == [answer(i) for i in range(20)]
    assert len(journal.segments()) > 5 and ended == journal.segments()[:-1]
    journal.close()


def test_a_folder_belongs_to_one_process(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    with pytest.raises(JournalInUseError, match="give each its own"):
        Journal(tmp_path)
    journal.append(answer(1))
    journal.close()
    other = Journal(tmp_path)
    journal.append(answer(2))  # too late: the other one owns it
    assert journal.lost == 1 and other.lines == 1
    other.close()
    journal.append(answer(3))
    assert journal.lost == 1 and not journal.failing
    assert list(other.read()) == [answer(1), answer(3)]
    journal.close()


def test_a_full_disk_costs_records_which_are_counted_and_logged_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lost: list[int] = []
    journal = Journal(tmp_path, on_lost=lambda: lost.append(1))
    journal.append(answer(0))
    real, room = os.write, [70, 0, 0]

    def full(file: int, data: bytes) -> int:
        if left := room.pop(0):
            return real(file, data[:left])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("server.experiments.journal.os.write", full)
    with caplog.at_level(logging.ERROR):
        for i in range(1, 4):
            journal.append(answer(i))
    monkeypatch.undo()
    assert journal.lost == len(lost) == 3 and journal.failing
    assert len([r for r in caplog.records if "are lost" in r.getMessage()]) == 1
    journal.append(answer(4))
    assert not journal.failing and journal.lines == 2
    assert everything(JournalReader(journal)) == [answer(0), answer(4)]
    assert len(journal.segments()) == 2  # the attempts left no empty files
    journal.close()


def test_a_limit_on_file_sizes_never_tears_a_record(tmp_path: Path) -> None:
    """Real short writes and errors of the kernel, which a full disk gives as well."""
    journal = Journal(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        for i in range(10):
            journal.append(answer(i))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert journal.lost > 0 and journal.lost + journal.lines == 10
    assert len(list(journal.read())) == journal.lines
    for segment in journal.segments():
        assert segment.read_bytes().endswith(b"\n")
    journal.close()


def test_what_json_cannot_hold_is_lost_and_raises_nothing(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append(event(1, detail={"of": object()}))
    journal.append(None)  # type: ignore[arg-type]
    assert journal.lost == 2 and not journal.lines
    journal.close()


def test_a_line_of_another_version_is_handed_back_whole(tmp_path: Path) -> None:
    import json
    import zlib

    payload = json.dumps({"answer": {**answer(1).to_json(), "colour": "red"}}).encode()
    line = b"%08x %b\n" % (zlib.crc32(payload), payload)
    (tmp_path / "000000000007.jsonl").write_bytes(line + encode(answer(2)))
    journal = Journal(tmp_path)
    batch = JournalReader(journal).read(10)
    assert [record for record, _ in batch.records] == [answer(2)]
    ((unreadable, why),) = batch.unreadable
    assert unreadable == line and "colour" in why and batch.lines == 2
    journal.close()


def test_a_reader_that_fails_reads_the_same_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal(tmp_path, segment_bytes=1)
    for i in range(3):
        journal.append(answer(i))
    reader = JournalReader(journal)
    real = Path.open

    def broken(path: Path, *arguments: Any) -> Any:
        if path == journal.segments()[1]:
            raise OSError(5, "Input/output error")
        return real(path, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", broken)
        with pytest.raises(OSError):
            reader.read(10)
    assert everything(reader) == [answer(i) for i in range(3)]
    journal.close()


def test_a_journal_without_database_forgets_old_segments(tmp_path: Path) -> None:
    journal = Journal(tmp_path, segment_bytes=1, keep_days=1)
    journal.append(answer(1))
    journal.append(answer(2))
    os.utime(journal.segments()[0], (0, 0))
    journal.append(answer(3))
    assert list(journal.read()) == [answer(2), answer(3)]
    journal.close()


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        Journal(tmp_path / "file")
