"""The administration, an application of its own for a port of its own: styles are loaded, uploaded and unloaded here.

The shape of the first two is vLLM's. An answer means that the change is on the disk.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp

from ..adapters.canonical import Adapter
from ..core import StylemuseError
from . import errors
from .boundary import Boundary, Log
from .errors import ApiError
from .metrics import Metrics
from .registry import Registry
from .settings import Settings

HEALTH = frozenset({"/livez"})
_NAME = Field(min_length=1, max_length=64)


class Load(BaseModel):
    """POST /v1/load_lora_adapter."""

    model_config = ConfigDict(extra="forbid", strict=True)
    lora_name: Annotated[str, _NAME]
    lora_path: Annotated[str, Field(min_length=1, max_length=255)]
    load_inplace: bool = False
    alpha: Annotated[float | None, Field(gt=0, allow_inf_nan=False)] = None
    recipe: Annotated[str | None, Field(max_length=64)] = None


class Unload(BaseModel):
    """POST /v1/unload_lora_adapter."""

    model_config = ConfigDict(extra="forbid", strict=True)
    lora_name: Annotated[str, _NAME]


def create(registry: Registry, settings: Settings, model: str, metrics: Metrics, log: Log = lambda _: None) -> ASGIApp:
    """The application; ``model`` is the pipeline's name of the model, which no answer shows."""
    if settings.admin_token is None:
        raise StylemuseError("the administration needs a token of its own")
    app = FastAPI(title="stylemuse administration", docs_url=None, redoc_url=None)
    errors.install(app, model, settings.model)

    @app.get("/livez")
    async def live() -> dict[str, bool]:
        return {"live": True}

    @app.post("/v1/load_lora_adapter")
    async def load(given: Load) -> dict[str, Any]:
        def work() -> Adapter:
            return registry.load(
                given.lora_name, given.lora_path, alpha=given.alpha, recipe=given.recipe, swap=given.load_inplace
            )

        return _facts(await run_in_threadpool(work))

    @app.put("/v1/adapters/{name}")
    async def upload(
        name: str,
        request: Request,
        alpha: Annotated[float | None, Query(gt=0, allow_inf_nan=False)] = None,
        recipe: Annotated[str | None, Query(max_length=64)] = None,
        descriptor: Annotated[str, Query(max_length=200)] = "",
        swap: bool = False,
    ) -> dict[str, Any]:
        data = await request.body()
        if not data:
            raise ApiError(400, "the body must be a LoRA's .safetensors file")

        def work() -> Adapter:
            return registry.upload(name, data, alpha=alpha, recipe=recipe, descriptor=descriptor, swap=swap)

        return _facts(await run_in_threadpool(work))

    @app.post("/v1/unload_lora_adapter")
    async def unload(given: Unload) -> dict[str, Any]:
        await run_in_threadpool(registry.unload, given.lora_name)
        return {"id": given.lora_name, "unloaded": True}

    return Boundary(
        app,
        token=settings.admin_token,
        public=HEALTH,
        body=settings.limits.upload,
        seconds=settings.limits.seconds,
        log=log,
        on_answer=metrics.on_answer,
    )


def _facts(adapter: Adapter) -> dict[str, Any]:
    return {"id": adapter.name, "root": f"{adapter.name}@{adapter.sha256[:12]}", "rank": adapter.rank}
