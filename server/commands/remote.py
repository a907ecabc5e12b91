"""Requests of commands to a running server."""

from __future__ import annotations

import argparse
import json
import os
import urllib.error
import urllib.request
from http.client import HTTPResponse
from typing import Any, cast

KEY_VARIABLE = "PILOTHOUSE_KEY"


def add_key(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--key", default=os.environ.get(KEY_VARIABLE), help=f"default: ${KEY_VARIABLE}"
    )


def base_of(url: str) -> str:
    """The server's address, without `/v1` at its end. Raises ValueError."""
    base = url.rstrip("/").removesuffix("/v1")
    if not base.startswith(("http://", "https://")):
        raise ValueError(f"--url {url}: write http://host:port")
    return base


def request(
    base: str, path: str, *, key: str | None, body: Any = None, timeout: float | None = 60
) -> HTTPResponse:
    """The answer to a GET, or with `body` a POST. Raises ValueError with what the server says is
    wrong, or where there is no server.

    Args:
        timeout: seconds that the server may be silent; None: any time.
    """
    data = None if body is None else json.dumps(body).encode()
    asked = urllib.request.Request(f"{base}{path}", data)
    if body is not None:
        asked.add_header("Content-Type", "application/json")
    if key:
        asked.add_header("Authorization", f"Bearer {key}")
    try:
        return cast(HTTPResponse, urllib.request.urlopen(asked, timeout=timeout))
    except urllib.error.HTTPError as error:
        with error:
            raise ValueError(f"{base}: {_told(error)}") from None
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise ValueError(f"cannot reach {base}: {reason}; is the server running there?") from None


def _told(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.loads(error.read())["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP {error.code}"
