"""A server as a process: sockets, signals, draining.

SIGTERM or SIGINT: no new requests (503, /readyz says so), what was accepted is finished and answered, then the sockets
close. A second signal stops at once.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from ..core import StylemuseError
from ..engine.engine import Engine
from ..loading.assembly import in_torch
from ..pipeline import Pipeline
from . import admin, app
from .boundary import Log
from .metrics import Metrics
from .registry import Registry
from .settings import Settings
from .store import Store


class Service:
    """An engine with its applications; usable without a process of its own, for tests and embedding.

    Args:
        pipe: what draws. max_rows, memory, max_requests: the engine's.
        drain_seconds: for accepted requests to finish; what is left then ends with 503.
    """

    def __init__(
        self,
        pipe: Pipeline,
        settings: Settings,
        *,
        max_rows: int | None = None,
        memory: int | None = None,
        max_requests: int = 256,
        drain_seconds: float = 60.0,
        log: Log = lambda _: None,
    ) -> None:
        self.draining, self._drain_seconds = False, drain_seconds
        metrics = Metrics()
        # Styles come and go by it; an exported folder has those it has, so none is made for it unless it is asked for.
        self.registry: Registry | None = None
        if settings.state is not None or settings.admin_token is not None:
            store = Store(settings.state) if settings.state is not None else None
            self.registry = Registry(in_torch(pipe).adapters, store, settings.adapters)
        self.engine = Engine(
            pipe,
            max_rows=max_rows,
            memory=memory,
            max_requests=max_requests,
            on_step=metrics.on_step,
            on_end=metrics.on_end,
        )
        self.app: ASGIApp = app.create(self.engine, settings, metrics, ready=lambda: not self.draining, log=log)
        self.admin: ASGIApp | None = None
        if settings.admin_token is not None and self.registry is not None:
            self.admin = admin.create(self.registry, settings, pipe.name, metrics, log)

    def drain(self) -> None:
        """Accept nothing more, and wait until everything accepted has ended."""
        self.draining = True
        self.engine.close(finish=True, timeout=self._drain_seconds)


class Server(uvicorn.Server):
    """uvicorn's server, whose first signal drains and whose second one stops."""

    def __init__(self, application: ASGIApp, drain: Callable[[], None] | None) -> None:
        super().__init__(
            uvicorn.Config(application, log_config=None, access_log=False, lifespan="off", server_header=False)
        )
        self._drain, self._signalled = drain, False

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn does, but the process's server only: the others follow it."""
        if self._drain is None:
            yield
            return
        with super().capture_signals():
            yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, in a thread so that answers go on; the second stops."""
        if self._signalled or self._drain is None:
            self.should_exit = self.force_exit = True
            return
        self._signalled = True
        threading.Thread(target=self._leave, name="stylemuse-drain", daemon=True).start()

    def _leave(self) -> None:
        assert self._drain is not None
        self._drain()
        self.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """A bound socket; port 0 takes a free one."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
    except (OSError, OverflowError) as error:
        made.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise StylemuseError(f"cannot listen on {host}:{port}: {reason}") from None
    return made


def serve(service: Service, public: socket.socket, private: socket.socket | None) -> None:
    """Serve until a signal, then drain."""
    main = Server(service.app, service.drain)
    others = []
    if private is not None:
        assert service.admin is not None, "an administration needs its token"
        others = [(Server(service.admin, None), private)]

    async def run() -> None:
        beside = [asyncio.create_task(server.serve([sock])) for server, sock in others]
        await main.serve([public])
        for server, _ in others:
            server.should_exit = True
        await asyncio.gather(*beside)

    try:
        asyncio.run(run())
    finally:
        service.engine.close(finish=False)
