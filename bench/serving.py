"""``stylemuse bench serve``: an engine, or a server, under load, in MLPerf's scenarios.

SingleStream  closed loop, one request at a time: latency (MLPerf looks at the 90th percentile)
Offline       everything at once: throughput, which is the capacity
Server        open loop, Poisson arrivals at multiples of the capacity, whether or not answers keep up: latency, how
              many are done within the bound (goodput), and how soon the others are refused

A request draws one picture, on the base and in each style in turn.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from stylemuse import Engine, Pipeline, QueueFullError, Request, Sampling
from stylemuse.machine import DTYPES

from . import client, measure, steps
from .arguments import Arguments, count
from .networks import MODELS, pipeline, random_adapter

LOADS = (0.5, 0.8, 1.0, 2.0, 10.0)
"""Arrival rates of the Server scenario, as multiples of the capacity."""
BOUND = 4.0
"""The latency bound, as a multiple of the median of a request alone."""

Draw = Callable[[int], Coroutine[Any, Any, str]]
"""Sends request number i and waits for its end: "done", "refused" or "failed"."""


def on_engine(engine: Engine, styles: Sequence[str | None], decoding: int, seed: int) -> Draw:
    """Requests to an engine in this process."""

    async def draw(index: int) -> str:
        request = Request(
            "a fox", style=styles[index % len(styles)], seed=seed + index, sampling=Sampling(steps=decoding)
        )
        try:
            ticket = await asyncio.to_thread(engine.submit, request)
            await ticket
        except QueueFullError:
            return "refused"
        return "done"

    return draw


def on_server(url: str, styles: Sequence[str | None], decoding: int, seed: int, token: str | None) -> Draw:
    """Requests to a server; each has a thread while it is under way."""
    threads = ThreadPoolExecutor(2048)

    def send(index: int) -> str:
        body: dict[str, Any] = {"prompt": "a fox", "seed": seed + index, "num_inference_steps": decoding}
        if style := styles[index % len(styles)]:
            body["style"] = style
        try:
            answer = client.send(url, "POST", client.GENERATIONS, json.dumps(body).encode(), token=token, timeout=600)
        except OSError:
            return "failed"
        return "done" if answer.status == 200 else "refused" if answer.status in (429, 503) else "failed"

    async def draw(index: int) -> str:
        return await asyncio.get_running_loop().run_in_executor(threads, send, index)

    return draw


async def closed(draw: Draw, requests: int, clients: int) -> tuple[list[tuple[str, float]], float]:
    """So many clients, each with one request at a time: outcome and latency of every request, and all seconds."""
    ends: list[tuple[str, float]] = []
    indices = iter(range(requests))

    async def run() -> None:
        ends.extend([await _timed(draw, index) for index in indices])

    began = time.perf_counter()
    await asyncio.gather(*(run() for _ in range(clients)))
    return ends, time.perf_counter() - began


async def opened(draw: Draw, requests: int, rate: float, seed: int) -> tuple[list[tuple[str, float]], float]:
    """Poisson arrivals at so many a second; a latency counts from when the request should have been sent."""
    gaps = np.random.default_rng(seed).exponential(1.0 / rate, requests)
    began = time.perf_counter()

    async def arrive(index: int, at: float) -> tuple[str, float]:
        await asyncio.sleep(max(0.0, began + at - time.perf_counter()))
        outcome = await draw(index)
        return outcome, time.perf_counter() - began - at

    ends = await asyncio.gather(*(arrive(index, float(at)) for index, at in enumerate(np.cumsum(gaps))))
    return list(ends), time.perf_counter() - began


async def _timed(draw: Draw, index: int) -> tuple[str, float]:
    began = time.perf_counter()
    outcome = await draw(index)
    return outcome, time.perf_counter() - began


def row(
    scenario: str, ends: Sequence[tuple[str, float]], seconds: float, bound: float | None, **facts: Any
) -> dict[str, Any]:
    """What a scenario gave; goodput counts requests done within the bound, per second."""
    outcomes = Counter(outcome for outcome, _ in ends)
    made: dict[str, Any] = {"name": facts.pop("name", scenario), "scenario": scenario, **facts}
    made |= {"requests": len(ends), "outcomes": dict(outcomes), "seconds": seconds, "bound": bound}
    for outcome, name in (("done", "latency"), ("refused", "refusal")):
        if values := [latency for ended, latency in ends if ended == outcome]:
            p90, p95, p99 = (float(value) for value in np.percentile(values, (90, 95, 99)))
            made[name] = measure.series(values)
            made[f"{name}_tail"] = {"p90": p90, "p95": p95, "p99": p99}
    made["throughput"] = outcomes["done"] / seconds
    within = sum(outcome == "done" and (bound is None or latency <= bound) for outcome, latency in ends)
    made["goodput"] = within / seconds
    if not (outcomes["done"] or outcomes["refused"]):
        made["skipped"] = "no request was answered"
    return made


async def scenarios(
    draw: Draw, requests: int, *, loads: Sequence[float], bound: float | None, seed: int, most: int
) -> list[dict[str, Any]]:
    """All three, the Server scenario at each load; ``most`` are sent at once in Offline."""
    await closed(draw, 2, 1)  # warm
    ends, seconds = await closed(draw, max(4, requests // 8), 1)
    bound = bound if bound is not None else BOUND * float(np.median([latency for _, latency in ends]))
    rows = [row("SingleStream", ends, seconds, bound)]
    ends, seconds = await closed(draw, requests, most)
    rows.append(row("Offline", ends, seconds, None))
    capacity = rows[-1]["throughput"]
    for load in loads if capacity else ():
        number = max(requests, round(requests * load))
        ends, seconds = await opened(draw, number, load * capacity, seed)
        rows.append(
            row("Server", ends, seconds, bound, name=f"Server, {load:g} x capacity", load=load, rate=load * capacity)
        )
    peak = max((each["goodput"] for each in rows if each["scenario"] == "Server"), default=0.0)
    return [
        each | ({"to_peak": each["goodput"] / peak} if each["scenario"] == "Server" and peak else {}) for each in rows
    ]


def show(rows: Sequence[dict[str, Any]]) -> None:
    """The table."""
    heads = ("done", "refused", "p50 ms", "p99 ms", "per s", "goodput", "refusal p99 ms")
    print(f"{'scenario':28}" + "".join(f"{head:>16}" for head in heads))
    for each in rows:
        outcomes, latency, refusal = each["outcomes"], each.get("latency"), each.get("refusal_tail")
        tail = each["latency_tail"]["p99"] * 1e3 if latency else float("nan")
        middle = latency["p50"] * 1e3 if latency else float("nan")
        refused = f"{refusal['p99'] * 1e3:16.2f}" if refusal else f"{'-':>16}"
        numbers = f"{middle:16.1f}{tail:16.1f}{each['throughput']:16.2f}{each['goodput']:16.2f}"
        print(f"{each['name']:28}{outcomes.get('done', 0):16}{outcomes.get('refused', 0):16}{numbers}{refused}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, and on the last line all of it as one JSON document."""
    parser = Arguments(prog="stylemuse bench serve", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="demo")
    parser.add_argument("--url", help="a running server in place of an engine in this process")
    parser.add_argument("--token", help="the server's bearer token")
    parser.add_argument("--requests", type=count, default=64, help="per scenario, and more where arrivals are faster")
    parser.add_argument("--styles", type=count, default=8, help="random styles beside the base; of a server its own")
    parser.add_argument("--steps", type=count, default=12)
    parser.add_argument("--loads", type=float, nargs="*", default=list(LOADS), help="multiples of the capacity")
    parser.add_argument("--bound", type=float, help="seconds; 4 times the median of a request alone if left out")
    parser.add_argument("--max-rows", type=count, default=32)
    parser.add_argument("--max-requests", type=count, default=64)
    parser.add_argument("--device")
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="also write the document here")
    options = parser.parse_args(arguments)
    if any(load <= 0 for load in options.loads) or (options.bound is not None and options.bound <= 0):
        parser.error("--loads and --bound are above 0")
    given = sys.argv[1:] if arguments is None else list(arguments)
    pipe = pipeline(
        "demo" if options.url else options.model, device=options.device, dtype=options.dtype, slots=options.styles + 1
    )
    run = {"loads": options.loads, "bound": options.bound, "seed": options.seed, "most": options.max_requests}
    if options.url:
        models = client.send(options.url, "GET", "/v1/models", token=options.token).document["data"]
        styles = [None, *(model["id"] for model in models if model["parent"])]
        draw = on_server(options.url, styles, options.steps, options.seed, options.token)
        rows = asyncio.run(scenarios(draw, options.requests, **run))
    else:
        rows = _of_an_engine(pipe, options, run)
    show(rows)
    facts = {"model": options.url or options.model, "steps": options.steps}
    facts |= {"max_rows": options.max_rows, "max_requests": options.max_requests, "device": str(pipe.network.device)}
    command = " ".join(["stylemuse bench serve", *given])
    document = measure.document(command, options.seed, pipe.network.device, {}, serve=[each | facts for each in rows])
    if options.out is not None:
        options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document))


def _of_an_engine(pipe: Pipeline, options: Any, run: dict[str, Any]) -> list[dict[str, Any]]:
    names = [f"random-{index}" for index in range(options.styles)]
    for index, name in enumerate(names):
        pipe.adapters.add(name, random_adapter(pipe, name, rank=steps.RANK, seed=index))
    with Engine(pipe, max_rows=options.max_rows, max_requests=options.max_requests) as engine:
        draw = on_engine(engine, [None, *names], options.steps, options.seed)
        return asyncio.run(scenarios(draw, options.requests, **run))
