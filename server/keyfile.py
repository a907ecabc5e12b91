"""Keys in a JSON file, which any number of processes may change at once."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from server.auth import Key, KeyRing, KeysError, hash_secret, new_secret, parse_keys
from server.whole_file import replace_file

LOCK_SECONDS = 30


def read_keys(path: Path) -> KeyRing:
    """The keys in a file. Raises KeysError."""
    try:
        text = path.read_text("utf-8")
    except FileNotFoundError:
        raise KeysError(
            f"there is no file of keys at {path}; make one with `pilothouse keys create ID --keys "
            f"{path}`"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise KeysError(f"cannot read the file of keys {path}: {reason}") from None
    return parse_keys(text, f"the file of keys {path}")


def create_key(path: Path, key_id: str, **options: object) -> str:
    """Add a key, and the file if there is none. Returns the secret, which is nowhere else.

    Args:
        options: the other fields of `Key`.

    Raises KeysError for an id that is taken.
    """
    key, secret = make_key(key_id, **options)
    with _locked(path):
        ring = read_keys(path) if path.exists() else KeyRing()
        if any(other.id == key_id for other in ring.keys):
            raise KeysError(f"there is a key {key_id!r} in {path} already; revoke it first")
        _write(path, [*ring.keys, key])
    return secret


def revoke_key(path: Path, key_id: str) -> None:
    """Take a key out of the file. Raises KeysError if it is not there."""
    with _locked(path):
        ring = read_keys(path)
        left = [key for key in ring.keys if key.id != key_id]
        if len(left) == len(ring.keys):
            known = ", ".join(key.id for key in ring.keys) or "none"
            raise KeysError(f"there is no key {key_id!r} in {path}; there is {known}")
        _write(path, left)


def make_key(key_id: str, **options: object) -> tuple[Key, str]:
    """A new key and its secret. Raises KeysError."""
    secret = new_secret()
    entry = {
        "id": key_id,
        "sha256": hash_secret(secret),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        **options,
    }
    (key,) = parse_keys(json.dumps([entry]), "the new key").keys
    return key, secret


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside the file, not the file itself, which is replaced by every change.
    lock = path.with_name(path.name + ".lock")
    try:
        with FileLock(lock, timeout=LOCK_SECONDS):
            yield
    except Timeout:
        raise KeysError(f"another process holds {lock}; try again when it is done") from None


def _write(path: Path, keys: Iterable[Key]) -> None:
    """Replace the file: readers see the old keys or the new ones."""
    text = json.dumps({"keys": [key.to_json() for key in keys]}, indent=2) + "\n"
    replace_file(path, text)
