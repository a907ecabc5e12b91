"""`pilothouse experiments`: what an experiment on a running server has shown."""

from __future__ import annotations

import argparse
import json
import os
import urllib.error
import urllib.parse
import urllib.request

SUMMARY = "read the report of an experiment from a running server"


def register(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    report = verbs.add_parser("report", help="print an experiment's report")
    report.add_argument("name", help="of the experiment")
    report.add_argument(
        "--url", default="http://127.0.0.1:8000", help="of the server (default: %(default)s)"
    )
    report.add_argument("--version", type=int, help="of the experiment; default: the latest")
    report.add_argument(
        "--format", choices=("text", "json", "html"), default="text", help="default: text"
    )
    report.add_argument(
        "--key", default=os.environ.get("PILOTHOUSE_KEY"), help="default: $PILOTHOUSE_KEY"
    )


def run(arguments: argparse.Namespace) -> int:
    print(fetch_report(arguments).rstrip("\n"))
    return 0


def fetch_report(arguments: argparse.Namespace) -> str:
    """Raises ValueError with what the server says is wrong, or where there is no server."""
    query = {"format": arguments.format}
    if arguments.version is not None:
        query["version"] = str(arguments.version)
    name = urllib.parse.quote(arguments.name, safe="")
    base = arguments.url.rstrip("/").removesuffix("/v1")
    if not base.startswith(("http://", "https://")):
        raise ValueError(f"--url {arguments.url}: write http://host:port")
    address = f"{base}/v1/experiments/{name}/report?{urllib.parse.urlencode(query)}"
    request = urllib.request.Request(address)
    if arguments.key:
        request.add_header("Authorization", f"Bearer {arguments.key}")
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return str(response.read().decode())
    except urllib.error.HTTPError as error:
        raise ValueError(f"{base}: {_told(error)}") from None
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise ValueError(f"cannot reach {base}: {reason}; is the server running there?") from None


def _told(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.loads(error.read())["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP {error.code}"
