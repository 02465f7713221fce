"""What a batch of many styles costs where requests come one by one, and what a change of style costs there.

round    so many requests at the same time, again when all are answered: on the base, all in one style, each in its own
change   another resident style takes a request's place, host time, while an engine draws
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle
from typing import Any

from stylemuse import Pipeline, StylemuseError

from ..harness import measure
from ..harness.networks import change_to
from .load import Draw

Draws = Callable[[Sequence[str | None]], Draw]
"""Requests in these styles in turn, as `load.on_engine` and `load.on_server` make them."""

_BREATH = 2e-3
"""Seconds between two changes: without them the changes themselves would be the load."""


def rounds(draws: Draws, styles: Sequence[str], *, repeats: int) -> list[dict[str, Any]]:
    """Seconds of a round of as many requests as styles, with the ratio to the base's."""
    number = len(styles)
    chosen: dict[str, Sequence[str | None]] = {"on the base": [None], "in one style": [styles[0]]}
    chosen[f"in {number} styles"] = styles
    runs = {name: partial(_round, draws(each), number) for name, each in chosen.items()}
    found = measure.interleaved(runs, repeats=repeats, on_run=measure.progress)
    rows: list[dict[str, Any]] = []
    for name, each in chosen.items():
        facts = {"scenario": "round", "requests": number, "styles": len(each) if each[0] else 0}
        wall = measure.series(found[name]["wall"])
        rows.append({"name": f"{number} requests at once {name}", **facts, "wall": wall})
    return [each | {"to_base": each["wall"]["p50"] / rows[0]["wall"]["p50"]} for each in rows]


def changes(pipe: Pipeline, draw: Draw, styles: Sequence[str], *, repeats: int) -> dict[str, Any]:
    """Seconds of a change to a resident style while two clients keep the engine busy."""
    ended, names, seconds = threading.Event(), cycle(styles), list[float]()

    async def client(first: int) -> None:
        index = first
        while not ended.is_set():
            await draw(index)
            index += 2

    async def load() -> None:
        await asyncio.gather(client(0), client(1))

    beside = threading.Thread(target=lambda: asyncio.run(load()))
    beside.start()
    try:
        for _ in range(repeats):
            time.sleep(_BREATH)
            began = time.perf_counter()
            change_to(pipe, next(names))
            seconds.append(time.perf_counter() - began)
    finally:
        ended.set()
        beside.join()
    facts = {"from": "resident, under load", "model": pipe.name, "registered": len(pipe.adapters)}
    return {"name": "change to a resident style while an engine draws", **facts, "wall": measure.series(seconds)}


def _round(draw: Draw, number: int) -> None:
    async def run() -> list[str]:
        return await asyncio.gather(*(draw(index) for index in range(number)))

    outcomes = asyncio.run(run())
    if set(outcomes) != {"done"}:
        raise StylemuseError(f"a round of {number} requests ended with {', '.join(outcomes)}")
