"""The audit log: one JSON line for each request that asked for something, in order.

A thread of its own writes, so that a slow disk delays no answer; a full or broken one costs lines,
never answers, and is counted and logged. The file is opened for appending and again at SIGHUP, as
logrotate wants it.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

logger = logging.getLogger(__name__)

MAX_PENDING = 10_000
"""Lines that may wait for the disk; more are lost, not kept in memory without end."""

_Item = bytes | threading.Event | Literal["reopen", "stop"]


class AuditLog:
    """Appends records to a file, which only its owner can read.

    Args:
        path: without one, uses of red-team profiles go to the server's log and nothing else does.
        with_text: keep prompts and replies in the records.
        on_lost: called, in any thread, for each line that could not be written.

    Raises OSError if the file cannot be written.
    """

    def __init__(
        self,
        path: Path | None = None,
        *,
        with_text: bool = False,
        on_lost: Callable[[], None] = lambda: None,
        max_pending: int = MAX_PENDING,
    ) -> None:
        self.path = path
        self.with_text = with_text
        self.on_lost = on_lost
        self._items: queue.Queue[_Item] = queue.Queue(max_pending)
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()
        self._file: int | None = None
        self._torn = self._failing = False
        if path is not None:
            os.close(_open(path))

    def write(self, *, red_team: bool = False, **record: Any) -> None:
        """Note what happened. Returns at once and raises nothing."""
        record = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **record}
        record["red_team"] = red_team
        if self.path is None:
            if red_team:
                logger.warning("red-team profile used: %s", json.dumps(record))
            return
        # ASCII, so that text with halves of surrogate pairs can be kept too.
        self._put(json.dumps(record).encode() + b"\n")

    def reopen(self) -> None:
        """Go on in a new file, if the old one was moved away."""
        if self.path is not None:
            self._put("reopen")

    def flush(self, seconds: float = 5.0) -> bool:
        """Wait until all that was noted is written; False if that takes too long."""
        if self._thread is None:
            return True
        written = threading.Event()
        self._put(written)
        return written.wait(seconds)

    def close(self, seconds: float = 5.0) -> None:
        """Write what is left and stop. A later `write` starts again."""
        with self._starting:
            thread, self._thread = self._thread, None
        if thread is None:
            return
        try:
            self._items.put("stop", timeout=seconds)
        except queue.Full:
            logger.error("audit log: the disk is too slow; lines are lost")
            return
        thread.join(seconds)

    def _put(self, item: _Item) -> None:
        with self._starting:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="audit-log", daemon=True)
                self._thread.start()
        try:
            self._items.put_nowait(item)
        except queue.Full:
            if isinstance(item, bytes):
                self._lost("the disk is too slow")

    def _run(self) -> None:
        while (item := self._items.get()) != "stop":
            if isinstance(item, bytes):
                self._append(item)
            elif isinstance(item, threading.Event):
                item.set()
            else:
                self._close_file()
                self._torn = False
        self._close_file()

    def _append(self, line: bytes) -> None:
        assert self.path is not None
        try:
            if self._file is None:
                self._file = _open(self.path)
            # A line that a full disk cut off must not spoil the next one.
            whole = b"\n" + line if self._torn else line
            written = os.write(self._file, whole)
            if written:
                self._torn = not whole[:written].endswith(b"\n")
            if written < len(whole):
                raise OSError("the line could not be written whole")
        except OSError as error:
            self._close_file()
            self._lost(error.strerror or str(error))
        else:
            self._failing = False

    def _lost(self, reason: str) -> None:
        self.on_lost()
        if not self._failing:  # once, not for each line
            logger.error("audit log %s: lines are lost: %s", self.path, reason)
        self._failing = True

    def _close_file(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _open(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
