"""Errors a client can see, and the one shape they all have.

    ApiError                      status  code
      InvalidRequestError         400     invalid_value, unsupported_parameter, ...
        ContextLengthError        400     context_length_exceeded
      UnauthorizedError           401     invalid_api_key
      ForbiddenError              403     insufficient_scope, forbidden
      NotFoundError               404     model_not_found, not_found
      ConflictError               409     conflict
      SlowBodyError               408     body_timeout
      BodyTooLargeError           413     body_too_large
      OverloadedError             429     queue_full, with Retry-After
      RateLimitError              429     rate_limit_exceeded, with Retry-After
      InternalError               500     internal_error
      UnavailableError            503     engine_stopped

The body is OpenAI's envelope, `{"error": {"message", "type", "param", "code"}}`, with a string for
a code. Whatever an endpoint raises leaves the server in it (`install_handlers`, and
`server.middleware` for what nobody foresaw); no traceback and no path does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from server.engine.base import (
    ConstraintError,
    DeadlineExceededError,
    EngineError,
    EngineStoppedError,
    ProfileRemovedError,
    PromptTooLongError,
    QueueFullError,
)
from server.validation import describe, field_path, telling

MAX_REPORTED = 10


class ApiError(Exception):
    """An error with a status and an envelope.

    Args:
        message: for people: what is wrong and what to do.
        param: the field of the request it is about.
        code: for programs; each class has its own default.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    default_code: ClassVar[str] = "internal_error"
    reason: ClassVar[str] = "error"
    """Label of `steering_rejections_total`."""

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or self.default_code
        self.headers = dict(headers or {})

    @property
    def envelope(self) -> dict[str, Any]:
        return envelope(self.message, type=self.type, param=self.param, code=self.code)


class InvalidRequestError(ApiError):
    """The request cannot be served as it is; another one could."""

    status = 400
    type = "invalid_request_error"
    default_code = "invalid_value"
    reason = "invalid_request"


class ContextLengthError(InvalidRequestError):
    """The prompt, or the prompt and the tokens asked for, cannot fit."""

    default_code = "context_length_exceeded"
    reason = "context_length"


class UnauthorizedError(ApiError):
    """No key, or one that is not valid (any more)."""

    status = 401
    type = "invalid_request_error"  # as OpenAI has it
    default_code = "invalid_api_key"
    reason = "unauthorized"


class ForbiddenError(ApiError):
    """The key is valid, but not for this; or the server was not told to allow it."""

    status = 403
    type = "invalid_request_error"
    default_code = "insufficient_scope"
    reason = "forbidden"


class NotFoundError(ApiError):
    """No such model, profile or experiment."""

    status = 404
    type = "invalid_request_error"
    default_code = "model_not_found"
    reason = "not_found"


class ConflictError(ApiError):
    """What the server holds already stands in the way."""

    status = 409
    type = "invalid_request_error"
    default_code = "conflict"
    reason = "conflict"


class SlowBodyError(ApiError):
    """The body does not come, or comes a byte now and then."""

    status = 408
    type = "invalid_request_error"
    default_code = "body_timeout"
    reason = "slow_body"


class BodyTooLargeError(ApiError):
    """More bytes than the server reads."""

    status = 413
    type = "invalid_request_error"
    default_code = "body_too_large"
    reason = "body_too_large"


class OverloadedError(ApiError):
    """The queue is full; the same request will do later."""

    status = 429
    type = "rate_limit_error"
    default_code = "queue_full"
    reason = "queue_full"


class RateLimitError(ApiError):
    """The key has used up its minute."""

    status = 429
    type = "rate_limit_error"
    default_code = "rate_limit_exceeded"
    reason = "rate_limited"


class InternalError(ApiError):
    """Something broke while this request was computed; others are not concerned."""


class UnavailableError(ApiError):
    """The engine does not run, or is about to stop."""

    status = 503
    type = "server_error"
    default_code = "engine_stopped"
    reason = "unavailable"


class DeadlineError(ApiError):
    """The answer was not ready in time."""

    status = 504
    type = "server_error"
    default_code = "deadline_exceeded"
    reason = "deadline"


REJECTION_REASONS = sorted(
    kind.reason
    for kind in (
        InvalidRequestError,
        ContextLengthError,
        UnauthorizedError,
        ForbiddenError,
        NotFoundError,
        ConflictError,
        SlowBodyError,
        BodyTooLargeError,
        OverloadedError,
        RateLimitError,
        InternalError,
        UnavailableError,
        DeadlineError,
    )
)

_HTTP_CODES = {404: "not_found", 405: "method_not_allowed"}


def envelope(message: str, *, type: str, param: str | None, code: str) -> dict[str, Any]:
    """The body of every error."""
    return {"error": {"message": message, "type": type, "param": param, "code": code}}


def from_engine(error: EngineError) -> ApiError:
    """What a client is told about an engine's error."""
    if isinstance(error, PromptTooLongError):
        return ContextLengthError(str(error), param="messages")
    if isinstance(error, QueueFullError):
        return OverloadedError(
            f"The server is busy: {error}. Try again in a moment.", headers={"Retry-After": "1"}
        )
    if isinstance(error, ProfileRemovedError):
        return NotFoundError(
            "A profile of this request was removed before its prompt was ready. See "
            "GET /v1/steering/profiles for those there are.",
            param="steering.profile",
            code="model_not_found",
        )
    if isinstance(error, EngineStoppedError):
        return UnavailableError(f"The engine cannot take requests: {error}.")
    if isinstance(error, ConstraintError):
        return InvalidRequestError(
            f"The reply cannot go on in the shape that was asked for: {error}. Ask for a simpler "
            "schema.",
            param="response_format",
        )
    if isinstance(error, DeadlineExceededError):
        return DeadlineError(
            "The request was not answered in time (--request-timeout). Ask for fewer tokens, or "
            "try again when the server is less busy."
        )
    # The reason is in the log; it may hold paths and is of no use to a client.
    return InternalError("The computation of this request failed. Others are not concerned.")


def error_response(error: ApiError) -> Response:
    return _respond(error.status, error.envelope, error.headers)


def _respond(status: int, body: dict[str, Any], headers: Mapping[str, str] | None) -> Response:
    # Escaped to ASCII, because a message may echo text that UTF-8 cannot hold (lone surrogates).
    return Response(json.dumps(body), status, headers=headers, media_type="application/json")


def _from_validation(errors: Sequence[Mapping[str, Any]]) -> InvalidRequestError:
    errors = telling(errors)
    first = errors[0]
    path = field_path(first["loc"][1:])
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "malformed")
        return InvalidRequestError(f"The body is not valid JSON: {reason}.", code="invalid_json")
    if first["type"] == "string_unicode" and not path:
        return InvalidRequestError(
            "The body has a key that holds half of a surrogate pair, which is no text.",
            code="invalid_json",
        )
    if not path and first["type"] == "value_error":  # of fields that contradict one another
        return InvalidRequestError(f"{describe(first, path)}.")
    if not path:
        return InvalidRequestError(
            "The body must be a JSON object, sent with Content-Type: application/json.",
            code="invalid_json",
        )
    told = [describe(e, field_path(e["loc"][1:])) for e in errors[:MAX_REPORTED]]
    if len(errors) > MAX_REPORTED:
        told.append(f"and {len(errors) - MAX_REPORTED} more")
    code = {"missing": "missing_required_parameter", "extra_forbidden": "unknown_parameter"}
    return InvalidRequestError(
        "; ".join(told) + ".", param=path, code=code.get(first["type"], "invalid_value")
    )


def install_handlers(app: FastAPI, rejected: Callable[[str], None]) -> None:
    """Put every error that the framework raises, and our own, into the envelope.

    Args:
        rejected: called with the reason when a POST is turned down.
    """

    def reject(request: Request, error: ApiError) -> Response:
        if request.method == "POST":
            rejected(error.reason)
        return error_response(error)

    async def on_api_error(request: Request, error: Exception) -> Response:
        return reject(request, cast(ApiError, error))

    async def on_engine_error(request: Request, error: Exception) -> Response:
        return reject(request, from_engine(cast(EngineError, error)))

    async def on_validation(request: Request, error: Exception) -> Response:
        return reject(request, _from_validation(cast(RequestValidationError, error).errors()))

    async def on_http(request: Request, error: Exception) -> Response:
        http = cast(HTTPException, error)
        if isinstance(http.__cause__, ApiError):  # raised while the body was read
            return reject(request, http.__cause__)
        if http.__cause__ is not None and http.status_code == 400:
            return reject(
                request,
                InvalidRequestError(
                    "The body cannot be read as JSON: it must be UTF-8 text, not nested deeply.",
                    code="invalid_json",
                ),
            )
        message = {
            404: f"There is nothing at {request.url.path}. See /docs for what there is.",
            405: f"{request.method} is not possible at {request.url.path}.",
        }.get(http.status_code, str(http.detail))
        body = envelope(
            message,
            type="invalid_request_error" if http.status_code < 500 else "server_error",
            param=None,
            code=_HTTP_CODES.get(http.status_code, "invalid_request"),
        )
        return _respond(http.status_code, body, http.headers)

    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(EngineError, on_engine_error)
    app.add_exception_handler(RequestValidationError, on_validation)
    app.add_exception_handler(HTTPException, on_http)
