"""What every request passes: an id, the bearer token, a bounded body in time, a line of log, a count in the metrics.

Plain ASGI, so that bodies and streams go through untouched, and the last place where an exception can become an answer.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import re
import secrets
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError

Log = Callable[[Mapping[str, Any]], None]
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Boundary:
    """Wraps an application.

    Args:
        token: the bearer token; None asks for none. ``public`` are the paths that need none.
        body, seconds: bytes of a body and seconds until it must be there.
        log: gets one record per request. on_answer: method, route, status and seconds, for metrics.
        busy: paths whose requests are refused, whatever they hold, while the function gives an error: a server with
            more clients than it can serve must spend nothing on those that it turns away.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        token: str | None,
        public: frozenset[str],
        body: int,
        seconds: float,
        log: Log,
        on_answer: Callable[[str, str, int, float], None],
        busy: Mapping[str, Callable[[], ApiError | None]] = MappingProxyType({}),
    ) -> None:
        self._app, self._token, self._public = app, token, public
        self._body, self._seconds, self._log, self._on_answer, self._busy = body, seconds, log, on_answer, busy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get("x-request-id", "")
        scope["request_id"] = given if _ID.fullmatch(given) else secrets.token_hex(8)
        began, status, failure = time.monotonic(), 0, None

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", scope["request_id"].encode()),
                    (b"x-content-type-options", b"nosniff"),
                ]
            await send(message)

        try:
            self._check(scope, headers)
            await self._app(scope, self._bounded(receive), answer)
        except ApiError as error:
            await _send(answer, error, scope["request_id"], started=bool(status))
        except Exception as error:
            failure = repr(error)
            wrong = ApiError(500, "the server failed; the request id finds it in the log")
            await _send(answer, wrong, scope["request_id"], started=bool(status))
        finally:
            known = scope["path"] if scope["path"] in self._busy else "other"  # one that was turned away has no route
            seconds, route = time.monotonic() - began, getattr(scope.get("route"), "path", known)
            self._on_answer(scope["method"], str(route), status, seconds)
            record = {"request_id": scope["request_id"], "method": scope["method"], "path": scope["path"][:200]}
            record |= {"status": status, "seconds": round(seconds, 4)} | scope.get("facts", {})
            if failure := failure or scope.get("failure"):
                record["failure"] = failure
            self._log(record)

    def _check(self, scope: Scope, headers: Mapping[str, str]) -> None:
        if self._token is not None and scope["path"] not in self._public:
            kind, _, given = headers.get("authorization", "").partition(" ")
            right = hmac.compare_digest(given.strip().encode("latin-1"), self._token.encode())
            if kind.lower() != "bearer" or not right:
                raise ApiError(401, "a valid bearer token is needed", headers={"WWW-Authenticate": "Bearer"})
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self._body:
            raise ApiError(413, f"the body has {length[:20]} bytes; at most {self._body} are allowed")
        if scope["method"] == "POST" and (busy := self._busy.get(scope["path"])) and (error := busy()):
            raise error

    def _bounded(self, receive: Receive) -> Receive:
        """receive() that refuses a body that is too large or too slow, with the one exception FastAPI lets through."""
        read, whole, until = 0, False, time.monotonic() + self._seconds

        async def bounded() -> Message:
            nonlocal read, whole
            if whole:
                return await receive()  # waits for the client to leave
            try:
                message = await asyncio.wait_for(receive(), max(0.0, until - time.monotonic()))
            except asyncio.TimeoutError:
                raise HTTPException(408, "the body did not arrive in time") from None
            if message["type"] == "http.request":
                read += len(message.get("body", b""))
                whole = not message.get("more_body", False)
                if read > self._body:
                    raise HTTPException(413, f"the body has over {self._body} bytes, which are allowed")
            return message

        return bounded


async def _send(send: Send, error: ApiError, request_id: str, *, started: bool) -> None:
    if started:
        return  # half an answer cannot be taken back: the connection ends without its end
    body = json.dumps(error.body(request_id)).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    encoded = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})
