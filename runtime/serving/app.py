"""The public application: pictures, models, health, metrics and the page."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, Depends, FastAPI
from fastapi.responses import HTMLResponse
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response
from starlette.types import ASGIApp

from .. import __version__
from ..engine.engine import Engine
from ..protocols import StyleVersion
from . import errors
from .boundary import Boundary, Log
from .errors import ApiError
from .images import GENERATIONS, Images
from .metrics import Metrics
from .openapi import describe, failures, no_query
from .schema import Model, Models, PictureEvent
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
    app = FastAPI(
        title="stylemuse", version=__version__, docs_url=None, redoc_url=None, separate_input_output_schemas=False
    )
    errors.install(app, engine.pipe.name, settings.model)
    app.include_router(Images(engine, settings).router, dependencies=[Depends(no_query)])
    app.include_router(_Models(engine, settings).router, dependencies=[Depends(no_query)])
    _add_health(app, ready)
    describe(app, OPEN, token=settings.token is not None, models=(PictureEvent,))
    metrics.watch(engine)
    page = files("stylemuse.serving").joinpath("page.html").read_text(encoding="utf-8")

    @app.get("/metrics", include_in_schema=False)
    async def exposition() -> Response:
        return Response(await run_in_threadpool(metrics.text), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": _POLICY})

    def busy() -> ApiError | None:
        error = engine.refusal()
        return None if error is None else errors.api_error(error, engine.pipe.name, settings.model)

    limits = settings.limits
    return Boundary(
        app,
        token=settings.token,
        public=OPEN,
        body=limits.body,
        seconds=limits.body_seconds,
        log=log,
        on_answer=metrics.on_answer,
        busy={GENERATIONS: busy},
    )


class Live(BaseModel):
    """The process answers."""

    live: bool


class Ready(BaseModel):
    """Whether new requests are accepted."""

    ready: bool


async def live() -> Live:
    """Always true, for whoever gets an answer."""
    return Live(live=True)


def _add_health(app: FastAPI, ready: Callable[[], bool]) -> None:
    """Kubernetes' names and the Open Inference Protocol's."""

    async def readiness(response: Response) -> Ready:
        """True until the server drains."""
        found = Ready(ready=ready())
        response.status_code = 200 if found.ready else 503
        return found

    draining: dict[int | str, dict[str, Any]] = {503: {"model": Ready, "description": "The server drains."}}
    for path in ("/livez", "/v2/health/live"):
        app.add_api_route(path, live, methods=["GET"])
    for path in ("/readyz", "/v2/health/ready"):
        app.add_api_route(path, readiness, methods=["GET"], responses=draining)


class _Png(Response):
    media_type = "image/png"


class _Models:
    """What can be drawn with: the base model and its styles."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._library, self._settings, self._created = engine.pipe.adapters, settings, int(time.time())
        self.router, unknown = APIRouter(), failures(404)
        add = partial(self.router.add_api_route, methods=["GET"])
        add("/v1/models", self.all, response_model_exclude_unset=True)
        add("/v1/models/{name}", self.one, response_model_exclude_unset=True, responses=unknown)
        add("/v1/styles/{name}/reference.png", self.reference, response_class=_Png, responses=unknown)

    async def all(self) -> Models:
        """The base model, then its styles."""
        return Models(object="list", data=await run_in_threadpool(self._all))

    async def one(self, name: str) -> Model:
        """One of them by its id."""
        if name == self._settings.model:
            return self._base()
        return await run_in_threadpool(lambda: self._style(self._version(name)))

    async def reference(self, name: str) -> Response:
        """The picture a style was tuned from."""
        data = await run_in_threadpool(self._version(name).picture)
        if data is None:
            raise ApiError(404, "this style has no reference picture")
        return _Png(data, headers={"Cache-Control": "no-cache"})

    def _all(self) -> list[Model]:
        return [self._base(), *(self._style(version) for version in self._library.versions())]

    def _version(self, name: str) -> StyleVersion:
        if name not in self._library:
            raise ApiError(404, "there is no such model", param="model")
        return self._library.version(name)

    def _base(self) -> Model:
        sizes = [f"{width}x{height}" for width, height in self._settings.sizes]
        return self._model(self._settings.model, root=self._settings.model, parent=None, sizes=sizes)

    def _style(self, version: StyleVersion) -> Model:
        return self._model(
            version.name,
            root=f"{version.name}@{version.sha256[:12]}",
            parent=self._settings.model,
            descriptor=version.descriptor,
            licence=version.licence,
            rank=version.rank,
            recommended=dict(version.recommended),
            reference=version.has_picture,
        )

    def _model(self, name: str, **facts: Any) -> Model:
        return Model(id=name, object="model", created=self._created, owned_by="stylemuse", **facts)
