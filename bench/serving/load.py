"""Load on an engine or on a server, in MLPerf's scenarios, and what it comes to.

SingleStream  closed loop, one request at a time: latency (MLPerf looks at the 90th percentile)
Offline       so many clients, each with one request at a time: throughput, which is the capacity
Server        open loop, Poisson arrivals at multiples of the capacity, whether or not answers keep up: latency, how
              many are done within the bound (goodput), and how soon the others are refused
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count as counting
from typing import Any, NamedTuple

import numpy as np

from stylemuse import Engine, QueueFullError, Request, Sampling, StyleDrop

from ..harness import measure
from . import client

BOUND = 4.0
"""The latency bound, as a multiple of the median of a request alone."""
QUEUED = 0.5
"""The share of the bound's time that an accepted request may have before it: the rest is for bursts."""

Draw = Callable[[int], Coroutine[Any, Any, str]]
"""Sends request number i and waits for its end: "done", "refused" or "failed"."""

_NEW = counting()
"""No prompt is drawn twice: what is kept of one would spare the next its text."""


def _prompt() -> str:
    return f"a fox {next(_NEW)}"


def on_engine(engine: Engine, styles: Sequence[str | None], decoding: int, seed: int) -> Draw:
    """Requests of two branches to an engine in this process, in each style in turn; None is the base."""

    async def draw(index: int) -> str:
        request = Request(
            _prompt(),
            style=styles[index % len(styles)],
            seed=seed + index,
            sampling=Sampling(steps=decoding),
            guidance=StyleDrop(1.0, 1.0),
        )
        try:
            if error := engine.refusal():
                raise error
            ticket = await asyncio.to_thread(engine.submit, request)
            await ticket
        except QueueFullError:
            return "refused"
        return "done"

    return draw


def on_server(url: str, styles: Sequence[str | None], decoding: int, seed: int, token: str | None) -> Draw:
    """The same to a server; each request has a thread while it is under way."""
    threads = ThreadPoolExecutor(2048)

    def send(index: int) -> str:
        body: dict[str, Any] = {"prompt": _prompt(), "seed": seed + index, "num_inference_steps": decoding}
        body |= {"style_strength": 1.0, "text_strength": 1.0}
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


class End(NamedTuple):
    """How a request ended.

    Attributes:
        outcome: as `Draw` says.
        latency: seconds since it should have been sent. answered: since it was sent.
        at: seconds since the scenario began.
    """

    outcome: str
    latency: float
    answered: float
    at: float


async def closed(draw: Draw, requests: int, clients: int) -> list[End]:
    """So many clients, each with one request at a time."""
    ends: list[End] = []
    indices, began = iter(range(requests)), time.perf_counter()

    async def run() -> None:
        for index in indices:
            sent = time.perf_counter()
            outcome = await draw(index)
            now = time.perf_counter()
            ends.append(End(outcome, now - sent, now - sent, now - began))

    await asyncio.gather(*(run() for _ in range(clients)))
    return ends


async def opened(draw: Draw, requests: int, rate: float, seed: int) -> list[End]:
    """Poisson arrivals at so many a second, whether or not answers keep up."""
    gaps = np.random.default_rng(seed).exponential(1.0 / rate, requests)
    began = time.perf_counter()

    async def arrive(index: int, due: float) -> End:
        await asyncio.sleep(max(0.0, began + due - time.perf_counter()))
        sent = time.perf_counter()
        outcome = await draw(index)
        now = time.perf_counter()
        return End(outcome, now - began - due, now - sent, now - began)

    return list(await asyncio.gather(*(arrive(index, float(due)) for index, due in enumerate(np.cumsum(gaps)))))


def row(scenario: str, ends: Sequence[End], bound: float | None = None, **facts: Any) -> dict[str, Any]:
    """What a scenario gave; throughput counts requests that are done, goodput those done within the bound, per second.

    In an open loop both count what ends between the first bound and the last arrival: what fills and drains is neither
    of the load nor of the system.
    """
    outcomes, first, last = Counter(end.outcome for end in ends), 0.0, max(end.at for end in ends)
    made: dict[str, Any] = {"name": facts.pop("name", scenario), "scenario": scenario, **facts}
    made |= {"requests": len(ends), "outcomes": dict(outcomes), "seconds": last, "bound": bound}
    if scenario == "Server":
        arrived = max(end.at - end.latency for end in ends)
        if bound is not None and arrived > 2 * bound:
            first, last = bound, arrived
    for outcome, name in (("done", "latency"), ("refused", "refusal")):
        values = [end.latency if outcome == "done" else end.answered for end in ends if end.outcome == outcome]
        if values:
            p90, p95, p99 = (float(value) for value in np.percentile(values, (90, 95, 99)))
            made[name] = measure.series(values)
            made[f"{name}_tail"] = {"p90": p90, "p95": p95, "p99": p99}
    done = [end.latency for end in ends if end.outcome == "done" and first <= end.at <= last]
    made["throughput"] = len(done) / (last - first)
    made["goodput"] = sum(bound is None or latency <= bound for latency in done) / (last - first)
    if not (outcomes["done"] or outcomes["refused"]):
        made["skipped"] = "no request was answered"
    return made


async def capacity(
    draw: Draw, requests: int, clients: int, bound: float | None = None
) -> tuple[list[dict[str, Any]], float, float]:
    """SingleStream and Offline; requests a second when there are always so many clients, and the latency bound."""
    await closed(draw, 2, 1)  # warm
    ends = await closed(draw, max(4, requests // 8), 1)
    if bound is None:
        bound = BOUND * float(np.median([end.latency for end in ends]))
    rows = [row("SingleStream", ends, bound), row("Offline", await closed(draw, requests, clients))]
    return rows, rows[-1]["throughput"], bound


def places(rate: float, bound: float) -> int:
    """How many requests to accept at once, so that an accepted one is done within the bound (Little's law)."""
    return max(1, round(QUEUED * rate * bound))


async def overload(
    draw: Draw, requests: int, rate: float, bound: float, *, loads: Sequence[float], seed: int
) -> list[dict[str, Any]]:
    """The Server scenario at multiples of the capacity ``rate``, at least so many requests each."""
    await closed(draw, 2, 1)  # warm
    rows = []
    for load in loads if rate else ():
        ends = await opened(draw, max(requests, round(requests * load)), load * rate, seed)
        facts = {"name": f"Server, {load:g} x capacity", "load": load, "rate": load * rate}
        rows.append(row("Server", ends, bound, **facts))
    peak = max((each["goodput"] for each in rows), default=0.0)
    return [each | ({"to_peak": each["goodput"] / peak} if peak else {}) for each in rows]
