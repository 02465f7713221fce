"""Errors as clients see them: one OpenAI-shaped object, a constant text or a checked one, no path, no trace."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from ..core import StylemuseError
from ..engine.errors import CancelledError, ClosedError, DeadlineError, EngineError, FailedError, QueueFullError

_STATUS: Mapping[type[Exception], int] = {
    QueueFullError: 429,
    CancelledError: 499,
    ClosedError: 503,
    DeadlineError: 504,
    FailedError: 500,
}


Kind = Literal["invalid_request_error", "authentication_error", "rate_limit_error", "server_error"]


class ErrorFacts(BaseModel):
    """What went wrong: one line, the field it is about, and the id that finds it in the log."""

    message: str
    type: Kind
    param: str | None
    code: None
    request_id: str


class ErrorAnswer(BaseModel):
    """Every answer that is no success, in OpenAI's shape."""

    error: ErrorFacts


class ApiError(Exception):
    """An answer that is an error.

    Attributes:
        status, message, param: HTTP status; one line; the field it is about.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.headers = status, message, param, dict(headers or {})

    def body(self, request_id: str) -> dict[str, Any]:
        """The JSON object."""
        facts = ErrorFacts(
            message=self.message, type=_kind(self.status), param=self.param, code=None, request_id=request_id
        )
        return ErrorAnswer(error=facts).model_dump()


def _kind(status: int) -> Kind:
    if status == 401:
        return "authentication_error"
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"


def api_error(error: Exception, model: str, name: str) -> ApiError:
    """What a client is told of an error; ``model`` as the pipeline calls it, perhaps a path, ``name`` as clients do."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error), headers={"Retry-After": str(error.retry_after)})
    if isinstance(error, EngineError):
        return ApiError(_STATUS.get(type(error), 500), str(error))
    if isinstance(error, StylemuseError):
        # As a word of its own: a model may be called ".".
        return ApiError(
            400, printable(re.sub(rf"(?<![\w./-]){re.escape(model)}(?![\w/-]|\.\w)", lambda _: name, str(error)))
        )
    return ApiError(500, "the server failed; the request id finds it in the log")


def printable(text: str) -> str:
    """Short, on one line, in letters that any encoding of JSON holds."""
    return "".join(sign if sign.isprintable() else "?" for sign in text)[:500]


def install(app: FastAPI, model: str, name: str) -> None:
    """Answer every error of the application in this form."""

    def answer(request: Request, error: Exception) -> JSONResponse:
        found = api_error(error, model, name)
        if found.status == 500:
            request.scope["failure"] = repr(error.__cause__ or error)
        return JSONResponse(found.body(request_id(request)), found.status, found.headers)

    async def known(request: Request, error: Exception) -> JSONResponse:
        return answer(request, error)

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        place = printable(".".join(str(part) for part in first["loc"] if part != "body"))
        message = printable(f"{place}: {first['msg']}" if place else first["msg"])
        return answer(request, ApiError(400, message, param=place or None))

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        found = ApiError(error.status_code, printable(str(error.detail)), headers=error.headers)
        return JSONResponse(found.body(request_id(request)), found.status, found.headers)

    # Without one for Exception, Starlette answers in plain text before anything around the application can.
    for kind in (ApiError, EngineError, StylemuseError, Exception):
        app.add_exception_handler(kind, known)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)


def request_id(request: Request) -> str:
    """The id this request has in answers and in the log."""
    return str(request.scope.get("request_id", ""))
