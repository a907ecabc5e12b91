"""A server process on the demo model, as `pilothouse serve` starts it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.server.test_keys_live import Server


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    """Starts servers with these flags, and ends what is left of them."""
    servers: list[Server] = []

    def start(*flags: object) -> Server:
        servers.append(Server("--prefix-cache-mib", 8, *flags))
        return servers[-1]

    yield start
    for server in servers:
        server.close()
