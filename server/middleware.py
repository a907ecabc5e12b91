"""Around every request: its id, limits on its body, the HTTP metrics, and an answer to errors
nobody foresaw.

Pure ASGI, so that streams pass through untouched and a client's disconnect reaches the endpoint.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import BodyTooLargeError, InternalError, SlowBodyError, error_response
from server.logs import current_request
from server.metrics import Metrics

logger = logging.getLogger(__name__)

BODY_SECONDS = 30.0
"""For a body, and one more for each `BODY_BYTES_PER_SECOND`: a connection that sends a byte now and
then must not be kept for ever."""
BODY_BYTES_PER_SECOND = 16 * 1024
_SANE_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
_METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}


class RequestMiddleware:
    """Gives each request an id (the client's own `X-Request-Id` if sane) and counts it.

    A body of more than `max_body_bytes` is a 413: at once where its length is announced, else
    after that many bytes. One that comes too slowly is a 408.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, max_body_bytes: int) -> None:
        self.app = app
        self.metrics = metrics
        self.max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        since = time.perf_counter()
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _SANE_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"
        scope.setdefault("state", {}).update(request_id=request_id, arrived=since)
        current_request.set(request_id)
        status = received = 0
        whole = False
        too_large = BodyTooLargeError(
            f"The body is larger than {self.max_body_bytes} bytes (--max-body-bytes)."
        )

        async def receive_limited() -> Message:
            nonlocal received, whole
            if whole:  # what comes now is only that the client goes away
                return await receive()
            left = since + BODY_SECONDS + received / BODY_BYTES_PER_SECOND - time.perf_counter()
            try:
                async with asyncio.timeout(left):
                    message = await receive()
            except TimeoutError:
                raise SlowBodyError(
                    "The body did not come in time; send it in one go.",
                    headers={"Connection": "close"},  # what still comes of it is no request
                ) from None
            received += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if received > self.max_body_bytes:
                raise too_large
            return message

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            announced = Headers(scope=scope).get("content-length", "")
            if announced.isdigit() and int(announced) > self.max_body_bytes:
                raise too_large
            await self.app(scope, receive_limited, send_marked)
        except BodyTooLargeError as error:
            if not status:
                self.metrics.rejections.labels(error.reason).inc()
                await error_response(error)(scope, receive, send_marked)
        except Exception:
            logger.exception("request %s failed", request_id)
            if status:  # too late for an answer; the server must drop the connection
                raise
            broken = InternalError(
                "Something broke on the server. The request id finds it in the log."
            )
            await error_response(broken)(scope, receive, send_marked)
        finally:
            # The path as the route declares it: a raw path would be a label without bounds.
            route = getattr(scope.get("route"), "path", "unmatched")
            method = scope["method"] if scope["method"] in _METHODS else "other"
            label = f"{status // 100}xx" if status else "aborted"
            self.metrics.http_requests.labels(route, method, label).inc()
            elapsed = time.perf_counter() - since
            self.metrics.http_duration.labels(route, method).observe(elapsed)
