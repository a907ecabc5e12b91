"""Server-sent events, and the certainty that somebody still listens.

Starlette's own streaming response leaves its generator hanging where a client goes away between
two events, and under some servers does not notice at all until it writes. A request that nobody
reads must free its slot at once, queued or not.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from server.errors import ApiError, InternalError

logger = logging.getLogger(__name__)

T = TypeVar("T")

HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
DONE = "data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
"""A comment, which readers of events skip."""
SILENCE_SECONDS = 15.0
"""After which a comment is sent, since proxies close what is silent: a request may wait long."""


class ClientGoneError(Exception):
    """The client went away before its answer was ready."""


def event(data: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def guarded(events: AsyncGenerator[str, None], name: str) -> AsyncGenerator[str, None]:
    """The events, an error event if they break off, and `[DONE]`."""
    try:
        async with aclosing(events):
            async for item in events:
                yield item
    except ApiError as error:
        yield event(error.envelope)
    except Exception:
        logger.exception("%s failed", name)
        yield event(InternalError("Something broke on the server.").envelope)
    yield DONE


async def unless_gone(work: Awaitable[T], receive: Receive) -> T:
    """The result of `work`, which is cancelled when the client goes away.

    Raises ClientGoneError then. The request's body must have been read.
    """
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        return working.result()
    finally:
        working.cancel()
        gone.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


class EventStream(StreamingResponse):
    """Sends events until they end or the client goes away.

    Args:
        events: read by one task, and closed whatever happens.
        on_close: called last, even where not one event was read.
    """

    def __init__(
        self,
        events: AsyncGenerator[str, None],
        on_close: Callable[[], Awaitable[None]],
        headers: Mapping[str, str],
    ) -> None:
        super().__init__(events, headers={**HEADERS, **headers}, media_type="text/event-stream")
        self._events = events
        self._on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(self._send_all(send), receive)
        except (ClientGoneError, OSError):
            pass  # nobody is left to be told
        finally:
            await self._events.aclose()
            await self._on_close()

    async def _send_all(self, send: Send) -> None:
        """The events, each one message, and comments between them."""
        loop, open_, last = asyncio.get_running_loop(), False, 0.0

        async def note(message: Message) -> None:
            nonlocal open_, last
            open_, last = bool(message.get("more_body", True)), loop.time()
            await send(message)

        async def keep_alive() -> None:
            while True:
                await asyncio.sleep(SILENCE_SECONDS / 4)
                if open_ and loop.time() >= last + SILENCE_SECONDS:
                    comment = {"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True}
                    await note(comment)

        last = loop.time()
        beat = asyncio.create_task(keep_alive())
        try:
            await self.stream_response(note)
        finally:
            beat.cancel()
            await asyncio.gather(beat, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
