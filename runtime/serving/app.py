"""The public application: pictures, models, health, metrics and the page."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib.resources import files
from typing import Any

from fastapi import FastAPI
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response
from starlette.types import ASGIApp

from ..adapters.versions import Version
from ..engine.engine import Engine
from . import errors
from .boundary import Boundary, Log
from .errors import ApiError
from .images import Images
from .metrics import Metrics
from .settings import Settings

OPEN = frozenset({"/", "/livez", "/readyz", "/v2/health/live", "/v2/health/ready"})
"""Paths that need no token: health, and the page, which holds nothing but its own text."""
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "img-src 'self' data: blob:; connect-src 'self'"
)


def create(
    engine: Engine,
    settings: Settings,
    metrics: Metrics,
    *,
    ready: Callable[[], bool] = lambda: True,
    log: Log = lambda _: None,
) -> ASGIApp:
    """The application.

    Args:
        engine: draws; ``metrics`` must have been given to it as its observer.
        ready: false while the server drains.
        log: gets a record per request.
    """
    app = FastAPI(title="stylemuse", docs_url=None, redoc_url=None)
    errors.install(app, engine.pipe.name, settings.model)
    app.include_router(Images(engine, settings).router)
    _Models(engine, settings).add_to(app)
    _add_health(app, ready)
    metrics.watch(engine)
    page = files("stylemuse.serving").joinpath("page.html").read_text(encoding="utf-8")

    @app.get("/metrics", include_in_schema=False)
    async def exposition() -> Response:
        return Response(await run_in_threadpool(metrics.text), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": _POLICY})

    limits = settings.limits
    return Boundary(
        app,
        token=settings.token,
        public=OPEN,
        body=limits.body,
        seconds=limits.body_seconds,
        log=log,
        on_answer=metrics.on_answer,
    )


def _add_health(app: FastAPI, ready: Callable[[], bool]) -> None:
    """Kubernetes' names and the Open Inference Protocol's."""

    async def live() -> dict[str, bool]:
        return {"live": True}

    async def readiness() -> Response:
        is_ready = ready()
        return JSONResponse({"ready": is_ready}, 200 if is_ready else 503)

    for path in ("/livez", "/v2/health/live"):
        app.add_api_route(path, live, methods=["GET"])
    for path in ("/readyz", "/v2/health/ready"):
        app.add_api_route(path, readiness, methods=["GET"])


class _Models:
    """What can be drawn with: the base model and its styles."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._library, self._settings, self._created = engine.pipe.adapters, settings, int(time.time())

    def add_to(self, app: FastAPI) -> None:
        """Their routes."""
        app.add_api_route("/v1/models", self.all, methods=["GET"])
        app.add_api_route("/v1/models/{name}", self.one, methods=["GET"])
        app.add_api_route("/v1/styles/{name}/reference.png", self.reference, methods=["GET"], response_class=Response)

    async def all(self) -> dict[str, Any]:
        """The base model, then its styles."""
        return {"object": "list", "data": await run_in_threadpool(self._all)}

    async def one(self, name: str) -> dict[str, Any]:
        """One of them by its id."""
        if name == self._settings.model:
            return self._base()
        return await run_in_threadpool(lambda: self._style(self._version(name)))

    async def reference(self, name: str) -> Response:
        """The picture a style was tuned from."""
        data = await run_in_threadpool(self._version(name).picture)
        if data is None:
            raise ApiError(404, "this style has no reference picture")
        return Response(data, media_type="image/png", headers={"Cache-Control": "no-cache"})

    def _all(self) -> list[dict[str, Any]]:
        return [self._base(), *(self._style(version) for version in self._library.versions())]

    def _version(self, name: str) -> Version:
        if name not in self._library:
            raise ApiError(404, "there is no such model", param="model")
        return self._library.version(name)

    def _base(self) -> dict[str, Any]:
        sizes = [f"{width}x{height}" for width, height in self._settings.sizes]
        facts = {"id": self._settings.model, "object": "model", "created": self._created, "owned_by": "stylemuse"}
        return facts | {"root": self._settings.model, "parent": None, "sizes": sizes}

    def _style(self, version: Version) -> dict[str, Any]:
        facts = {"id": version.name, "object": "model", "created": self._created, "owned_by": "stylemuse"}
        facts |= {"root": f"{version.name}@{version.sha256[:12]}", "parent": self._settings.model}
        facts |= {"descriptor": version.descriptor, "licence": version.licence, "rank": version.rank}
        return facts | {"recommended": dict(version.recommended), "reference": version.has_picture}
