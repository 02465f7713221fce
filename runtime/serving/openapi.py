"""What an application says of itself at /openapi.json: every answer a client can get, errors and the token included.

A route declares what is its own (`failures` for the errors); what the boundary in front of it adds is added here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI, Request
from pydantic import BaseModel

from .errors import ApiError, ErrorAnswer

_MEANING = {
    400: "The request is wrong; the message says what is allowed.",
    401: "A valid bearer token is needed.",
    404: "There is nothing of this name.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    429: "The server has as many requests as it accepts.",
    499: "The request was cancelled.",
    500: "The server failed; the request id finds the cause in its log.",
    503: "The server drains: it accepts no more requests.",
    504: "The request was not done in time.",
}
_RETRY = {"Retry-After": {"description": "Seconds.", "required": True, "schema": {"type": "integer", "minimum": 1}}}
_REFERENCE = "#/components/schemas/{model}"
_VALIDATION = ("HTTPValidationError", "ValidationError")
"""FastAPI's own form of a refusal, which `errors.install` replaces."""


def failures(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For a route's ``responses``."""
    return {status: _failure(status) for status in statuses}


def event_stream(data: type[BaseModel]) -> dict[str, Any]:
    """The content of an answer whose events hold this as JSON, or at last an error; `describe` must know the model."""
    either = {"oneOf": [{"$ref": _REFERENCE.format(model=model.__name__)} for model in (data, ErrorAnswer)]}
    text = {"type": "string", "contentMediaType": "application/json", "contentSchema": either}
    event = {"type": "object", "required": ["event", "data"], "properties": {"event": {"type": "string"}, "data": text}}
    return {"text/event-stream": {"schema": event}}


async def no_query(request: Request) -> None:
    """A dependency of routes without query parameters: one that has no effect is refused."""
    if name := next(iter(request.query_params), None):
        raise ApiError(400, f"query parameter {name[:80]!a} is unknown; none is allowed", param="query")


def describe(app: FastAPI, public: frozenset[str], *, token: bool, models: tuple[type[BaseModel], ...] = ()) -> None:
    """Complete the application's schema.

    Args:
        public: paths that need no token; with ``token`` all others do.
        models: those that no route names as its body or its answer.
    """
    made = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            _complete(made(), public, token, (ErrorAnswer, *models))
        return made()

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way


def _complete(schema: dict[str, Any], public: frozenset[str], token: bool, models: tuple[type[BaseModel], ...]) -> None:
    parts = schema["components"]
    for name in _VALIDATION:
        parts["schemas"].pop(name, None)
    for model in models:
        form = model.model_json_schema(ref_template=_REFERENCE)
        parts["schemas"] |= form.pop("$defs", {}) | {model.__name__: form}
    if token:
        parts["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    for path, operation in _operations(schema):
        answers = operation["responses"]
        answers.pop("422", None)
        if path in public:
            continue
        if token:
            operation["security"] = [{"token": []}]
        body = (408, 413) if "requestBody" in operation else ()
        for status in (400, 500, *((401,) if token else ()), *body):
            answers.setdefault(str(status), _failure(status))


def _failure(status: int) -> dict[str, Any]:
    form = {"schema": {"$ref": _REFERENCE.format(model=ErrorAnswer.__name__)}}
    found: dict[str, Any] = {"description": _MEANING[status], "content": {"application/json": form}}
    return found | ({"headers": _RETRY} if status == 429 else {})


def _operations(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, methods in schema["paths"].items():
        for operation in methods.values():
            yield path, operation
