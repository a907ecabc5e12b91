"""What the workers have read for a request, put together from the reports of each stage."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from typing import Any


class Readings:
    """The reports on one request.

    Args:
        stages: pipeline stages, each of which reports what it has.
    """

    def __init__(self, key: str, stages: int) -> None:
        self.key = key
        self.failed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        """Why its edits could not be applied."""
        self.checks: list[list[str]] = []
        """What each worker found wrong in each step (self-test)."""
        self._stages = stages
        self._parts: dict[int, list[Mapping[str, float]]] = {}
        self._changed = asyncio.Event()

    def take(self, report: Mapping[str, Any]) -> None:
        if "failed" in report:
            if not self.failed.done():
                self.failed.set_result(report["failed"])
        elif "problems" in report:
            self.checks.append(report["problems"])
        else:
            parts = self._parts.setdefault(report["reply"], [])
            if len(parts) < self._stages:  # a resumed request may report again
                parts.append(report["read"])
        self._changed.set()

    async def of(self, reply: int) -> dict[str, float]:
        """What was read where the reply's token of this number was chosen, by name."""
        while len(self._parts.get(reply, ())) < self._stages:
            await self._change()
        parts = self._parts.pop(reply)
        merged = {name: value for part in parts for name, value in part.items()}
        return {**merged, "norm": max(part["norm"] for part in parts)}

    async def checked(self, number: int) -> list[str]:
        """What was found wrong, once there are so many results."""
        while len(self.checks) < number:
            await self._change()
        return [problem for problems in self.checks for problem in problems]

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()


class Inbox:
    """Hands reports to the requests they are about."""

    def __init__(self, stages: int) -> None:
        self._stages = stages
        self._keys = count()
        self._open: dict[str, Readings] = {}

    def take(self, report: Mapping[str, Any]) -> None:
        if (readings := self._open.get(report["key"])) is not None:  # else its request has gone
            readings.take(report)

    @contextmanager
    def opened(self) -> Iterator[Readings]:
        """Readings under a new key, for as long as a request runs."""
        readings = Readings(str(next(self._keys)), self._stages)
        self._open[readings.key] = readings
        try:
            yield readings
        finally:
            del self._open[readings.key]
