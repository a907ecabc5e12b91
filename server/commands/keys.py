"""`pilothouse keys`: who may ask a server for what."""

from __future__ import annotations

import argparse
import json
import re
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

SUMMARY = "create, list or revoke the keys of a server"

_VERBS = {
    "create": "make a key and print its secret, once",
    "list": "one line per key",
    "revoke": "remove a key; a running server forgets it at the next SIGHUP",
}
_UNITS = {"m": timedelta(minutes=1), "h": timedelta(hours=1), "d": timedelta(days=1)}


def register(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, summary in _VERBS.items():
        command = verbs.add_parser(verb, help=summary, description=summary)
        without = "; without it, the entry is printed for the variable PILOTHOUSE_KEYS"
        command.add_argument(
            "--keys",
            type=Path,
            metavar="FILE",
            required=verb != "create",
            help="file of keys" + (without if verb == "create" else ""),
        )
        if verb != "list":
            command.add_argument("id", help="what logs call the key")
        if verb == "create":
            _register_options(command)


def _register_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--scope",
        action="append",
        choices=("chat", "admin", "metrics"),
        help="may be repeated (default: chat)",
    )
    command.add_argument(
        "--profile",
        action="append",
        metavar="NAME",
        help="profile that the key may use; may be repeated; '*' stands for all that are not "
        "red_team, which must be named (default: *)",
    )
    command.add_argument(
        "--expires", metavar="WHEN", help="a time such as 2027-01-31T12:00:00Z, or 90d, 12h, 30m"
    )
    for what in ("requests", "tokens"):
        command.add_argument(f"--{what}-per-minute", type=int, metavar="N")


def run(arguments: argparse.Namespace) -> int:
    from server import keyfile

    if arguments.verb == "revoke":
        keyfile.revoke_key(arguments.keys, arguments.id)
        print(f"revoked {arguments.id}; running servers forget it at SIGHUP")
        return 0
    if arguments.verb == "list":
        return _list(arguments.keys)
    options: dict[str, Any] = {
        "scopes": arguments.scope,
        "profiles": arguments.profile,
        "expires": expiry(arguments.expires) if arguments.expires else None,
        "requests_per_minute": arguments.requests_per_minute,
        "tokens_per_minute": arguments.tokens_per_minute,
    }
    given = {name: value for name, value in options.items() if value is not None}
    if arguments.keys is not None:
        secret = keyfile.create_key(arguments.keys, arguments.id, **given)
    else:
        key, secret = keyfile.make_key(arguments.id, **given)
        print(f"PILOTHOUSE_KEYS='{json.dumps([key.to_json()])}'", file=sys.stderr)
    print("This is shown only once; the server stores its hash.", file=sys.stderr)
    print(secret)
    return 0


def _list(path: Path) -> int:
    from server.keyfile import read_keys

    now = datetime.now(UTC)
    for key in read_keys(path).keys:
        until = "no end" if key.expires is None else f"until {key.expires:%Y-%m-%dT%H:%M:%SZ}"
        limits = [
            f"{limit} {what}/min"
            for limit, what in (
                (key.requests_per_minute, "requests"),
                (key.tokens_per_minute, "tokens"),
            )
            if limit is not None
        ]
        scopes, profiles = ",".join(sorted(key.scopes)), ",".join(key.profiles)
        words = [f"{key.id:24} {scopes:20} {profiles:24}", until, *limits]
        print("  ".join([*words, *(["expired"] if key.expired(now) else [])]))
    return 0


def expiry(text: str) -> str:
    """An ISO time in UTC, from one or from a time span from now on. Raises ValueError."""
    if span := re.fullmatch(r"(\d{1,6})([mhd])", text):
        when = datetime.now(UTC) + int(span[1]) * _UNITS[span[2]]
    else:
        try:
            when = datetime.fromisoformat(text)
        except ValueError:
            raise ValueError(
                f"--expires {text} is neither a time (2027-01-31T12:00:00Z) nor a span (90d, 12h)"
            ) from None
        if when.tzinfo is None:
            when = when.replace(tzinfo=UTC)
    if when <= datetime.now(UTC):
        raise ValueError(f"--expires {text} has passed already; such a key would open nothing")
    return when.astimezone(UTC).isoformat(timespec="seconds")
