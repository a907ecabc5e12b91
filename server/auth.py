"""Keys: who may ask for what.

A key is a secret that its owner sends as `Authorization: Bearer ph-...`; of it only the SHA-256 is
ever stored. It has scopes, the profiles it may use, an end and limits. A secret is 32 random bytes,
so that a plain hash of it cannot be guessed.

`server.keyfile` keeps keys in a file, `server.access` asks them at every request.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from server.validation import describe, field_path

if TYPE_CHECKING:  # torch is slow to import, and `pilothouse keys` needs none of it
    from steering.profile import Profile

Scope = Literal["chat", "admin", "metrics"]

ALL_PROFILES = "*"
"""In a key's profiles: all that are not `red_team`."""

KEY_ID = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
PROFILE_NAME = r"[a-z0-9][a-z0-9._-]{0,63}"
"""As `steering.profile` has it; a name of another form is a slip, and permits nothing."""
SECRET_BYTES = 32


class KeysError(ValueError):
    """Keys that make no sense; the message says which and what to do."""


class Key(BaseModel):
    """What is known of a key. The secret is not.

    Args:
        id: what logs call it.
        sha256: of the secret, in hex.
        profiles: names; `*` stands for all that are not `red_team`, which must be named.
        expires: from then on the key is as good as none.
        tokens_per_minute: prompt and completion together.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: Annotated[str, Field(pattern=f"^{KEY_ID}$")]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    scopes: Annotated[frozenset[Scope], Field(min_length=1)] = frozenset({"chat"})
    profiles: tuple[Annotated[str, Field(pattern=rf"^(\*|{PROFILE_NAME})$")], ...] = (ALL_PROFILES,)
    created: AwareDatetime | None = None
    expires: AwareDatetime | None = None
    requests_per_minute: Annotated[int, Field(ge=1)] | None = None
    tokens_per_minute: Annotated[int, Field(ge=1)] | None = None

    def expired(self, now: datetime) -> bool:
        return self.expires is not None and now >= self.expires

    def permits(self, profiles: Iterable[Profile]) -> bool:
        """True if the key may use all of these, together or alone."""
        return all(
            profile.name in self.profiles
            or (ALL_PROFILES in self.profiles and not profile.red_team)
            for profile in profiles
        )

    def to_json(self) -> dict[str, Any]:
        """As in a file of keys: without what is at its default."""
        shown = self.model_dump(mode="json", exclude_defaults=True)
        # Sets have no order, and a file that changes without a reason reads badly in a diff.
        return {**shown, "scopes": sorted(self.scopes), "profiles": list(self.profiles)}


class KeyRing:
    """Keys that are valid at one time; immutable.

    Raises KeysError where two keys share an id or a secret.
    """

    def __init__(self, keys: Iterable[Key] = ()) -> None:
        self.keys = tuple(keys)
        for what in ("id", "sha256"):
            seen: set[str] = set()
            for key in self.keys:
                if getattr(key, what) in seen:
                    of = "secret" if what == "sha256" else what
                    raise KeysError(f"two keys have the {of} of {key.id!r}; remove one of them")
                seen.add(getattr(key, what))

    def find(self, secret: bytes, now: datetime | None = None) -> Key | None:
        """The key with this secret, unless it has expired.

        Every key is compared in constant time, found or not, so that the time that this takes
        tells nothing of any of them.
        """
        digest = hash_secret(secret)
        found = None
        for key in self.keys:
            if secrets.compare_digest(digest, key.sha256):
                found = key
        return None if found is None or found.expired(now or datetime.now(UTC)) else found


def new_secret() -> str:
    return f"ph-{secrets.token_urlsafe(SECRET_BYTES)}"


def hash_secret(secret: str | bytes) -> str:
    return hashlib.sha256(secret.encode() if isinstance(secret, str) else secret).hexdigest()


def parse_keys(text: str, where: str) -> KeyRing:
    """Keys from JSON: a list of keys, or an object with such a list under `keys`.

    Args:
        where: they are from, for messages.

    Raises KeysError.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise KeysError(f"{where} is not JSON: {error}") from None
    entries = data.get("keys") if isinstance(data, dict) else data
    if not isinstance(entries, list) or (isinstance(data, dict) and set(data) != {"keys"}):
        raise KeysError(f'{where} must be {{"keys": [...]}} as `pilothouse keys create` writes it')
    keys = []
    for i, entry in enumerate(entries):
        try:
            keys.append(Key.model_validate(entry))
        except ValidationError as error:
            first = error.errors()[0]
            path = field_path(("keys", i, *first["loc"]))
            told = describe(first, path)
            if path.endswith(".sha256"):
                # What was given may be the secret itself, and this may end in a log.
                told = f"{path!r} must be the SHA-256 of a secret, in 64 small hex digits"
            elif repr(path) not in told:
                told = f"{path!r}: {told}"
            raise KeysError(f"{where}: {told}") from None
    try:
        return KeyRing(keys)
    except KeysError as error:
        raise KeysError(f"{where}: {error}") from None


def bearer(headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    """The token of the one `Authorization: Bearer` header; `b""` for any other, None for none."""
    given = [value for name, value in headers if name.lower() == b"authorization"]
    if not given:
        return None
    scheme, _, token = given[0].strip().partition(b" ")
    return token.strip() if len(given) == 1 and scheme.lower() == b"bearer" else b""
