"""The administration, an application of its own for a port of its own: styles are loaded, uploaded and unloaded here.

The shape of the first two is vLLM's. An answer means that the change is on the disk.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, FastAPI, Query, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp

from .. import __version__
from ..adapters.canonical import Adapter
from ..core import StylemuseError
from . import errors
from .app import live
from .boundary import Boundary, Log
from .errors import ApiError
from .metrics import Metrics
from .openapi import describe, no_query
from .registry import Registry
from .settings import Settings

HEALTH = frozenset({"/livez"})
Name = Annotated[str, Field(min_length=1, max_length=64)]
Alpha = Annotated[float | None, Field(gt=0, allow_inf_nan=False)]
Recipe = Annotated[str | None, Field(max_length=64)]
_FILE = {"required": True, "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}


class Load(BaseModel):
    """POST /v1/load_lora_adapter."""

    model_config = ConfigDict(extra="forbid", strict=True)
    lora_name: Name
    lora_path: Annotated[str, Field(min_length=1, max_length=255)]
    load_inplace: bool = False
    alpha: Alpha = None
    recipe: Recipe = None


class Unload(BaseModel):
    """POST /v1/unload_lora_adapter."""

    model_config = ConfigDict(extra="forbid", strict=True)
    lora_name: Name


class Upload(BaseModel):
    """PUT /v1/adapters/NAME?..., the body being a LoRA's .safetensors file."""

    model_config = ConfigDict(extra="forbid")
    alpha: Alpha = None
    recipe: Recipe = None
    descriptor: Annotated[str, Field(max_length=200)] = ""
    swap: bool = False


class Loaded(BaseModel):
    """A style that is registered, durably where the server has a folder for that."""

    id: str
    root: Annotated[str, Field(description="Its version, name@sha256.")]
    rank: int


class Unloaded(BaseModel):
    """A style that is registered no more."""

    id: str
    unloaded: bool


def create(registry: Registry, settings: Settings, model: str, metrics: Metrics, log: Log = lambda _: None) -> ASGIApp:
    """The application; ``model`` is the pipeline's name of the model, which no answer shows."""
    if settings.admin_token is None:
        raise StylemuseError("the administration needs a token of its own")
    app = FastAPI(title="stylemuse administration", version=__version__, docs_url=None, redoc_url=None)
    errors.install(app, model, settings.model)
    app.add_api_route("/livez", live, methods=["GET"])

    @app.post("/v1/load_lora_adapter", dependencies=[Depends(no_query)])
    async def load(given: Load) -> Loaded:
        """Register what lies in the folder of adapters."""

        def work() -> Adapter:
            return registry.load(
                given.lora_name, given.lora_path, alpha=given.alpha, recipe=given.recipe, swap=given.load_inplace
            )

        return _facts(await run_in_threadpool(work))

    @app.put("/v1/adapters/{name}", openapi_extra={"requestBody": _FILE})
    async def upload(name: str, request: Request, given: Annotated[Upload, Query()]) -> Loaded:
        """Register the file that is sent."""
        data = await request.body()
        if not data:
            raise ApiError(400, "the body must be a LoRA's .safetensors file")

        def work() -> Adapter:
            return registry.upload(
                name, data, alpha=given.alpha, recipe=given.recipe, descriptor=given.descriptor, swap=given.swap
            )

        return _facts(await run_in_threadpool(work))

    @app.post("/v1/unload_lora_adapter", dependencies=[Depends(no_query)])
    async def unload(given: Unload) -> Unloaded:
        """Forget a style; running requests finish with it."""
        await run_in_threadpool(registry.unload, given.lora_name)
        return Unloaded(id=given.lora_name, unloaded=True)

    describe(app, HEALTH, token=True)
    return Boundary(
        app,
        token=settings.admin_token,
        public=HEALTH,
        body=settings.limits.upload,
        seconds=settings.limits.seconds,
        log=log,
        on_answer=metrics.on_answer,
    )


def _facts(adapter: Adapter) -> Loaded:
    return Loaded(id=adapter.name, root=f"{adapter.name}@{adapter.sha256[:12]}", rank=adapter.rank)
