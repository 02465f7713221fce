"""A real server on loopback, in this process: what the tests of the network talk to."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import uvicorn
from drawing import load

from stylemuse import Pipeline
from stylemuse.serving.run import Service, listen
from stylemuse.serving.settings import Settings

SOON = 60.0
ADMIN_TOKEN = "administrator"
SIZES = ((32, 32), (16, 32))


@dataclass
class Live:
    """A running server: its pipeline, its service, its addresses, and what it logged."""

    pipe: Pipeline
    service: Service
    url: str = ""
    admin: str = ""
    records: list[Any] = field(default_factory=list)

    def client(self, token: str | None = None) -> httpx2.Client:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return httpx2.Client(base_url=self.url, timeout=SOON, headers=headers)

    def administrator(self) -> httpx2.Client:
        return httpx2.Client(base_url=self.admin, timeout=SOON, headers={"Authorization": f"Bearer {ADMIN_TOKEN}"})


@contextmanager
def serving(model: Path, settings: dict[str, Any] | None = None, **options: Any) -> Iterator[Live]:
    """A server of the model, its administration included."""
    pipe, records = load(model), list[Any]()
    chosen = Settings(**{"model": "tiny", "sizes": SIZES, "admin_token": ADMIN_TOKEN} | (settings or {}))
    service = Service(pipe, chosen, log=records.append, **options)
    live, servers, threads = Live(pipe, service, records=records), [], []
    for app, name in ((service.app, "url"), (service.admin, "admin")):
        if app is None:
            continue
        sock = listen("127.0.0.1", 0)
        setattr(live, name, f"http://127.0.0.1:{sock.getsockname()[1]}")
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="off"))
        threads.append(threading.Thread(target=server.run, args=([sock],)))
        servers.append(server)
        sock.listen()
    for thread in threads:
        thread.start()
    try:
        yield live
    finally:
        service.engine.close(finish=False)
        for server in servers:
            server.should_exit = True
        for thread in threads:
            thread.join(SOON)
