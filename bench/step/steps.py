"""``stylemuse bench step``: latency per decoding step and its parts, beside what a step costs on paper.

Whole pictures are drawn, every variant in its turn, each time with prompts not seen before; the values are those of the
loop's own clock. The first step, in which all is masked and rows are shared, stands apart from the others.

branches   1: the prompt, no guidance    2: CFG (with a style: StyleDrop with la = lb)    3: StyleDrop with la < lb
adapters   none, one for all pictures, or many: each picture its own
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count as counting
from itertools import product
from statistics import fmean
from typing import Any

import torch

from stylemuse import CFG, Pipeline, Request, Sampling, StyleDrop
from stylemuse.backend.machine import DTYPES
from stylemuse.decoding.schedule import amused

from ..harness import measure
from ..harness.arguments import Arguments, count
from ..harness.networks import BACKENDS, MODELS, architecture, pipeline, random_adapter, style_name
from . import cost, launches

PARTS = ("transformer", "head", "sampling", "remask")
"""Of a step; one that is a single launch has none that can be told apart."""
CALL = ("text", "condition", "pixels", "total")
"""Of a call beside its steps."""
ADAPTERS = ("none", "one", "many")
RANK = 16


@dataclass(frozen=True)
class Variant:
    """What is drawn at once."""

    branches: int
    batch: int
    adapters: str

    @property
    def name(self) -> str:
        """Say "batch 4, 2 branches, many adapters"."""
        styles = {"none": "no adapter", "one": "one adapter", "many": "many adapters"}[self.adapters]
        return f"batch {self.batch}, {self.branches} branch{'es' if self.branches > 1 else ''}, {styles}"

    @property
    def adapted(self) -> int:
        """Branches of a picture that have an adapter."""
        return 0 if self.adapters == "none" else 1

    def requests(self, steps: int, numbers: Callable[[], int]) -> list[Request]:
        """One request a picture; ``numbers`` gives a number never given before."""
        guidance = {1: StyleDrop(0.0, 0.0), 2: StyleDrop(1.0, 1.0), 3: StyleDrop(1.0, 2.0)}[self.branches]
        made = []
        for index in range(self.batch):
            style = {"none": None, "one": style_name(0), "many": style_name(index)}[self.adapters]
            recipe = guidance if style is not None else CFG(1.0 if self.branches == 1 else 2.0)
            made.append(
                Request(f"a fox {numbers()}", style=style, seed=index, guidance=recipe, sampling=Sampling(steps=steps))
            )
        return made


def variants(branches: Sequence[int], batches: Sequence[int], adapters: Sequence[str]) -> list[Variant]:
    """All combinations that exist: three branches are a style's, and "many" needs more than one picture."""
    found = (Variant(*each) for each in product(branches, batches, adapters))
    return [
        v
        for v in found
        if not (v.branches == 3 and v.adapters == "none") and not (v.batch == 1 and v.adapters == "many")
    ]


def run(
    pipe: Pipeline, chosen: Sequence[Variant], *, steps: int, repeats: int, rates: dict[str, Any]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of steps and rows of calls, one of each per variant."""
    for index in range(max((v.batch for v in chosen if v.adapters == "many"), default=1)):
        if style_name(index) not in pipe.adapters:
            pipe.adapters.add(style_name(index), random_adapter(pipe, style_name(index), rank=RANK, seed=index))
    timings: dict[str, list[dict[str, Any]]] = {variant.name: [] for variant in chosen}
    numbers = counting()

    def draw(variant: Variant) -> None:
        results = pipe.run(variant.requests(steps, partial(next, numbers)))
        timings[variant.name].append(dict(results[0].timings))

    runs = {variant.name: partial(draw, variant) for variant in chosen}
    clock = measure.interleaved(
        runs, repeats=repeats, device=torch.device(pipe.network.device), on_run=measure.progress
    )
    measured = {name: values[1:] for name, values in timings.items()}  # the first was the warm-up
    step_rows = [_step_row(pipe, variant, measured[variant.name], steps, rates) for variant in chosen]
    call_rows = [
        {"name": f"{pipe.name}, {variant.name}", **_facts(pipe, variant, steps)}
        | {part: measure.series(each[part] for each in measured[variant.name]) for part in CALL}
        | {clocked: measure.series(clock[variant.name][clocked]) for clocked in ("wall", "cpu")}
        for variant in chosen
    ]
    return step_rows, call_rows


def paper(pipe: Pipeline, variant: Variant, steps: int) -> cost.Card:
    """The cost card of a step after the first, with the masked positions such a step has on average."""
    config = architecture(pipe)
    tokens = config.sample_size**2
    return cost.card(
        config,
        (config.sample_size, config.sample_size),
        pipe.network.text_length,
        pictures=variant.batch,
        branches=variant.branches,
        masked=round(fmean(amused(tokens, tokens, steps).masked_after[:-1])),
        rank=RANK,
        adapted=variant.adapted,
        width=DTYPES[measure.short(pipe.network.dtype)].itemsize,
    )


def _step_row(
    pipe: Pipeline, variant: Variant, timings: Sequence[dict[str, Any]], steps: int, rates: dict[str, Any]
) -> dict[str, Any]:
    card = paper(pipe, variant, steps)
    clocked = [part for part in (*PARTS, "step") if part in timings[0]]
    later = {part: [value for each in timings for value in each[part][1:]] for part in clocked}
    step = measure.series(later["step"])
    floor = card.floor(rates[f"{measure.short(pipe.network.dtype)}_flops"], rates["bytes"])
    return {
        "name": f"{pipe.name}, {variant.name}",
        **_facts(pipe, variant, steps),
        "cost": card.to_dict(),
        "floor": floor,
        "share_of_floor": floor["floor"] / step["p50"],
        "step": step,
        "first_step": measure.series(each["step"][0] for each in timings),
        **{part: measure.series(later[part]) for part in PARTS if part in later},
    }


def _facts(pipe: Pipeline, variant: Variant, steps: int) -> dict[str, Any]:
    network = pipe.network
    return {
        "model": pipe.name,
        "backend": network.name,
        "device": str(network.device),
        "dtype": measure.short(network.dtype),
        "batch": variant.batch,
        "branches": variant.branches,
        "adapters": variant.adapters,
        "rank": RANK if variant.adapted else 0,
        "steps": steps,
    }


def show_paper(pipe: Pipeline, chosen: Sequence[Variant], steps: int, rates: dict[str, Any]) -> None:
    """The cost cards, before anything is measured."""
    dtype = measure.short(pipe.network.dtype)
    print(f"{pipe.name} in {dtype}, a step on paper; roofs: {rates[f'{dtype}_flops'] / 1e9:.0f} GFLOP/s,", end=" ")
    print(f"{rates['bytes'] / 1e9:.1f} GB/s")
    for variant in chosen:
        card = paper(pipe, variant, steps)
        floor = card.floor(rates[f"{dtype}_flops"], rates["bytes"])
        print(
            f"  {variant.name:40}{card.flop / 1e9:9.2f} GFLOP +{card.adapter_flop / 1e9:7.3f} of adapters"
            f"{card.parameters / 1e6:8.1f} M parameters read,{card.constant_parameters / 1e6:6.1f} M left out"
            f"{floor['floor'] * 1e3:10.2f} ms at least"
        )
    counted = launches.count(architecture(pipe))
    parts = ", ".join(f"{part} {number}" for part, number in counted.items())
    print(f"  on a GPU {sum(counted.values())} launches a step: {parts}")


def show(rows: Sequence[dict[str, Any]]) -> None:
    """The table of steps, milliseconds."""
    parts = "".join(f"{part:>13}" for part in PARTS)
    print(f"{'':48}{'p20':>9}{'p50':>9}{'p80':>9}{'floor':>8}{parts}")
    for row in rows:
        times = "".join(f"{row['step'][each] * 1e3:9.1f}" for each in ("p20", "p50", "p80"))
        shares = "".join(f"{row[part]['p50'] / row['step']['p50']:13.1%}" for part in PARTS if part in row)
        print(f"{row['name']:48}{times}{row['share_of_floor']:8.0%}{shares}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the cost cards and the table, and on the last line all of it as one JSON document."""
    parser = Arguments(prog="stylemuse bench step", description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["demo"])
    parser.add_argument("--branches", nargs="+", type=int, choices=(1, 2, 3), default=[1, 2, 3])
    parser.add_argument("--batches", nargs="+", type=count, default=[1, 8], help="pictures drawn at once")
    parser.add_argument("--adapters", nargs="+", choices=ADAPTERS, default=list(ADAPTERS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="chosen by the machine if left out")
    parser.add_argument("--backend", choices=BACKENDS, default="auto")
    parser.add_argument("--steps", type=count, default=12, help="decoding steps of a picture, at least 2")
    parser.add_argument("--repeats", type=count, default=5, help="pictures per variant")
    parser.common()
    options = parser.parse_args(arguments)
    if options.steps < 2:
        parser.error("argument --steps: 1 is not allowed: at least 2, the first stands apart")
    chosen = variants(options.branches, options.batches, options.adapters)
    if not chosen:
        parser.error("nothing to measure: three branches need an adapter, and many adapters more than one picture")
    steps: list[dict[str, Any]] = []
    calls: list[dict[str, Any]] = []
    rates: dict[str, Any] = {}
    device = torch.device("cpu")
    for model, dtype in product(options.models, options.dtypes or [None]):
        pipe = pipeline(model, device=options.device, dtype=dtype, seed=options.seed, backend=options.backend)
        device = torch.device(pipe.network.device)
        rates |= measure.roofs(device, [DTYPES[measure.short(pipe.network.dtype)]])
        show_paper(pipe, chosen, options.steps, rates)
        with_steps, with_calls = run(pipe, chosen, steps=options.steps, repeats=options.repeats, rates=rates)
        steps, calls = steps + with_steps, calls + with_calls
        del pipe
        gc.collect()
    show(steps)
    measure.publish(measure.document(parser.command, options.seed, device, rates, step=steps, call=calls), options.out)
