"""The web page at `/`: files built from `server/web`, read once and served as they are.

They hold nothing of what is served here, so nobody needs a key for them; what the page shows it
asks of the API, with the key that its user types in.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastapi import FastAPI, Request
from starlette.responses import Response

from server.errors import NotFoundError

BUILT = Path(__file__).parent / "web" / "dist"
PATHS = {"/": "index.html", "/licences.txt": "licences.txt"}
ASSETS = "/assets/"
"""Below it each name holds a digest of its content, which therefore never changes."""

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self'",
        "font-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        # No script may make markup of text, whatever a model says.
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
    ".woff2": "font/woff2",
}


@dataclass(frozen=True)
class _File:
    content: bytes
    type: str
    tag: str

    @classmethod
    def read(cls, path: Path) -> _File:
        content = path.read_bytes()
        tag = hashlib.sha256(content).hexdigest()[:32]
        return cls(content, _TYPES[path.suffix], f'"{tag}"')


def is_page(path: str) -> bool:
    """True for paths of the page's files, which need no key."""
    return path in PATHS or path.startswith(ASSETS)


def add_page(app: FastAPI, built: Path = BUILT) -> None:
    """Add the page and its assets. Raises FileNotFoundError where it was not built."""
    pages = {path: _File.read(built / name) for path, name in PATHS.items()}
    assets = {file.name: _File.read(file) for file in sorted((built / "assets").iterdir())}

    def answer(request: Request, file: _File, caching: str) -> Response:
        headers = {
            "Cache-Control": caching,
            "Content-Security-Policy": POLICY,
            "Cross-Origin-Opener-Policy": "same-origin",
            "ETag": file.tag,
        }
        if file.tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(file.content, media_type=file.type, headers=headers)

    async def page(request: Request) -> Response:
        return answer(request, pages[request.url.path], "no-cache")

    for path in PATHS:
        app.add_api_route(path, page, methods=["GET", "HEAD"], include_in_schema=False)

    @app.api_route(ASSETS + "{name}", methods=["GET", "HEAD"], include_in_schema=False)
    async def asset(name: str, request: Request) -> Response:
        if name not in assets:
            raise NotFoundError("The page has no such file.", code="not_found")
        return answer(request, assets[name], "public, max-age=31536000, immutable")
