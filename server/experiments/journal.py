"""A local append-only journal: what the server knows of an answer before its client does.

One record is one line, written by one `write(2)` to a file opened with O_APPEND:

    <crc32 of the JSON, 8 hex digits> <JSON in ASCII>\n

What `append` has written when it returns survives a kill -9 of the process, since the kernel holds
it. It survives a loss of power once it is on the disk: at once with `fsync`, else when the database
has taken it over, which does commit to disk. A line that a crash or a full disk cut off fails its
checksum and is skipped by readers.

The files (segments) of a folder are numbered and belong to one process, which holds its lock. A
process never continues a file of another one, and a file with a torn end is never continued.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from server.experiments.records import AnswerRecord, EventRecord

logger = logging.getLogger(__name__)

Record = AnswerRecord | EventRecord

SEGMENT_BYTES = 16 * 2**20
DAY = 86400.0
REJECTED = "rejected.jsonl"
_SEGMENT = re.compile(r"\d{12}\.jsonl")
_UNSTORABLE = re.compile(r"[\x00\ud800-\udfff]")  # by one database or another


class JournalInUseError(ValueError):
    """Another process writes to the folder."""


class Journal:
    """Appends records to the segments of a folder, which only its owner can read.

    Args:
        fsync: wait for the disk at each record. This takes milliseconds, of the event loop too if
            that is where `append` is called.
        segment_bytes: a longer segment is ended, as is one older than a day.
        keep_days: ended segments older than this are deleted; for journals that no database
            takes over.
        on_lost: called, in any thread, for each record that could not be kept.

    Raises OSError if the folder cannot be written, JournalInUseError if another process does.
    """

    def __init__(
        self,
        folder: Path,
        *,
        fsync: bool = False,
        segment_bytes: int = SEGMENT_BYTES,
        keep_days: float | None = None,
        on_lost: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder = folder
        self.fsync = fsync
        self.segment_bytes = segment_bytes
        self.keep_days = keep_days
        self.on_lost = on_lost
        self.lost = 0
        self.failing = False
        self._lock = threading.Lock()
        self._file: int | None = None
        self._live: Path | None = None
        self._number = 0
        self._size = 0
        self._opened = 0.0
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(13, "Permission denied", str(folder))
        self._owner = FileLock(folder / "lock", blocking=False, thread_local=False)
        self._own()
        self.lines = sum(_count_lines(segment) for segment in self.segments())
        """Lines in the segments found at the start and written since."""

    @property
    def live(self) -> Path | None:
        """The segment that is being written."""
        return self._live

    def segments(self) -> list[Path]:
        """All segments, the oldest first."""
        return sorted(path for path in self.folder.iterdir() if _SEGMENT.fullmatch(path.name))

    def append(self, record: Record) -> None:
        """Keep a record. Raises nothing: what cannot be kept is counted in `lost` and logged."""
        try:
            line = encode(record)
            with self._lock:
                self._write(line)
        except Exception as error:
            if not self.failing:  # once, not for each record
                reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
                logger.error("journal %s: records of experiments are lost: %s", self.folder, reason)
            self.failing = True
            self._lose()
        else:
            self.failing = False

    def reject(self, line: bytes, reason: str) -> None:
        """Lay a record aside that no database will ever take, for people to look at."""
        path = self.folder / REJECTED
        with open(path, "ab", opener=_private) as file:
            file.write(line)
        logger.error("a record of experiments was laid aside in %s: %s", path, reason)
        self._lose()

    def read(self) -> Iterator[Record]:
        """Every record that is there, oldest first, as often as it was written."""
        for segment in self.segments():
            for line, _ in _lines(segment):
                if (payload := checked(line)) is not None:
                    yield parse(payload)

    def end_segment(self) -> None:
        """Write what comes next to a new segment."""
        with self._lock:
            self._end_segment()

    def close(self) -> None:
        """End the live segment and leave the folder to others. A later `append` takes it again."""
        with self._lock:
            self._end_segment()
            self._owner.release()

    def _lose(self) -> None:
        with self._lock:
            self.lost += 1
        self.on_lost()

    def _own(self) -> None:
        try:
            self._owner.acquire()
        except Timeout:
            raise JournalInUseError(
                f"the journal {self.folder} belongs to another server that runs; give each its own "
                "folder (--experiments-journal)"
            ) from None

    def _write(self, line: bytes) -> None:
        if self._file is not None and (
            self._size >= self.segment_bytes or time.monotonic() - self._opened > DAY
        ):
            self._end_segment()
        if self._file is None:
            self._begin_segment()
        assert self._file is not None
        try:
            written = os.write(self._file, line)
            if written < len(line):
                raise OSError(28, "the record could not be written whole")
            if self.fsync:
                os.fsync(self._file)
        except OSError:
            self._cut_segment()
            raise
        self._size += len(line)
        self.lines += 1

    def _begin_segment(self) -> None:
        if not self._owner.is_locked:
            self._own()
        known = self.segments()
        # No number twice: a reader that has read a segment to its end, and deleted it, looks at no
        # other of that name.
        self._number = max(self._number, int(known[-1].stem) if known else 0) + 1
        # Before the file exists, so that no reader takes it for an ended one.
        self._live = self.folder / f"{self._number:012}.jsonl"
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL
        try:
            self._file = os.open(self._live, flags, 0o600)
        except OSError:
            self._live = None
            raise
        self._size, self._opened = 0, time.monotonic()
        if self.fsync:
            _sync_folder(self.folder)
        if self.keep_days is not None:
            for segment in known:
                if segment.stat().st_mtime < time.time() - self.keep_days * DAY:
                    segment.unlink()

    def _cut_segment(self) -> None:
        """After a failed write: leave whole records only, and go on elsewhere."""
        assert self._file is not None and self._live is not None
        try:
            os.ftruncate(self._file, self._size)
            if self._size == 0:
                self._live.unlink()
        except OSError as error:
            logger.warning("journal %s has a torn end: %s", self._live, error.strerror)
        self._end_segment()

    def _end_segment(self) -> None:
        if self._file is not None:
            os.close(self._file)
        self._file = self._live = None


@dataclass
class Batch:
    """What was read at once.

    Args:
        records: with the line that held each.
        unreadable: whole lines that hold no record, and why.
        lines: how many lines were read, torn ones among them.
        ended: segments of which nothing is left to read.
    """

    records: list[tuple[Record, bytes]] = field(default_factory=list)
    unreadable: list[tuple[bytes, str]] = field(default_factory=list)
    lines: int = 0
    ended: list[Path] = field(default_factory=list)


class JournalReader:
    """Reads a journal from its oldest record on, once, while others append to it."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._at = ""
        self._offset = 0
        self._past = ""

    def read(self, most: int) -> Batch:
        """The next lines, at most so many; none if nothing new was written. After an OSError the
        next call reads the same again."""
        before = self._at, self._offset, self._past
        try:
            return self._read(most)
        except OSError:
            self._at, self._offset, self._past = before
            raise

    def _read(self, most: int) -> Batch:
        batch = Batch()
        segments = self._journal.segments()
        live = self._journal.live  # read after the list: what is in it and not live has ended
        for segment in segments:
            if segment.name <= self._past:
                continue
            if segment.name != self._at:
                self._at, self._offset = segment.name, 0
            for line, end in _lines(segment, self._offset):
                self._take(batch, line)
                self._offset = end
                if batch.lines == most:
                    return batch
            if segment == live:
                break
            self._past = segment.name
            batch.ended.append(segment)
        return batch

    def _take(self, batch: Batch, line: bytes) -> None:
        batch.lines += 1
        payload = checked(line)
        if payload is None:
            logger.warning("journal %s: skipped a torn line in %s", self._journal.folder, self._at)
            return
        try:
            batch.records.append((parse(payload), line))
        except ValueError as error:
            batch.unreadable.append((line, str(error)))


def encode(record: Record) -> bytes:
    """A record's line. Raises TypeError or ValueError for what JSON cannot hold."""
    kind = "answer" if isinstance(record, AnswerRecord) else "event"
    # ASCII, so that no line break hides in it.
    payload = json.dumps({kind: _storable(record.to_json())}, separators=(",", ":")).encode()
    return b"%08x %b\n" % (zlib.crc32(payload), payload)


def checked(line: bytes) -> bytes | None:
    """The JSON of a line, or None if the line is not as it was written."""
    checksum, _, payload = line.removesuffix(b"\n").partition(b" ")
    return payload if checksum == b"%08x" % zlib.crc32(payload) else None


def parse(payload: bytes) -> Record:
    """The record in a line's JSON. Raises ValueError for what another version wrote."""
    try:
        ((kind, values),) = json.loads(payload).items()
        kinds: dict[str, type[AnswerRecord] | type[EventRecord]] = {
            "answer": AnswerRecord,
            "event": EventRecord,
        }
        return kinds[kind].from_json(values)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"a record of another version of the server: {error}") from None


def _storable(value: Any) -> Any:
    """The value without what some database refuses: NUL, halves of surrogate pairs, NaN."""
    if isinstance(value, str):
        return _UNSTORABLE.sub("\ufffd", value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {_storable(str(key)): _storable(item) for key, item in value.items()}
    return [_storable(item) for item in value] if isinstance(value, list | tuple) else value


def _lines(segment: Path, offset: int = 0) -> Iterator[tuple[bytes, int]]:
    """Each whole line from an offset on, and where it ends."""
    try:
        with segment.open("rb") as file:
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return  # torn, or being written
                offset += len(line)
                yield line, offset
    except FileNotFoundError:
        return


def _count_lines(segment: Path) -> int:
    with segment.open("rb") as file:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(2**20), b""))


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
