"""Many streaming clients over plain sockets, in a process of their own.

A client library would cost more than what is measured here: a line is stamped as it comes and
looked at when all is over.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Answer:
    """One streamed reply. Times are of `time.monotonic()`, which all processes share.

    Args:
        id: as the server calls it.
        pieces: when each piece of text came.
        tokens: of the reply, as the server counts them.
    """

    id: str
    start: float
    pieces: list[float]
    tokens: int

    @property
    def first(self) -> float:
        """Seconds to the first piece of text."""
        return self.pieces[0] - self.start


class Clients:
    """A process that sends requests when it is told to; use it in a `with`."""

    def __enter__(self) -> Self:
        command = [sys.executable, "-m", "tests.benchmarks.client"]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def __call__(
        self, address: str, bodies: Sequence[Mapping[str, Any]], at_once: int
    ) -> list[Answer]:
        """Answers to all of these chat requests, `at_once` of them under way at any time."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps([address, bodies, at_once]), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the clients failed; see above")
        return [Answer(**answer) for answer in json.loads(line)]


async def _ask(host: str, port: int, body: Mapping[str, Any]) -> Answer:
    content = json.dumps({**body, "stream": True}).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    start = time.monotonic()
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(head.encode() + content)
    lines: list[tuple[float, bytes]] = []
    while line := await reader.readline():
        lines.append((time.monotonic(), line))
    writer.close()
    return _read(start, lines)


def _read(start: float, lines: list[tuple[float, bytes]]) -> Answer:
    if b" 200 " not in lines[0][1]:
        raise RuntimeError(b"".join(line for _, line in lines).decode())
    name, tokens, pieces = "", 0, []
    for when, line in lines:
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line.removeprefix(b"data: "))
        if "error" in event:
            raise RuntimeError(line.decode())
        name = event["id"]
        tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
        if any(choice["delta"].get("content") for choice in event["choices"]):
            pieces.append(when)
    return Answer(name, start, pieces, tokens)


async def _ask_all(address: str, bodies: Sequence[Mapping[str, Any]], at_once: int) -> list[Answer]:
    url = urlsplit(address)
    assert url.hostname is not None and url.port is not None
    host, port = url.hostname, url.port
    answers: list[Answer] = []

    async def work(queue: Iterator[Mapping[str, Any]]) -> None:
        for body in queue:
            answers.append(await _ask(host, port, body))

    queue = iter(bodies)
    await asyncio.gather(*(work(queue) for _ in range(at_once)))
    return answers


if __name__ == "__main__":
    for job in sys.stdin:
        print(json.dumps([asdict(answer) for answer in asyncio.run(_ask_all(*json.loads(job)))]))
        sys.stdout.flush()
