"""``stylemuse bench serve``: an engine and a server under load, and what sharing a batch costs there.

engine   in this process: MLPerf's scenarios (`load`), rounds of requests in many styles, changes of style (`sharing`)
server   the same by HTTP on ``stylemuse serve`` in a process of its own, or on one that runs (--url)
law      what "same request, same bytes" costs (`law`)

The Server scenario follows with as many places as the capacity can serve within the latency bound; more are refused.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from stylemuse import Engine, Pipeline, StylemuseError
from stylemuse.adapters.canonical import Adapter
from stylemuse.adapters.formats import pack
from stylemuse.backend.machine import DTYPES
from stylemuse.loading.assembly import in_torch

from ..harness import measure
from ..harness.arguments import Arguments, count
from ..harness.networks import MODELS, pipeline, random_adapter, style_name, write_folder
from ..step import steps
from . import client, law, load, sharing

PARTS = ("engine", "server", "law")
LOADS = (0.5, 0.8, 1.0, 2.0, 10.0)
"""Arrival rates of the Server scenario, as multiples of the capacity."""
CHANGES = 200
"""Changes of style that are timed."""


Opened = Callable[[int], AbstractContextManager[sharing.Draws]]
"""Something that answers, which accepts so many requests at once."""


def loaded(opened: Opened, styles: Sequence[str], options: Any, where: str) -> list[dict[str, Any]]:
    """All scenarios and rounds; their names begin with ``where``."""
    with opened(options.clients) as draws:
        draw = draws([None, *styles])
        rows, rate, bound = asyncio.run(load.capacity(draw, options.requests, options.clients, options.bound))
        rows += sharing.rounds(draws, styles, repeats=options.repeats)
    places = options.max_requests or load.places(rate, bound)
    with opened(places) as draws:
        draw = draws([None, *styles])
        rows += asyncio.run(load.overload(draw, options.requests, rate, bound, loads=options.loads, seed=options.seed))
    return [each | {"name": f"{where}: {each['name']}", "where": where, "places": places} for each in rows]


@contextmanager
def _engine(pipe: Pipeline, options: Any, places: int) -> Iterator[sharing.Draws]:
    with Engine(pipe, max_rows=options.max_rows, max_requests=places) as engine:
        yield lambda styles: load.on_engine(engine, styles, options.steps, options.seed)


@contextmanager
def _server(folder: Path, adapters: Sequence[Adapter], options: Any, places: int) -> Iterator[sharing.Draws]:
    """A server of the folder's model with these styles."""
    arguments = ["--model", folder, "--max-requests", places, "--max-rows", options.max_rows]
    arguments += ["--dtype", options.dtype] if options.dtype else []
    arguments += ["--device", options.device] if options.device else []
    with client.server([str(each) for each in arguments]) as at:
        for adapter in adapters:
            (data,) = pack(adapter, "diffusers").values()
            path = f"/v1/adapters/{adapter.name}"
            answer = client.send(at.admin, "PUT", path, data, token=at.token)
            if answer.status != 200:
                raise StylemuseError(f"{path}: answered {answer.status}")
        yield lambda styles: load.on_server(at.url, styles, options.steps, options.seed, None)


def _known(url: str, token: str | None) -> list[str]:
    """The styles of a running server."""
    models = client.send(url, "GET", "/v1/models", token=token).document["data"]
    return [model["id"] for model in models if model["parent"]]


def measured(options: Any) -> tuple[Pipeline, dict[str, list[dict[str, Any]]]]:
    """The rows by kind, of all parts that are asked for."""
    names = [style_name(index) for index in range(options.styles)]
    pipe = pipeline(options.model, device=options.device, dtype=options.dtype, slots=len(names) + 1, rank=steps.RANK)
    adapters = [random_adapter(pipe, name, rank=steps.RANK, seed=index) for index, name in enumerate(names)]
    for adapter in adapters:
        pipe.adapters.add(adapter.name, adapter)
    served: list[dict[str, Any]] = []
    changed: list[dict[str, Any]] = []
    if "engine" in options.parts:
        served += loaded(partial(_engine, pipe, options), names, options, "engine")
        with _engine(pipe, options, options.clients) as draws:
            changed.append(sharing.changes(pipe, draws([None, *names]), names, repeats=CHANGES))
    if "server" in options.parts:
        with write_folder(options.model) as folder:
            served += loaded(partial(_server, folder, adapters, options), names, options, "server")
    if "law" in options.parts:
        served += law.rows(
            in_torch(pipe), names[0], batch=options.styles, decoding=options.steps, repeats=options.repeats
        )
    return pipe, {"serve": served, "adapter_swap": changed}


def show(rows: Sequence[dict[str, Any]]) -> None:
    """The tables: of the scenarios, and of all that has a ratio."""
    heads = ("done", "refused", "p50 ms", "p99 ms", "per s", "goodput", "refusal p99 ms")
    print(f"{'':36}" + "".join(f"{head:>16}" for head in heads))
    for each in rows:
        if "outcomes" in each and "skipped" not in each:
            outcomes, latency, refusal = each["outcomes"], each.get("latency"), each.get("refusal_tail")
            tail = each["latency_tail"]["p99"] * 1e3 if latency else float("nan")
            middle = latency["p50"] * 1e3 if latency else float("nan")
            refused = f"{refusal['p99'] * 1e3:16.2f}" if refusal else f"{'-':>16}"
            numbers = f"{middle:16.1f}{tail:16.1f}{each['throughput']:16.2f}{each['goodput']:16.2f}"
            print(f"{each['name']:36}{outcomes.get('done', 0):16}{outcomes.get('refused', 0):16}{numbers}{refused}")
    for each in rows:
        ratio = next((each[name] for name in ("to_base", "to_free") if name in each), None)
        times = next((each[name] for name in ("wall", "kept", "step") if name in each), None)
        if times is not None:
            shown = "" if ratio is None else f"{ratio:9.3f} x"
            print(f"{each['name']:60}{times['p50'] * 1e3:12.4f} ms{shown}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the tables, and on the last line all of it as one JSON document."""
    parser = Arguments(prog="stylemuse bench serve", description=__doc__.partition("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--model", choices=MODELS, default="demo")
    parser.add_argument("--url", help="a running server, with its own styles, in place of all parts")
    parser.add_argument("--token", help="its bearer token")
    parser.add_argument("--requests", type=count, default=96, help="per scenario, and more where arrivals are faster")
    parser.add_argument("--clients", type=count, default=64, help="at the same time, for the capacity")
    parser.add_argument(
        "--styles", type=count, default=8, help="random styles beside the base, and requests of a round"
    )
    parser.add_argument("--steps", type=count, default=12)
    parser.add_argument("--loads", type=float, nargs="*", default=list(LOADS), help="multiples of the capacity")
    parser.add_argument("--bound", type=float, help="seconds; 4 times the median of a request alone if left out")
    parser.add_argument("--repeats", type=count, default=7, help="of each round")
    parser.add_argument("--max-rows", type=count, default=32)
    parser.add_argument("--max-requests", type=count, help="as many as are done within the bound if left out")
    parser.add_argument("--dtype", choices=DTYPES)
    parser.common()
    options = parser.parse_args(arguments)
    if any(each <= 0 for each in options.loads) or (options.bound is not None and options.bound <= 0):
        parser.error("--loads and --bound are above 0")
    if options.token and not options.url:
        parser.error("--token has no effect without --url")
    if options.url:
        device, kinds = torch.device("cpu"), {"serve": _of_a_running_one(options)}
    else:
        pipe, kinds = measured(options)
        device = torch.device(pipe.network.device)
    facts = {"model": options.url or options.model, "steps": options.steps, "max_rows": options.max_rows}
    kinds = {kind: [facts | {"device": str(device)} | row for row in rows] for kind, rows in kinds.items() if rows}
    show([row for rows in kinds.values() for row in rows])
    measure.publish(measure.document(parser.command, options.seed, device, {}, **kinds), options.out)


def _of_a_running_one(options: Any) -> list[dict[str, Any]]:
    """Its places are its own."""
    styles = _known(options.url, options.token)[: options.styles]
    if not styles:
        raise StylemuseError(f"{options.url} has no styles, which the rounds need")

    def draws(chosen: Sequence[str | None]) -> load.Draw:
        return load.on_server(options.url, chosen, options.steps, options.seed, options.token)

    return loaded(lambda _: nullcontext(draws), styles, options, "server")
