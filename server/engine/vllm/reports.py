"""How what the workers read comes back: ZMQ, from each of them straight to the server.

vLLM's own way back has no room for it, and asking the workers costs tens of milliseconds under
load. A message is one JSON list of reports, with a word in front that only this server's workers
know.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import shutil
import tempfile
import threading
from collections.abc import Callable
from typing import Any

import zmq
import zmq.asyncio

from server.engine.vllm.wire import Report

logger = logging.getLogger(__name__)

_LARGEST = 16 * 2**20
"""Bytes of a message: thousands of reports. Who sends longer ones is cut off."""


class Sender:
    """A worker's end. Used from any thread."""

    def __init__(self, address: str, word: str) -> None:
        self._word = word.encode()
        self._lock = threading.Lock()
        self._socket: Any = zmq.Context.instance().socket(zmq.PUSH)
        self._socket.setsockopt(zmq.LINGER, 0)  # a worker's end waits for nobody
        self._socket.setsockopt(zmq.SNDHWM, 0)  # nor does a step, however busy the server is
        self._socket.connect(address)

    def __call__(self, reports: list[Report]) -> None:
        with self._lock:
            self._socket.send_multipart([self._word, json.dumps(reports).encode()])

    def close(self) -> None:
        with self._lock:
            self._socket.close()


class Receiver:
    """The server's end, on an event loop.

    Args:
        take: gets every report, on the loop.
        host: of this machine as workers on others see it; None where all are on this one.
    """

    def __init__(self, take: Callable[[Report], None], host: str | None = None) -> None:
        self.word = secrets.token_hex(16)
        self._take = take
        self._folder = None if host else tempfile.mkdtemp(prefix="pilothouse-")
        self._context: zmq.asyncio.Context = zmq.asyncio.Context()
        self._socket: Any = self._context.socket(zmq.PULL)
        self._socket.setsockopt(zmq.MAXMSGSIZE, _LARGEST)
        self._socket.bind(f"tcp://{host}:*" if host else f"ipc://{self._folder}/reports")
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while True:
            word, *body = await self._socket.recv_multipart()
            if not secrets.compare_digest(word, self.word.encode()) or len(body) != 1:
                logger.warning("a message that is not of this server's workers was dropped")
                continue
            try:
                for report in json.loads(body[0]):
                    self._take(report)
            except Exception:  # or all requests after it would wait for their scores
                logger.exception("a report of the workers could not be read")

    def close(self) -> None:
        self._task.cancel()
        self._context.destroy(linger=0)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
