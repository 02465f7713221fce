"""``stylemuse bench peers``: the same pictures, weights and machine, in turns with those who draw them otherwise.

diffusers  `AmusedPipeline` in every number format
compiled   the same through torch.compile, in the machine's format
peft       a batch without adapters, all in one style, and each picture in its own, which PEFT calls ``adapter_names``;
           and changing the style
onnx       diffusers' transformer as torch.onnx.export writes it, fp32 and dynamic int8, in ONNX Runtime

All draw from one folder; a prompt and an empty negative prompt are two rows. Steps are those after the first, in which
we compute rows that are alike once. Each row of ours says how many times longer the peers of its turn take.
"""

from __future__ import annotations

import gc
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import count as counting
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

import stylemuse as sm
from stylemuse.backend.machine import DTYPES, choose
from stylemuse.loading.assembly import in_torch

from ..harness import measure
from ..harness.arguments import Arguments, count
from ..harness.networks import MODELS, change_to, random_adapter, style_name, write_folder
from . import rivals

RANK = 16
SCALE = 2.0
SWAPS = 20
COMES_WITH = 8
OURS = "stylemuse"

Drawn = dict[str, list[float]]
"""Seconds of a picture, or of the pictures of a batch: "step" of each step after the first, "total" of the call."""


@dataclass(frozen=True)
class Contestant:
    """Who draws, what to know of it, and the drawing itself: pictures of prompts not seen before."""

    name: str
    facts: Mapping[str, Any]
    draw: Callable[[Sequence[str]], Drawn]


@dataclass(frozen=True)
class Job:
    """What every contestant of a run is given."""

    folder: Path
    model: str
    device: torch.device
    dtypes: Sequence[torch.dtype]
    steps: int
    batch: int

    def ours(self, dtype: torch.dtype) -> sm.Pipeline:
        """With room for the styles that come with a model and one for each picture."""
        slots = self.batch + COMES_WITH
        return sm.load(str(self.folder), device=str(self.device), dtype=measure.short(dtype), slots=slots, rank=RANK)

    def contestant(
        self, who: str, dtype: torch.dtype, draw: Callable[[Sequence[str]], Drawn], styles: Sequence[str] = ()
    ) -> Contestant:
        """With its name: who draws, in which number format, with how many adapters."""
        adapters = "none" if not styles else "one" if len(styles) == 1 else "many"
        facts: dict[str, Any] = {"who": who, "model": self.model, "device": str(self.device)}
        facts |= {"dtype": measure.short(dtype), "steps": self.steps, "adapters": adapters}
        name = f"{who}, {facts['dtype']}" + {"none": "", "one": ", one adapter", "many": ", an adapter each"}[adapters]
        return Contestant(name, facts, draw)

    def stylemuse(self, pipe: sm.Pipeline, styles: Sequence[str] = ()) -> Contestant:
        """Ours; pictures take the styles in turn, none if there are none."""

        def draw(prompts: Sequence[str]) -> Drawn:
            chosen = [styles[index % len(styles)] if styles else None for index in range(len(prompts))]
            results = pipe.run(
                [
                    sm.Request(prompt, style=style, seed=1, guidance=sm.CFG(SCALE), sampling=sm.Sampling(self.steps))
                    for prompt, style in zip(prompts, chosen, strict=True)
                ]
            )
            timings = results[0].timings
            return {"step": list(timings["step"][1:]), "total": [timings["total"]]}

        dtype, name = pipe.network.dtype, pipe.network.name
        who = OURS if name in ("reference", "triton") else f"{OURS} with ONNX Runtime"
        return self.contestant(who, DTYPES[dtype] if isinstance(dtype, str) else dtype, draw, styles)

    def diffusers(
        self, who: str, pipe: Any, dtype: torch.dtype, styles: Sequence[str] = (), **options: Any
    ) -> Contestant:
        """diffusers' pipeline, called with these options; a step ends where it calls back."""

        def draw(prompts: Sequence[str]) -> Drawn:
            ends: list[float] = []

            def ended(*_: Any) -> None:
                measure.synchronize(self.device)
                ends.append(time.perf_counter())

            began = time.perf_counter()
            pipe(
                list(prompts),
                num_inference_steps=self.steps,
                guidance_scale=SCALE,
                generator=torch.Generator(self.device).manual_seed(1),
                callback=ended,
                **options,
            )
            measure.synchronize(self.device)
            total = time.perf_counter() - began
            return {"step": [end - start for start, end in pairwise(ends)], "total": [total]}

        return self.contestant(who, dtype, draw, styles)


@contextmanager
def diffusers(job: Job) -> Iterator[list[Contestant]]:
    """Every number format, ours and theirs."""
    yield [
        *(job.stylemuse(job.ours(dtype)) for dtype in job.dtypes),
        *(job.diffusers("diffusers", rivals.load(job.folder, job.device, dtype), dtype) for dtype in job.dtypes),
    ]


@contextmanager
def compiled(job: Job) -> Iterator[list[Contestant]]:
    """The machine's own number format, theirs through torch.compile."""
    dtype = choose(job.device).dtype if choose(job.device).dtype in job.dtypes else job.dtypes[0]
    pipe = rivals.load(job.folder, job.device, dtype)
    rivals.compile_transformer(pipe, job.device)
    yield [
        job.stylemuse(job.ours(dtype)),
        job.diffusers("diffusers with torch.compile", pipe, dtype),
    ]


@contextmanager
def peft(job: Job) -> Iterator[list[Contestant]]:
    """A batch on the base, in one style and in as many as pictures."""
    dtype = choose(job.device).dtype if choose(job.device).dtype in job.dtypes else job.dtypes[0]
    pipe, styles = _with_styles(job, dtype)
    theirs = rivals.load(job.folder, job.device, dtype)
    plain = theirs.transformer
    loras = rivals.with_loras(plain, [in_torch(pipe).adapters[style] for style in styles])
    named = partial(_named, theirs, plain, loras)
    yield [
        *(job.stylemuse(pipe, chosen) for chosen in ([], styles[:1], styles)),
        *(job.diffusers("diffusers with peft", named(chosen), dtype, chosen) for chosen in ([], styles[:1], styles)),
    ]


def _named(pipe: Any, plain: Any, loras: Any, styles: Sequence[str]) -> Callable[..., Any]:
    """The pipeline without a style, with one for all rows, or with one for each picture, in both of its rows."""

    def answer(*inputs: torch.Tensor) -> torch.Tensor:
        if len(styles) > 1:
            return loras(*inputs, adapter_names=[*styles, *styles])
        with nullcontext() if styles else loras.disable_adapter():
            return loras(*inputs)

    def call(*arguments: Any, **options: Any) -> Any:
        pipe.transformer = rivals.Transformer(plain, answer)
        return pipe(*arguments, **options)

    return call


@contextmanager
def onnx(job: Job) -> Iterator[list[Contestant]]:
    """The plain export, fp32 and int8, beside ours in fp32, in torch and in ONNX Runtime; on the CPU."""
    if job.device.type != "cpu":
        raise sm.StylemuseError("the onnx peers run on the CPU here; leave onnx out with --only")
    pipe = rivals.load(job.folder, job.device, torch.float32)
    with tempfile.TemporaryDirectory(prefix="stylemuse-bench-") as folder:
        whole, small = Path(folder) / "fp32.onnx", Path(folder) / "int8.onnx"
        rivals.export_onnx(pipe, whole, rows=2 * job.batch)
        rivals.quantize_onnx(whole, small)
        pipe.transformer = None  # its memory is for the sessions
        gc.collect()
        graphs = sm.load(str(job.folder), backend="onnx", slots=job.batch + COMES_WITH, rank=RANK)
        found = [job.stylemuse(job.ours(torch.float32)), job.stylemuse(graphs)]
        for name, path in (("ONNX Runtime, plain export", whole), ("ONNX Runtime, plain export in int8", small)):
            around = rivals.load(job.folder, job.device, torch.float32)
            around.transformer = rivals.Transformer(around.transformer, rivals.onnx_answer(path))
            found.append(job.diffusers(name, around, torch.float32))
        yield found


GROUPS = {"diffusers": diffusers, "compiled": compiled, "peft": peft, "onnx": onnx}


def turns(job: Job, contestants: Sequence[Contestant], repeats: int, numbers: Iterator[int]) -> list[dict[str, Any]]:
    """Steps of all, in turns."""
    drawn: dict[str, list[Drawn]] = {each.name: [] for each in contestants}

    def draw(contestant: Contestant) -> None:
        prompts = [f"a fox {next(numbers)}" for _ in range(job.batch)]
        drawn[contestant.name].append(contestant.draw(prompts))

    runs = {each.name: partial(draw, each) for each in contestants}
    clock = measure.interleaved(runs, repeats=repeats, device=job.device, on_run=measure.progress)
    rows = []
    for each in contestants:
        taken = drawn[each.name][1:]  # the first was the warm-up
        row = {"name": each.name, **each.facts, "batch": job.batch, "branches": 2}
        row |= {"step": measure.series(value for one in taken for value in one["step"])}
        row |= {"total": measure.series(one["total"][0] for one in taken)}
        rows.append(row | {"cpu": measure.series(clock[each.name]["cpu"])})
    return rows


def run(job: Job, contestants: Sequence[Contestant], repeats: int, numbers: Iterator[int]) -> list[dict[str, Any]]:
    """Steps of all, in turns; our rows with the ratios to the others."""
    rows = turns(job, contestants, repeats, numbers)
    for row in rows:
        if row["who"].startswith(OURS):
            row["times_as_long"] = {
                other["name"]: other["step"]["p50"] / row["step"]["p50"]
                for other in rows
                if not other["who"].startswith(OURS) and other["adapters"] == row["adapters"]
            }
    return rows


def switching(job: Job) -> list[dict[str, Any]]:
    """Changing the style of the next picture: a slot of ours, ``set_adapter`` of PEFT; all are loaded."""
    dtype = choose(job.device).dtype
    pipe, styles = _with_styles(job, dtype)
    loras = rivals.with_loras(
        rivals.load(job.folder, job.device, dtype).transformer, [in_torch(pipe).adapters[style] for style in styles]
    )
    names = (styles[index % len(styles)] for index in counting(1))
    changes = {
        "stylemuse, resident": lambda: change_to(pipe, next(names)),
        "peft set_adapter": lambda: loras.set_adapter(next(names)),
    }
    clock = measure.interleaved(changes, repeats=SWAPS, device=job.device)
    facts = {"model": job.model, "device": str(job.device), "dtype": measure.short(dtype), "registered": len(styles)}
    return [{"name": name, **facts, "wall": measure.series(clock[name]["wall"])} for name in changes]


def _with_styles(job: Job, dtype: torch.dtype) -> tuple[sm.Pipeline, list[str]]:
    styles = [style_name(index) for index in range(job.batch)]
    pipe = job.ours(dtype)
    for index, style in enumerate(styles):
        pipe.adapters.add(style, random_adapter(pipe, style, rank=RANK, seed=index))
    return pipe, styles


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """The table of steps, milliseconds."""
    print(f"{'a step':52}{'p20':>9}{'p50':>9}{'p80':>9}{'picture':>11}")
    for row in rows:
        times = "".join(f"{row['step'][each] * 1e3:9.1f}" for each in ("p20", "p50", "p80"))
        print(f"{row['name']:52}{times}{row['total']['p50'] * 1e3:11.1f}")
        for name, ratio in row.get("times_as_long", {}).items():
            print(f"    {name:62}{ratio:6.2f} times as long")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the tables, and on the last line all of it as one JSON document."""
    parser = Arguments(prog="stylemuse bench peers", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="demo")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--batch", type=count, default=1, help="pictures drawn at once")
    parser.add_argument("--steps", type=count, default=12, help="decoding steps of a picture, at least 2")
    parser.add_argument("--repeats", type=count, default=5, help="calls of each")
    parser.common()
    options = parser.parse_args(arguments)
    if options.steps < 2:
        parser.error("argument --steps: 1 is not allowed: at least 2, the first stands apart")
    device, dtypes = choose(options.device).device, [DTYPES[name] for name in options.dtypes]
    rates = measure.roofs(device, dtypes)
    steps: list[dict[str, Any]] = []
    swaps: list[dict[str, Any]] = []
    numbers = counting()
    with write_folder(options.model, seed=options.seed) as folder:
        job = Job(folder, options.model, device, dtypes, options.steps, options.batch)
        for name in options.only:
            print(name, file=sys.stderr, flush=True)
            with GROUPS[name](job) as contestants:
                steps += [row | {"group": name} for row in run(job, contestants, options.repeats, numbers)]
            del contestants
            gc.collect()
        if "peft" in options.only:
            swaps = switching(job)
    show(steps)
    for row in swaps:
        print(f"{row['name']:52}{row['wall']['p50'] * 1e6:12.1f} us, {row['registered']} loaded")
    kinds = {"step": steps} | ({"adapter_swap": swaps} if swaps else {})
    measure.publish(measure.document(parser.command, options.seed, device, rates, **kinds), options.out)
