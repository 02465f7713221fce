"""``stylemuse bench onnx``: exported folders of every form and precision, in turns with each other and diffusers.

load   the folder, checked and opened; what it takes on disk, and how it agrees with the model it was made from
step   one picture of two branches in one style: as an input of the graphs (bank, single) or in them (fused)

The rows of a precision are drawn in turns, those that are not of fp32 beside diffusers (for fp32 `bench peers` has the
plain export). `to_fused` is what the adapters' being inputs costs. Tokens are not decoded to pictures here: a step does
not hang on it.

The folders are exported first, minutes each at full size; with --folder they are kept, and found again by the next run.
"""

from __future__ import annotations

import gc
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, product
from itertools import count as counting
from pathlib import Path
from typing import Any

import torch

import stylemuse as sm
from stylemuse.decoding.canvas import Timings
from stylemuse.decoding.loop import decode
from stylemuse.export.graphs.adapters import FORMS
from stylemuse.export.graphs.deploy import export
from stylemuse.export.run import manifest

from ..harness import measure
from ..harness.arguments import Arguments, count
from ..harness.networks import MODELS, random_adapter, style_name, write_folder
from . import peers, rivals

STYLES = 4
"""Random ones, for a model that brings none."""
WHO = f"{peers.OURS} with ONNX Runtime"
PEER = "diffusers, float32"


@dataclass(frozen=True)
class Kind:
    """What is exported."""

    form: str
    precision: str

    @property
    def name(self) -> str:
        """Say "bank, int8"."""
        return f"{self.form}, {self.precision}"

    def write(self, model: Path, out: Path) -> None:
        """Export the model with its styles; of form "fused" with the first."""
        pipe = sm.load(str(model), backend="reference", device="cpu", dtype="float32", rank=peers.RANK)
        if not pipe.adapters.names:
            for index in range(STYLES):
                adapter = random_adapter(pipe, style_name(index), rank=peers.RANK, seed=index)
                pipe.adapters.add(style_name(index), adapter)
        styles = list(pipe.adapters.names)[: 1 if self.form == "fused" else None]
        export(pipe, out, form=self.form, styles=styles, precision=self.precision)


@contextmanager
def folders(model: str, seed: int, keep: Path | None, kinds: Sequence[Kind]) -> Iterator[tuple[Path, dict[Kind, Path]]]:
    """The model's folder and those of its exports; what is not in `keep` yet is written."""
    with tempfile.TemporaryDirectory(prefix="stylemuse-bench-") as temporary:
        place = (keep or Path(temporary)) / f"{model}-{seed}"
        place.mkdir(parents=True, exist_ok=True)
        weights = place / "model"
        if not weights.exists():
            partial_copy = place / ".model.partial"
            shutil.rmtree(partial_copy, ignore_errors=True)
            with write_folder(model, seed=seed) as made:
                shutil.copytree(made, partial_copy)
            os.replace(partial_copy, weights)
        found = {kind: place / f"{kind.form}-{kind.precision}" for kind in kinds}
        for kind, path in found.items():
            if not path.exists():
                print(f"exports {kind.name}", file=sys.stderr, flush=True)
                kind.write(weights, path)
                gc.collect()
        yield weights, found


def loads(model: str, found: dict[Kind, Path], repeats: int) -> list[dict[str, Any]]:
    """Each folder opened in its turn, in this process, and let go; the first turn reads from disk if need be."""
    runs = {kind.name: partial(sm.load, str(path)) for kind, path in found.items()}
    clock = measure.interleaved(runs, repeats=repeats, on_run=measure.progress)
    return [
        told(model, kind, path) | {"wall": measure.series(clock[kind.name]["wall"])} for kind, path in found.items()
    ]


def told(model: str, kind: Kind, path: Path) -> dict[str, Any]:
    """What the manifest says."""
    made = manifest.read(path)
    sizes = {name: graph.file.bytes + (graph.data.bytes if graph.data else 0) for name, graph in made.graphs.items()}
    whole = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    facts = {"name": kind.name, "model": model, "form": kind.form, "dtype": kind.precision, "styles": len(made.styles)}
    return facts | {"bytes": whole, "graph_bytes": sizes, "agreement": dict(made.agreement)}


def contestant(job: peers.Job, kind: Kind, path: Path) -> peers.Contestant:
    """A folder that draws tokens in its first style."""
    pipe = sm.load(str(path))
    style = next(iter(pipe.adapters.names), None)

    def draw(prompts: Sequence[str]) -> peers.Drawn:
        sampling, guidance = sm.Sampling(job.steps), sm.CFG(peers.SCALE)
        began, per_step = time.perf_counter(), Timings()
        requests = [sm.Request(each, style, seed=1, guidance=guidance, sampling=sampling) for each in prompts]
        with pipe.jobs.held(requests) as jobs:
            canvases = pipe.jobs.canvases(jobs, {"text": 0.0, "condition": 0.0})
            decode(pipe.decoder(), list(chain.from_iterable(canvases)), None, per_step)
        return {"step": per_step["step"][1:], "total": [time.perf_counter() - began]}

    adapters = "none" if style is None else "merged" if kind.form == "fused" else "input"
    facts = {"who": WHO, "model": job.model, "device": str(job.device), "dtype": kind.precision, "form": kind.form}
    return peers.Contestant(f"{WHO}, {kind.name}", facts | {"steps": job.steps, "adapters": adapters}, draw)


def steps(
    job: peers.Job, found: dict[Kind, Path], repeats: int, numbers: Iterator[int], *, peer: bool
) -> list[dict[str, Any]]:
    """The folders of one precision in turns, beside diffusers if it takes part."""
    contestants = [contestant(job, kind, path) for kind, path in found.items()]
    if peer:
        theirs = rivals.load(job.folder, job.device, torch.float32)
        contestants.append(job.diffusers("diffusers", theirs, torch.float32, output_type="latent"))
    rows = peers.turns(job, contestants, repeats, numbers)
    fused = [row["step"]["p50"] for row in rows if row.get("form") == "fused"]
    others = [row for row in rows if row["who"] == "diffusers"]
    for row in rows:
        if row["who"] == WHO:
            row["times_as_long"] = {other["name"]: other["step"]["p50"] / row["step"]["p50"] for other in others}
            if fused and row["form"] != "fused":
                row["to_fused"] = row["step"]["p50"] / fused[0]
    return rows


def show(opened: Sequence[dict[str, Any]], stepped: Sequence[dict[str, Any]]) -> None:
    """The tables."""
    print(f"{'a folder':52}{'MB':>9}{'load, s':>9}{'tokens alike':>14}{'picture error':>15}")
    for row in opened:
        agreement, seconds = row["agreement"], f"{row['wall']['p50']:9.2f}" if "wall" in row else " " * 9
        print(
            f"{row['name']:52}{row['bytes'] / 1e6:9.1f}{seconds}"
            f"{agreement['tokens']:14.2%}{agreement['picture_error']:15.2f}"
        )
    print(f"\n{'a step':52}{'p20 ms':>9}{'p50 ms':>9}{'p80 ms':>9}{'to fused':>10}  diffusers takes")
    for row in stepped:
        times = "".join(f"{row['step'][each] * 1e3:9.1f}" for each in ("p20", "p50", "p80"))
        to_fused = f"{row['to_fused']:10.3f}" if "to_fused" in row else " " * 10
        ratios = "".join(f"  {ratio:.2f} times as long" for ratio in row.get("times_as_long", {}).values())
        print(f"{row['name']:52}{times}{to_fused}{ratios}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Export what is not there, measure, print the tables, and on the last line all of it as one JSON document."""
    parser = Arguments(prog="stylemuse bench onnx", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=(*MODELS, "tiny"), default="demo", help="tiny shows that it runs")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--precisions", nargs="+", choices=manifest.PRECISIONS, default=["float32", "int8"])
    parser.add_argument("--folder", type=Path, help="where exports are kept; a temporary one if left out")
    parser.add_argument("--export-only", action="store_true", help="export what is not there, and measure nothing")
    parser.add_argument("--steps", type=count, default=6, help="decoding steps of a picture, at least 2")
    parser.add_argument("--repeats", type=count, default=3, help="pictures of each")
    parser.add_argument("--loads", type=count, default=2, help="times each folder is opened, after a first")
    parser.common(device=False)
    options = parser.parse_args(arguments)
    if options.steps < 2:
        parser.error("argument --steps: 1 is not allowed: at least 2, the first stands apart")
    if options.export_only and options.folder is None:
        parser.error("argument --export-only: needs --folder, or all is gone again")
    kinds = [Kind(form, precision) for precision, form in product(options.precisions, options.forms)]
    device, numbers = torch.device("cpu"), counting()
    stepped: list[dict[str, Any]] = []
    with folders(options.model, options.seed, options.folder, kinds) as (model, found):
        if options.export_only:
            skipped = {"skipped": "only exported"}
            opened = [told(options.model, kind, path) | skipped for kind, path in found.items()]
        else:
            opened = loads(options.model, found, options.loads)
        job = peers.Job(model, options.model, device, [torch.float32], options.steps, batch=1)
        for precision in [] if options.export_only else options.precisions:
            chosen = {kind: path for kind, path in found.items() if kind.precision == precision}
            stepped += steps(job, chosen, options.repeats, numbers, peer=precision != "float32")
            gc.collect()
    show(opened, stepped)
    document = measure.document(parser.command, options.seed, device, {}, load=opened, step=stepped)
    measure.publish(document, options.out)
