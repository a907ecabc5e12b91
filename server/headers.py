"""Headers for browsers: what they may do with a response, and which pages may ask for one."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.datastructures import MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

API_POLICY = "default-src 'none'; frame-ancestors 'none'"
DOCUMENTATION_POLICY = (
    "default-src 'none'; connect-src 'self'; frame-ancestors 'none'; worker-src blob:; "
    "script-src 'unsafe-inline' https://cdn.jsdelivr.net; "
    "style-src 'unsafe-inline' https://cdn.jsdelivr.net https://fonts.googleapis.com; "
    "font-src https://fonts.gstatic.com; "
    "img-src data: https://fastapi.tiangolo.com https://cdn.redoc.ly"
)
"""For FastAPI's pages, which load their scripts from elsewhere."""

DEFAULTS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    # Replies belong to one client, and probes and metrics are of one moment.
    "Cache-Control": "no-store",
}
EXPOSED = (
    "Retry-After",
    "X-Ignored-Fields",
    *(
        f"X-RateLimit-{what}-{of}"
        for of in ("Requests", "Tokens")
        for what in ("Limit", "Remaining", "Reset")
    ),
    "X-Request-Id",
    "X-Steering-Arm",
    "X-Steering-Experiment",
    "X-Steering-Fingerprint",
    "X-Steering-Profile",
)


class SecurityHeaders:
    """Adds to every response what it does not set itself.

    Args:
        documentation: paths of pages that need scripts.
    """

    def __init__(self, app: ASGIApp, documentation: frozenset[str] = frozenset()) -> None:
        self.app = app
        self.documentation = documentation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        page = scope["path"] in self.documentation
        policy = DOCUMENTATION_POLICY if page else API_POLICY

        async def send_safe(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in (*DEFAULTS.items(), ("Content-Security-Policy", policy)):
                    headers.setdefault(name, value)
            await send(message)

        await self.app(scope, receive, send_safe)


def cross_origin(app: ASGIApp, origins: Sequence[str]) -> CORSMiddleware:
    """The app for pages of these origins. Keys travel in a header, so cookies never do."""
    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=("GET", "POST", "DELETE"),
        allow_headers=("*",),  # official clients send a dozen of their own
        expose_headers=EXPOSED,
        max_age=600,
    )
