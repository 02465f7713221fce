"""``stylemuse bench adapters``: what mixing styles in a batch costs, and what changing them costs.

batch   the same pictures on the base, all in one style, and each in its own style, in turns
swap    resident: another request names another style that has a slot; host memory: a style in memory takes the place of
        the one under its name; disk: its file is read, checked and takes that place. Each with 1 to 256 registered
memory  of the process before and after a thousand swaps
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

from stylemuse.adapters import canonical
from stylemuse.backend.machine import DTYPES
from stylemuse.loading.assembly import TorchPipeline, in_torch

from ..harness import measure
from ..harness.arguments import Arguments, count
from ..harness.networks import MODELS, change_to, pipeline, random_adapter, style_name
from ..step import steps

REGISTERED = (1, 16, 64, 256)
MANY_SWAPS = 1000


def mixing(
    pipe: TorchPipeline, batch: int, *, branches: int, decoding: int, repeats: int, rates: dict[str, Any]
) -> list[dict[str, Any]]:
    """Steps of a batch without, with one and with as many adapters as pictures, each with its ratio to the first."""
    chosen = [steps.Variant(branches, batch, adapters) for adapters in steps.ADAPTERS]
    rows, _ = steps.run(pipe, chosen, steps=decoding, repeats=repeats, rates=rates)
    base = rows[0]["step"]["p50"]
    return [row | {"to_base": row["step"]["p50"] / base} for row in rows]


def swaps(pipe: TorchPipeline, registered: Sequence[int], *, repeats: int) -> list[dict[str, Any]]:
    """Times to change a style, by where the new one is and how many are registered; the pipeline's styles go."""
    for name in pipe.adapters.names:
        pipe.adapters.remove(name)
    rows, slots = [], pipe.adapters.slots
    for number in registered:
        facts = {"model": pipe.name, "registered": number, "rank": steps.RANK, "device": str(pipe.network.device)}
        if number >= slots:  # the new one comes in before the old one goes
            why = f"{number} styles and the one that comes are more than {slots} slots"
            rows.append({"name": f"{pipe.name}, {number} registered", **facts, "skipped": why})
            continue
        for index in range(len(pipe.adapters), number):
            pipe.adapters.add(style_name(index), random_adapter(pipe, style_name(index), rank=steps.RANK, seed=index))
        with _changes(pipe) as changes:
            for where, change in changes.items():
                name = f"{pipe.name}, from {where}, {number} registered"
                wall = measure.series(_times(change, repeats, pipe))
                rows.append({"name": name, "from": where, **facts, "wall": wall})
    return rows


def memory(pipe: TorchPipeline, number: int) -> dict[str, Any]:
    """The process's memory before and after that many swaps from host memory."""
    with _changes(pipe) as changes:
        _times(changes["host memory"], 10, pipe)
        before = measure.resident_bytes()
        wall = measure.series(_times(changes["host memory"], number, pipe))
        after = measure.resident_bytes()
    grown = None if before is None or after is None else after - before
    facts = {"model": pipe.name, "swaps": number, "bytes_before": before, "bytes_after": after, "bytes_grown": grown}
    return {"name": f"{pipe.name}, {number} swaps", **facts, "wall": wall}


@contextmanager
def _changes(pipe: TorchPipeline) -> Iterator[dict[str, Callable[[], Any]]]:
    """Ways to change the first style, by where the new one comes from; two take turns, so that each is a change."""
    pair = [random_adapter(pipe, style_name(0), rank=steps.RANK, seed=1000 + index) for index in range(2)]
    names, held = cycle(pipe.adapters.names), cycle(pair)
    with tempfile.TemporaryDirectory(prefix="stylemuse-bench-") as folder:
        for index, adapter in enumerate(pair):
            canonical.save(adapter, Path(folder) / str(index))
        files = cycle(Path(folder) / str(index) for index in range(2))
        yield {
            "resident": lambda: change_to(pipe, next(names)),
            "host memory": lambda: pipe.adapters.add(style_name(0), next(held), swap=True),
            "disk": lambda: pipe.adapters.add(style_name(0), next(files), swap=True),
        }


def _times(change: Callable[[], Any], repeats: int, pipe: TorchPipeline) -> list[float]:
    """Seconds of each of so many changes, after one that doesn't count."""
    change()
    seconds = []
    for _ in range(repeats):
        measure.synchronize(pipe.network.device)
        began = time.perf_counter()
        change()
        measure.synchronize(pipe.network.device)
        seconds.append(time.perf_counter() - began)
    return seconds


def show(mixed: Sequence[dict[str, Any]], swapped: Sequence[dict[str, Any]]) -> None:
    """The tables."""
    print(f"{'a step':48}{'p20 ms':>10}{'p50 ms':>10}{'p80 ms':>10}{'to base':>9}")
    for row in mixed:
        times = "".join(f"{row['step'][each] * 1e3:10.2f}" for each in ("p20", "p50", "p80"))
        print(f"{row['name']:48}{times}{row['to_base']:9.3f}")
    print(f"\n{'a swap':48}{'p20 us':>10}{'p50 us':>10}{'p80 us':>10}")
    for row in swapped:
        if "skipped" in row:
            print(f"{row['name']:48} {row['skipped']}")
            continue
        grown = f"  memory {row['bytes_grown']:+,} bytes" if row.get("bytes_grown") is not None else ""
        times = "".join(f"{row['wall'][each] * 1e6:10.1f}" for each in ("p20", "p50", "p80"))
        print(f"{row['name']:48}{times}{grown}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the tables, and on the last line all of it as one JSON document."""
    parser = Arguments(prog="stylemuse bench adapters", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="demo")
    parser.add_argument("--batch", type=count, default=8, help="pictures in a batch")
    parser.add_argument("--branches", type=int, choices=(1, 2), default=2)
    parser.add_argument("--dtype", choices=DTYPES, help="chosen by the machine if left out")
    parser.add_argument("--steps", type=count, default=12, help="decoding steps of a picture, at least 2")
    parser.add_argument("--repeats", type=count, default=5, help="of each batch")
    parser.add_argument("--swaps", type=count, default=50, help="of each kind")
    parser.add_argument("--registered", nargs="+", type=count, default=list(REGISTERED))
    parser.common()
    options = parser.parse_args(arguments)
    if options.steps < 2 or options.batch < 2:
        parser.error("--steps and --batch are at least 2")
    slots = max(*options.registered, options.batch) + 1
    pipe = in_torch(
        pipeline(
            options.model, device=options.device, dtype=options.dtype, seed=options.seed, slots=slots, rank=steps.RANK
        )
    )
    rates = measure.roofs(pipe.network.device, [pipe.network.dtype])
    mixed = mixing(
        pipe, options.batch, branches=options.branches, decoding=options.steps, repeats=options.repeats, rates=rates
    )
    swapped = swaps(pipe, sorted(set(options.registered)), repeats=options.swaps)
    swapped.append(memory(pipe, MANY_SWAPS))
    show(mixed, swapped)
    document = measure.document(
        parser.command, options.seed, pipe.network.device, rates, step=mixed, adapter_swap=swapped
    )
    measure.publish(document, options.out)
