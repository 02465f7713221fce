"""``stylemuse serve``: the OpenAI Images API, many styles in one batch."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ..core import StylemuseError
from . import options
from .output import document, one_line

TOKEN, ADMIN_TOKEN = "STYLEMUSE_TOKEN", "STYLEMUSE_ADMIN_TOKEN"
"""Environment variables of the tokens: an argument would be seen in the list of processes."""

BACKLOG = 2048

ARENAS = 2
"""Of glibc's memory. It gives threads up to 8 per core, and what is free in one serves no other: of a server of the
embedded model 43 to 99 MB lay free in them, and 51 to 60 MB in two."""


def serve(
    host: Annotated[str, typer.Option("--host", help="Where to listen.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one.")] = 8000,
    admin_port: Annotated[
        int | None,
        typer.Option("--admin-port", min=0, max=65535, help=f"Administration, with the token of {ADMIN_TOKEN}."),
    ] = None,
    adapters: Annotated[
        Path | None, typer.Option("--adapters", help="The folder that the administration may load styles from.")
    ] = None,
    state: Annotated[
        Path | None, typer.Option("--state", help="A folder for the styles that are registered; they come back.")
    ] = None,
    size: Annotated[
        list[str] | None, typer.Option("--size", help="WIDTHxHEIGHT that may be asked for; may be repeated.")
    ] = None,
    max_rows: Annotated[int | None, typer.Option("--max-rows", min=1, help="Rows of a forward pass; 32.")] = None,
    memory: Annotated[
        float | None, typer.Option("--memory", help="GiB beside the model; decides --max-rows if that is left out.")
    ] = None,
    max_requests: Annotated[int, typer.Option("--max-requests", min=1, help="Accepted at once; more get 429.")] = 256,
    slots: Annotated[int, typer.Option("--slots", min=1, help="Styles that are resident at once.")] = 64,
    rank: Annotated[int, typer.Option("--rank", min=1, help="Largest rank of a style.")] = 32,
    drain: Annotated[float, typer.Option("--drain", min=0, help="Seconds to finish after SIGTERM.")] = 60.0,
    model: options.Model = "demo",
    backend: options.Backend = "auto",
    device: options.Device = None,
    dtype: options.Dtype = None,
    quantization: options.Quantization = None,
    as_json: options.Json = False,
) -> None:
    """Serve pictures; the token of clients, if any, is in STYLEMUSE_TOKEN."""
    try:
        from ..serving.run import Service, listen
        from ..serving.run import serve as run
        from ..serving.settings import Settings
    except ImportError as error:
        raise StylemuseError(f"{error.name} is not installed; pip install 'stylemuse[serve]'") from None
    token, admin_token = os.environ.get(TOKEN), os.environ.get(ADMIN_TOKEN)
    _check(admin_port, admin_token, adapters, state)
    _limit_arenas()
    asked = [options.size(value) for value in size or ()]
    settings = Settings(
        model=Path(model).name,
        sizes=tuple(each for each in asked if each is not None) or ((1, 1),),
        token=token,
        admin_token=admin_token if admin_port is not None else None,
        adapters=adapters,
        state=state,
    )
    public = listen(host, port)
    private = listen(host, admin_port) if admin_port is not None else None
    import stylemuse

    pipe = stylemuse.load(
        model, backend=backend, device=device, dtype=dtype, quantization=quantization, slots=slots, rank=rank
    )
    if not asked:
        from dataclasses import replace

        side = pipe.network.sizes.side * pipe.network.sizes.factor
        settings = replace(settings, sizes=((side, side),))
    budget = None if memory is None else int(memory * 2**30)
    service = Service(
        pipe,
        settings,
        max_rows=max_rows,
        memory=budget,
        max_requests=max_requests,
        drain_seconds=drain,
        log=_log,
    )
    for sock in (public, private):
        if sock is not None:
            sock.listen(BACKLOG)  # from here on a client waits for the first answer instead of being turned away
    at = {"url": _url(host, public.getsockname()[1]), "admin": None, "model": settings.model}
    if private is not None:
        at["admin"] = _url(host, private.getsockname()[1])
    if as_json:
        document(at | {"max_rows": service.engine.max_rows, "explain": pipe.explain()})
        sys.stdout.flush()
    else:
        _log({"event": "serving", **at, "max_rows": service.engine.max_rows})
    run(service, public, private)


def _check(port: int | None, token: str | None, adapters: Path | None, state: Path | None) -> None:
    if port is not None and token is None:
        raise StylemuseError(f"--admin-port needs a token in {ADMIN_TOKEN}")
    if port is None and (adapters is not None):
        raise StylemuseError("--adapters has no effect without --admin-port")
    if adapters is not None and not adapters.is_dir():
        raise StylemuseError(f"--adapters {adapters} is not a folder")
    if state is not None and state.exists() and not state.is_dir():
        raise StylemuseError(f"--state {state} is not a folder")


def _limit_arenas() -> None:
    """Before there are threads; nothing where the C library is another, or the environment says how many."""
    import ctypes

    mallopt = None if sys.platform == "win32" else getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and "MALLOC_ARENA_MAX" not in os.environ:
        mallopt(ctypes.c_int(-8), ctypes.c_int(ARENAS))  # M_ARENA_MAX


def _log(record: Mapping[str, Any]) -> None:
    """One JSON object a line on standard error."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    print(one_line(json.dumps({"time": now, **record}, ensure_ascii=True)), file=sys.stderr, flush=True)


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
