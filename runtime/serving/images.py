"""POST /v1/images/generations: pictures in one answer, or as a stream of events while they appear."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import time
from collections.abc import AsyncIterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse
from PIL import Image
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from ..engine.engine import Engine
from ..engine.ticket import Snapshot, Ticket
from .errors import api_error, request_id
from .openapi import event_stream, failures
from .schema import Generation, Picture, PictureEvent, Pictures, TokenDetails, Usage
from .settings import Settings
from .translation import Facts, to_request

GENERATIONS = "/v1/images/generations"
_THREADS = 2
"""Decode and encode pictures. As many as there are clients would crowd out the steps, and each keeps memory of its own
for convolutions."""
_ANSWERS = failures(429, 499, 503, 504) | {200: {"content": event_stream(PictureEvent)}}


class Images:
    """Draws what clients ask for on an engine."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine, self._settings = engine, settings
        pipe = engine.pipe
        self._factor = pipe.network.sizes.factor
        self._threads = ThreadPoolExecutor(_THREADS, "stylemuse-pictures")
        self.router = APIRouter()
        self.router.add_api_route(
            GENERATIONS,
            self.generate,
            methods=["POST"],
            response_model=Pictures,
            response_model_exclude_none=True,
            responses=_ANSWERS,
        )

    async def generate(self, given: Generation, request: Request) -> Response | Pictures:
        """Draw a prompt."""
        defaults = self._engine.pipe.defaults
        wanted = to_request(given, self._settings, defaults, self._factor, self._recommended)
        request.scope["facts"] = {"pictures": given.n, "style": given.style, "user": given.user}
        previews, limit = given.partial_images or 0, given.timeout or self._settings.limits.seconds

        def submit() -> tuple[Ticket, int]:
            network = self._engine.pipe.network
            ticket = self._engine.submit(wanted, priority=given.priority, timeout=limit, previews=previews)
            return ticket, min(network.prompt_tokens(given.prompt), network.text_length)

        ticket, read = await run_in_threadpool(submit)
        drawing = _Drawing(self._engine, self._settings, given, ticket, self._threads, read)
        if given.stream:
            return StreamingResponse(drawing.events(request), media_type="text/event-stream", headers=_UNBUFFERED)
        async with _until_it_leaves(request, ticket):
            return await drawing.answer()

    def _recommended(self, style: str) -> Facts:
        return self._engine.pipe.adapters.version(style).recommended


_UNBUFFERED = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


class _Drawing:
    """One generation."""

    def __init__(
        self, engine: Engine, settings: Settings, given: Generation, ticket: Ticket, threads: Executor, read: int
    ) -> None:
        """``read``: tokens of the prompt."""
        self._pipe, self._settings, self._given, self._ticket = engine.pipe, settings, given, ticket
        self._threads, self._read, self._unread = threads, read, ticket.unread or None
        self._created = int(time.time())

    async def answer(self) -> Pictures:
        """All pictures."""
        result = await self._ticket
        height, width = result.tokens.shape[1:]
        encoded = await asyncio.gather(*(self._encoded(image) for image in result.images))
        kind = self._given.output_format
        pictures = [
            Picture(b64_json=data, seed=seed)
            if self._given.response_format == "b64_json"
            else Picture(url=f"data:image/{kind};base64,{data}", seed=seed)
            for data, seed in zip(encoded, result.seeds, strict=True)
        ]
        usage = self._usage(len(pictures) * height * width)
        size = f"{result.images[0].width}x{result.images[0].height}"
        return Pictures(
            created=self._created,
            data=pictures,
            output_format=kind,
            size=size,
            usage=usage,
            unread=self._unread,
        )

    async def events(self, request: Request) -> AsyncIterator[str]:
        """Partial pictures, then each finished one; an error is an event too, for the answer has begun."""
        try:
            async with _until_it_leaves(request, self._ticket):
                counts = [0] * len(self._ticket.seeds)
                async for snapshot in self._ticket:
                    yield await self._partial(snapshot, counts[snapshot.picture])
                    counts[snapshot.picture] += 1
                result = await self._ticket
                tokens = result.tokens[0].size
                for index, (image, seed) in enumerate(zip(result.images, result.seeds, strict=True)):
                    facts = {
                        "index": index,
                        "seed": seed,
                        "usage": self._usage(tokens),
                        "unread": self._unread,
                    }
                    yield await self._event("image_generation.completed", image, facts)
        except Exception as error:
            found = api_error(error, self._pipe.name, self._settings.model)
            if found.status == 500:
                request.scope["failure"] = repr(error.__cause__ or error)
            yield f"event: error\ndata: {json.dumps(found.body(request_id(request)))}\n\n"
        finally:
            self._ticket.cancel()

    async def _partial(self, snapshot: Snapshot, count: int) -> str:
        image = await asyncio.get_running_loop().run_in_executor(self._threads, snapshot.image)
        facts = {"index": snapshot.picture, "step": snapshot.step, "steps": snapshot.steps}
        return await self._event("image_generation.partial_image", image, facts | {"partial_image_index": count})

    async def _event(
        self,
        kind: Literal["image_generation.partial_image", "image_generation.completed"],
        image: Image.Image,
        facts: dict[str, Any],
    ) -> str:
        event = PictureEvent(
            type=kind,
            b64_json=await self._encoded(image),
            created_at=self._created,
            output_format=self._given.output_format,
            size=f"{image.width}x{image.height}",
            **facts,
        )
        return f"event: {kind}\ndata: {event.model_dump_json(exclude_none=True)}\n\n"

    async def _encoded(self, image: Image.Image) -> str:
        def encode() -> str:
            buffer, kind, quality = io.BytesIO(), self._given.output_format, self._given.output_compression
            options: dict[str, Any] = {"lossless": True} if kind == "webp" and quality is None else {}
            if kind == "jpeg" and quality is None:
                options = {"quality": 95}
            elif quality is not None:
                options = {"quality": quality}
            image.save(buffer, kind.upper(), **options)
            return base64.b64encode(buffer.getvalue()).decode()

        return await asyncio.get_running_loop().run_in_executor(self._threads, encode)

    def _usage(self, drawn: int) -> Usage:
        read, details = self._read, TokenDetails(text_tokens=self._read)
        return Usage(input_tokens=read, output_tokens=drawn, total_tokens=read + drawn, input_tokens_details=details)


@asynccontextmanager
async def _until_it_leaves(request: Request, ticket: Ticket) -> AsyncIterator[None]:
    """While inside, a client that leaves cancels its request."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        ticket.cancel()

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await watching
