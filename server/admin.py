"""Profiles that come and go while the server runs.

A new profile is read and checked on a thread of its own, then tested on the model itself by the
engine. The local one (`steering.selftest`) takes six forward passes over at most two rows of one
short prompt, one at a time, each between two of its steps. So registering holds up a step by one
such pass at most: with eight requests decoding on one thread of a busy machine, 16 to 28 ms on the
demo model (a step: 20 ms) and 0.4 to 0.8 s on a Qwen2.5-0.5B shape (a step: 0.3 to 0.6 s). It
changes no token.

Requests hold the edits they started with: removing a profile changes none of them. Its hooks and
tensors are let go when the last of them has ended.

A key registers only what it may use itself, and removes only what exists for it (`server.access`,
which also says whose key has the scope).

Not covered: keeping profiles over a restart.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from pydantic import ValidationError
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from server.access import Caller, caller_of
from server.engine.base import Engine, RankLimitError
from server.errors import (
    BodyTooLargeError,
    ConflictError,
    ForbiddenError,
    InvalidRequestError,
    OverloadedError,
    UnavailableError,
)
from server.hosting import Host
from server.metrics import Metrics
from server.openapi import errors
from server.profile_folder import read_inside
from server.protocol import RegisterRequest
from server.responses import ProfileCard, ProfileDeleted
from server.validation import describe, field_path
from steering.profile import Profile, ProfileError

UPLOAD = "application/octet-stream"
MAX_QUEUED = 4
"""Registrations that may wait for the one under way; each holds its body in memory."""

_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            UPLOAD: {"schema": {"type": "string", "format": "binary"}},
            "application/json": {"schema": RegisterRequest.model_json_schema()},
        },
    }
}


def add_admin(app: FastAPI, host: Host, metrics: Metrics) -> None:
    """Add the endpoints that change what is served."""
    turns = _Turns(MAX_QUEUED)

    @app.post(
        "/v1/steering/profiles",
        status_code=201,
        response_model=ProfileCard,
        responses=errors(400, 403, 409, 413, 429, 503),
        openapi_extra=_BODY,
        tags=["admin"],
        summary="Register a profile",
    )
    async def register_profile(
        request: Request,
        name: Annotated[
            str | None, Query(description="To serve an upload by; default: its own.")
        ] = None,
    ) -> Response:
        """The body is a profile file, or JSON that names one in `--profile-dir`. It is checked and
        tested on the model before any request can ask for it; those under way go on."""
        engine, caller = _engine(host), caller_of(request)
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        try:
            body = await request.body()
        except ClientDisconnect:
            return Response(status_code=499)  # as in chat: nobody reads this
        request.state.asked = {"profile": name} if name is not None else {}
        read: Callable[[], Profile]
        if kind == UPLOAD:
            read = lambda: _uploaded(host, body, name)  # noqa: E731
        elif kind == "application/json":
            asked = _parse(body)
            request.state.asked = asked.model_dump(exclude_none=True)
            if name is not None:
                raise InvalidRequestError("'name' belongs into the JSON body here.", param="name")
            read = lambda: _named(host, asked)  # noqa: E731
        else:
            raise InvalidRequestError(
                f"Send a profile file with Content-Type: {UPLOAD}, or application/json with the "
                "'path' of one.",
                code="invalid_content_type",
            )
        async with turns:
            profile = await asyncio.to_thread(_register, host, engine, read, caller)
            metrics.add_profile(profile.name, profile.fingerprint, profile.method)
            _note(host, request, profile, "registered")
        return JSONResponse(host.profiles.card(profile).model_dump(), status_code=201)

    @app.delete(
        "/v1/steering/profiles/{name}",
        responses=errors(404, 409, 429, 503),
        tags=["admin"],
        summary="Remove a profile",
    )
    async def remove_profile(name: str, request: Request) -> ProfileDeleted:
        """Requests under way finish with it; new ones get a 404."""
        engine, caller = _engine(host), caller_of(request)
        async with turns:
            caller.sees(host.profiles).resolve(name, param="name")
            host.experiments.claim()
            profile = host.profiles.remove(name)
            _note(host, request, profile, "removed")
            metrics.retire_profile(profile.name, profile.fingerprint, profile.method)
            await asyncio.to_thread(engine.retain, list(host.profiles))
        return ProfileDeleted(name=name)


def _note(host: Host, request: Request, profile: Profile, outcome: str) -> None:
    """Tell the audit log what became of a profile."""
    request.state.noted = True
    host.access.audit.write(
        request_id=request.state.request_id,
        key=caller_of(request).id or None,
        profile=profile.name,
        fingerprint=profile.fingerprint,
        red_team=profile.red_team,
        outcome=outcome,
    )


def _engine(host: Host) -> Engine:
    if not host.ready:
        raise UnavailableError("The server is not ready.", headers={"Retry-After": "5"})
    if host.profiles.folded is not None:
        raise ConflictError(
            "This server was started with --fold: one profile is part of its weights, and no other "
            "can be served."
        )
    return host.engine


def _parse(body: bytes) -> RegisterRequest:
    try:
        return RegisterRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        path = field_path(first["loc"])
        told = describe(first, path) if path else "the body must be a JSON object with a 'path'"
        raise InvalidRequestError(f"{told}.", param=path or None) from None


def _uploaded(host: Host, data: bytes, name: str | None) -> Profile:
    if len(data) > host.registration.max_bytes:
        raise BodyTooLargeError(
            f"The profile is larger than {host.registration.max_bytes} bytes (--max-profile-bytes)."
        )
    return _load(data, name, "the upload")


def _named(host: Host, asked: RegisterRequest) -> Profile:
    folder = host.registration.folder
    if folder is None:
        raise ForbiddenError(
            "This server reads no profiles by path; upload the file, or start the server with "
            "--profile-dir.",
            param="path",
        )
    data = read_inside(folder, asked.path, host.registration.max_bytes)
    return _load(data, asked.name, asked.path)


def _load(data: bytes, name: str | None, called: str) -> Profile:
    try:
        profile = Profile.load(data, called=called)
    except ProfileError as error:
        raise _unsound(error, None) from error
    try:
        return profile if name is None else replace(profile, name=name)
    except ProfileError as error:
        raise _unsound(error, "name") from error


def _register(host: Host, engine: Engine, read: Callable[[], Profile], caller: Caller) -> Profile:
    """Read, check, test and offer a profile. Raises ApiError, and then nothing has changed."""
    store, limit = host.profiles, host.registration.max_profiles
    if len(store.names) >= limit:
        raise ConflictError(
            f"{limit} profiles are served already (--max-profiles); remove one first.",
            code="too_many_profiles",
        )
    profile = read()
    if not caller.permits((profile,)):
        kind = "red-team profile" if profile.red_team else "profile"
        raise ForbiddenError(
            f"The key {caller.id!r} may not use the {kind} {profile.name!r}, and so not register "
            "it; its owner must give it that name (`pilothouse keys create --profile`).",
            param="name",
            code="forbidden",
        )
    if profile.name in store.names:
        seen = profile.name in caller.sees(store).names
        raise ConflictError(
            f"The name {profile.name!r} is taken; {'remove that profile first, or ' * seen}choose "
            "another.",
            param="name",
        )
    try:
        store.check(profile)
        _check_ranks(profile)
        engine.register(profile)
    except ProfileError as error:
        raise _unsound(error, None) from error
    except RankLimitError as error:
        raise ConflictError(
            f"There is no room for this profile: {error}.",
            code="rank_limit",
        ) from error
    store.add(profile)
    return profile


def _check_ranks(profile: Profile) -> None:
    """Raise ProfileError for edits of more rank than any linear map has: they are paid for in
    every step of every batch that holds them."""
    ranks: Counter[str] = Counter()
    for edit in profile.edits:
        ranks[str(edit.site)] += max(edit.rank, 1)
        if ranks[str(edit.site)] > edit.dimension:
            raise ProfileError(
                f"profile {profile.name}: its edits at {edit.site} have a rank above the hidden "
                f"size, {edit.dimension}"
            )


def _unsound(error: ProfileError, param: str | None) -> InvalidRequestError:
    return InvalidRequestError(" ".join(str(error).split()), param=param, code="invalid_profile")


class _Turns:
    """One change at a time, few waiting; used on the event loop."""

    def __init__(self, limit: int) -> None:
        self._lock = asyncio.Lock()
        self._limit = limit
        self._inside = 0

    async def __aenter__(self) -> None:
        if self._inside > self._limit:
            raise OverloadedError(
                "Other profiles are being registered. Try again in a moment.",
                headers={"Retry-After": "1"},
            )
        self._inside += 1
        try:
            await self._lock.acquire()
        except BaseException:
            self._inside -= 1
            raise

    async def __aexit__(self, *_: Any) -> None:
        self._lock.release()
        self._inside -= 1
