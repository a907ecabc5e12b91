"""At every request: whose it is, what they may, and what is noted of it.

What a request needs is decided in one place (`scopes_needed`), and what is not named there needs a
key: an endpoint that is forgotten is closed, not open. A profile that a caller may not use does not
exist for them (`Caller.sees`).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.audit import AuditLog
from server.auth import Key, KeyRing, KeysError, bearer, parse_keys
from server.errors import ApiError, ForbiddenError, UnauthorizedError, error_response
from server.keyfile import read_keys
from server.logs import current_key
from server.metrics import Metrics
from server.page import is_page
from server.profiles import ProfileStore
from server.quota import Charge, Quota

logger = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/health", "/ready", "/version"})
"""For probes of orchestrators, which have no keys and learn nothing."""

DOCUMENTATION = frozenset({"/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json"})
"""Says what the program can do, and nothing of what is served here."""

_ADMINISTERED = ("/v1/steering/profiles", "/v1/experiments")
"""What only admin keys may change."""

_READING = frozenset({"GET", "HEAD"})


def scopes_needed(method: str, path: str, *, protect_metrics: bool = False) -> frozenset[str]:
    """The scopes of which a key needs one; none are needed if this is empty."""
    if path in OPEN_PATHS or path in DOCUMENTATION or is_page(path):
        return frozenset()
    if path == "/metrics":
        return frozenset({"metrics"} if protect_metrics else ())
    if method in _READING:
        return frozenset({"chat", "admin"})
    if any(path == root or path.startswith(f"{root}/") for root in _ADMINISTERED):
        return frozenset({"admin"})
    return frozenset({"chat"})


@dataclass(frozen=True)
class Caller:
    """Who sent a request.

    Args:
        key: None for the local user of a server without keys, and for nobody.
        local: a server without keys: this caller may do everything.
    """

    key: Key | None = None
    quota: Quota | None = None
    local: bool = False

    @property
    def id(self) -> str:
        """The key's; `""` without one."""
        return "" if self.key is None else self.key.id

    def has(self, scope: str) -> bool:
        return self.local or (self.key is not None and scope in self.key.scopes)

    def permits(self, profiles: Any) -> bool:
        """True if the caller may use all these profiles (an iterable), together or alone."""
        return self.local or (self.key is not None and self.key.permits(profiles))

    def sees(self, profiles: ProfileStore) -> ProfileStore:
        """The profiles that exist for this caller."""
        return profiles if self.local else profiles.seen_by(self.permits)

    def hidden_labels(self, profiles: ProfileStore) -> frozenset[str]:
        """Names that this caller's metrics page must not hold.

        Those of red-team profiles, present and past; a key with the scope `metrics` reads the ones
        that it names.
        """
        if self.local:
            return frozenset()
        named = self.key.profiles if self.key is not None and self.has("metrics") else ()
        return frozenset(profiles.red_team_names.difference(named))

    def reserve(self, tokens: int) -> Charge:
        """Set tokens of the caller's minute aside. Raises RateLimitError."""
        return Charge(None, 0) if self.quota is None else self.quota.reserve(tokens)


LOCAL = Caller(local=True)
NOBODY = Caller()


def caller_of(request: Request) -> Caller:
    """Who sent this request."""
    caller = request.state.caller
    assert isinstance(caller, Caller)
    return caller


class Access:
    """The keys of a server, their quotas, and its audit log.

    Args:
        keys: file of keys, or keys as JSON; None serves everybody who can connect.
        protect_metrics: `/metrics` needs the scope `metrics`.

    Raises KeysError.
    """

    def __init__(
        self,
        keys: str | None = None,
        *,
        protect_metrics: bool = False,
        audit: AuditLog | None = None,
    ) -> None:
        self._source = keys
        self.protect_metrics = protect_metrics
        self.audit = audit or AuditLog()
        self._ring = None if keys is None else _load(keys)
        self._quotas: dict[str, Quota] = {}

    @property
    def keys(self) -> tuple[Key, ...] | None:
        return None if self._ring is None else self._ring.keys

    def reload(self) -> None:
        """Read the keys again; those that cannot be read leave the old ones in force."""
        self.audit.reopen()
        if self._source is None:
            return
        try:
            self._ring = _load(self._source)
        except KeysError as error:
            logger.error("the keys stay as they are: %s", error)
        else:
            logger.info("%d keys are valid from now on", len(self._ring.keys))

    def admit(self, scope: Scope) -> Caller:
        """The caller of an HTTP request, who may make it. Raises ApiError."""
        ring, method, path = self._ring, scope["method"], scope["path"]
        if ring is None:
            return LOCAL
        token = bearer(scope["headers"])
        key = ring.find(token) if token else None
        needed = scopes_needed(method, path, protect_metrics=self.protect_metrics)
        if key is None:
            # A scraper whose key has ended must notice, even where it would need none.
            if needed or (token is not None and path == "/metrics"):
                raise _unauthorized(token)
            return NOBODY
        if needed and not needed & key.scopes:
            wanted = " or ".join(sorted(needed))
            raise ForbiddenError(
                f"The key {key.id!r} lacks the scope for this ({wanted}).",
                headers={
                    "WWW-Authenticate": 'Bearer realm="pilothouse", error="insufficient_scope", '
                    f'scope="{" ".join(sorted(needed))}"'
                },
            )
        return Caller(key, self._quota(key))

    def _quota(self, key: Key) -> Quota:
        quota = self._quotas.get(key.id)
        if quota is None or quota.limits != (key.requests_per_minute, key.tokens_per_minute):
            quota = self._quotas[key.id] = Quota(key)
        return quota


def _load(source: str) -> KeyRing:
    if is_inline(source):
        return parse_keys(source, "PILOTHOUSE_KEYS")
    return read_keys(Path(source))


def is_inline(keys: str) -> bool:
    """True for keys themselves, False for the name of their file."""
    return keys.lstrip().startswith(("[", "{"))


def _unauthorized(token: bytes | None) -> UnauthorizedError:
    if token is None:
        message = "This server needs a key; send it as 'Authorization: Bearer ph-...'."
    else:
        message = "The key is not valid here: it is unknown, has expired or was revoked."
    error = "" if token is None else ', error="invalid_token"'
    return UnauthorizedError(
        message, headers={"WWW-Authenticate": f'Bearer realm="pilothouse"{error}'}
    )


def declare_access(document: dict[str, Any]) -> None:
    """Say in an OpenAPI document what needs a key, and which answers follow from that."""
    document.setdefault("components", {})["securitySchemes"] = {
        "key": {"type": "http", "scheme": "bearer", "description": "Where the server has keys."}
    }
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            scopes = scopes_needed(method.upper(), path, protect_metrics=True)
            if not scopes:
                continue
            operation["security"] = [{"key": []}]
            told = {401: "No key, or one that is not valid."}
            told[403] = f"The key lacks the scope ({' or '.join(sorted(scopes))})."
            if method.upper() not in _READING:
                told[408] = "The body came too slowly."
                told[413] = "The body is larger than `--max-body-bytes`."
                told[429] = "The key's minute is used up; `Retry-After` says how long to wait."
            for status, description in told.items():
                operation["responses"].setdefault(str(status), _declared(description))
            operation["responses"] = dict(sorted(operation["responses"].items()))


def _declared(description: str) -> dict[str, Any]:
    schema = {"$ref": "#/components/schemas/ErrorEnvelope"}
    return {"description": description, "content": {"application/json": {"schema": schema}}}


class AccessMiddleware:
    """Turns away who may not come in, counts requests against quotas, and keeps the audit log.

    Sets `request.state.caller`. An endpoint that notes a request itself sets `request.state.noted`;
    of others that ask for something (not of lists, probes and scrapes) one line says what became
    of them. `request.state.asked` may say what for.
    """

    def __init__(self, app: ASGIApp, access: Access, metrics: Metrics) -> None:
        self.app = app
        self.access = access
        self.metrics = metrics
        access.audit.on_lost = metrics.audit_lost.inc

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        caller, status = NOBODY, 0
        state = scope.setdefault("state", {})

        async def send_limited(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if caller.quota is not None:
                    MutableHeaders(scope=message).update(caller.quota.headers)
            await send(message)

        try:
            caller = self.access.admit(scope)
            state["caller"] = caller
            current_key.set(caller.id)
            if caller.quota is not None and scope["method"] not in _READING:
                caller.quota.take_request()
        except ApiError as error:
            self.metrics.rejections.labels(error.reason).inc()
            response: ASGIApp = error_response(error)
        else:
            response = self.app
        try:
            await response(scope, receive, send_limited)
        finally:
            if scope["method"] not in (*_READING, "OPTIONS") and not state.get("noted"):
                self.access.audit.write(
                    request_id=state.get("request_id"),
                    key=caller.id or None,
                    method=scope["method"],
                    path=scope["path"][:200],
                    asked=state.get("asked"),
                    status=status,
                    outcome="rejected" if status >= 400 or not status else "done",
                )
