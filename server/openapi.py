"""What the OpenAPI document says of errors and of streams."""

from __future__ import annotations

from typing import Any

from server.responses import ErrorEnvelope

_ERRORS: dict[int, str] = {
    400: "The request cannot be served as it is; the message says what to change.",
    403: "The key, or this server, does not allow that.",
    404: "There is no such model or profile; the message lists what there is.",
    409: "What the server holds already stands in the way.",
    413: "The body is larger than the server reads.",
    429: "Too many requests wait already; `Retry-After` says when to come back.",
    500: "Something broke while this request was computed.",
    503: "The engine does not run, or the server is about to stop.",
    504: "The answer was not ready in time (`--request-timeout`).",
}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Responses to declare; anything can break, so 500 is always among them."""
    return {
        status: {"description": _ERRORS[status], "model": ErrorEnvelope}
        for status in sorted({*statuses, 500})
    }


def events_of(chunk: str) -> dict[str, Any]:
    """The content of a stream whose events hold `chunk`, a schema's name; `[DONE]` ends it."""
    told = {
        "contentMediaType": "application/json",
        "contentSchema": {"$ref": f"#/components/schemas/{chunk}"},
    }
    failed = {**told, "contentSchema": {"$ref": "#/components/schemas/ErrorEnvelope"}}
    data = {"type": "string", "anyOf": [told, failed, {"const": "[DONE]"}]}
    event = {"type": "object", "properties": {"data": data}, "required": ["data"]}
    # OpenAPI 3.2's word for the items of a stream; FastAPI's own document has it in 3.1 too.
    return {"text/event-stream": {"itemSchema": event}}
