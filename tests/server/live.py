"""A real uvicorn around a host, in a thread of this process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import Receive, Scope, Send

from server.app import create_app
from server.commands.serve import listen, url
from server.hosting import Host
from server.settings import Settings


@contextmanager
def live_server(host: Host, below: str = "") -> Iterator[str]:
    """The server's address, as long as it runs.

    Args:
        below: a path that a proxy in front would take away, as `/pilot`.
    """
    app = create_app(host)

    async def proxied(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            assert scope["path"].startswith(f"{below}/"), f"{scope['path']} is not below {below}"
            scope["path"] = scope["path"].removeprefix(below)
        await app(scope, receive, send)

    with listen(Settings(port=0)) as listener:
        server = uvicorn.Server(
            uvicorn.Config(proxied, log_config=None, timeout_graceful_shutdown=5)
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            wait_until(lambda: server.started)
            yield url(listener) + below
        finally:
            server.should_exit = True
            thread.join()


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)
