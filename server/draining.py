"""Stopping without losing a reply.

The first SIGTERM or SIGINT stops admission: `/ready` and new requests answer 503, so that load
balancers go elsewhere, while replies under way go on. When none is left, or their time is up, the
engine stops (which tells whoever still waits) and the server ends. A second signal ends it at once.
"""

from __future__ import annotations

import asyncio
import logging
import time
from types import FrameType

import uvicorn

from server.hosting import Host

logger = logging.getLogger(__name__)

FAREWELL_SECONDS = 5
"""For sending the last errors and closing connections, when the engine has stopped."""


class DrainingServer(uvicorn.Server):
    """uvicorn, with a time between a signal and the end.

    Args:
        patience: seconds that replies under way may take after the first signal.
    """

    def __init__(self, config: uvicorn.Config, host: Host, patience: float) -> None:
        config.timeout_graceful_shutdown = FAREWELL_SECONDS
        super().__init__(config)
        self.host = host
        self.patience = patience
        self._until: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._until is not None:
            super().handle_exit(sig, frame)
            return
        logger.info("stopping: no new requests, %g s for those under way", self.patience)
        self.host.draining = True
        self._until = time.monotonic() + self.patience

    async def on_tick(self, counter: int) -> bool:
        """uvicorn's ten times a second."""
        if self._until is not None and not self.should_exit:
            if not self.server_state.tasks:
                self.should_exit = True
            elif time.monotonic() > self._until:
                logger.warning("%d requests did not end in time", len(self.server_state.tasks))
                await asyncio.to_thread(self.host.close)
                self.should_exit = True
        return await super().on_tick(counter)
