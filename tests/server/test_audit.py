"""The audit log keeps its order and its file, and fails nothing but itself."""

from __future__ import annotations

import json
import logging
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from server.audit import AuditLog


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines() if line]


def test_records_are_lines_in_order_and_only_the_owner_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path)
    for i in range(500):
        log.write(i=i, text="a\nb \ud800 é")
    log.close()
    assert [line["i"] for line in lines(path)] == list(range(500))
    assert lines(path)[0]["text"] == "a\nb \ud800 é"
    assert lines(path)[0]["time"].endswith("+00:00") and lines(path)[0]["red_team"] is False
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    log.write(i=500)  # it starts again by itself
    log.close()
    assert len(lines(path)) == 501


def test_a_file_that_was_moved_away_gets_nothing_more(tmp_path: Path) -> None:
    path, old = tmp_path / "audit.jsonl", tmp_path / "audit.jsonl.1"
    log = AuditLog(path)
    log.write(i=0)
    assert log.flush()
    path.rename(old)
    log.write(i=1)
    log.reopen()
    log.write(i=2)
    log.close()
    assert [line["i"] for line in lines(old)] == [0, 1]
    assert [line["i"] for line in lines(path)] == [2]


def test_a_full_disk_costs_lines_which_are_counted_and_logged_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "audit.jsonl"
    lost: list[int] = []
    log = AuditLog(path, on_lost=lambda: lost.append(1))
    log.write(i=0)
    assert log.flush()
    real = os.write
    room = [7, 0, 0]

    def full(descriptor: int, data: bytes) -> int:
        if left := room.pop(0):
            return real(descriptor, data[:left])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with caplog.at_level(logging.ERROR):
        for i in range(1, 4):
            log.write(i=i)
        assert log.flush()
    monkeypatch.setattr(os, "write", real)
    log.write(i=4)
    log.close()
    assert len(lost) == 3
    assert len([r for r in caplog.records if "lines are lost" in r.getMessage()]) == 1
    whole = path.read_text().splitlines()
    assert [json.loads(line)["i"] for line in (whole[0], whole[-1])] == [0, 4]


def test_a_disk_that_hangs_costs_lines_and_not_memory(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    lost: list[int] = []
    log = AuditLog(path, on_lost=lambda: lost.append(1), max_pending=10)
    try:
        for _ in range(1000):  # more than a pipe and the queue hold
            log.write(text="x" * 4096)
        assert len(lost) >= 900
    finally:
        path.unlink()  # from here on the name is that of a file
        os.close(reader)  # the writer gets EPIPE and comes free
        log.close()


def test_without_a_file_only_red_team_uses_are_noted_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    log = AuditLog()
    with caplog.at_level(logging.INFO):
        log.write(profile="bold")
        log.write(profile="unbound", red_team=True)
    log.close()
    (record,) = caplog.records
    assert '"unbound"' in record.getMessage()


def test_a_file_that_cannot_be_written_is_an_error_at_start(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        AuditLog(tmp_path / "none" / "audit.jsonl")
