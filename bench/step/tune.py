"""``stylemuse bench tune``: which launch of every operation of a step is the fastest on this GPU, by tokens in a batch.

1. a forward pass is run once for each number of rows, and the calls of all its operations are kept, with their weights;
2. all launches of all calls are compiled by parallel processes, which leaves them in Triton's cache;
3. the calls of a problem are captured as one graph with each launch and replayed: with so many weights in turn that
   none is in the L2 cache. A launch whose output is not the default's to the bit is never taken.

Every result is a line of the folder's ``tune.jsonl`` when it is there; what is there is not measured again. The fastest
go into ``kernels/tuned/<gpu>.json``: by the number of tokens where the launch may depend on it, else the one that is
fastest over all. ``--minutes`` bounds the time; the most expensive problems come first.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stylemuse.backend.machine import choose
from stylemuse.kernels.dispatch import obstacle
from stylemuse.kernels.tuning import Call, Described, Launch, Met, Problem, trial, tuned_file
from stylemuse.loading.assembly import TorchPipeline, in_torch

from ..harness import measure
from ..harness.arguments import Arguments, count
from ..harness.networks import MODELS, pipeline
from . import compiling

_COLD = 160 << 20
"""Bytes of weights in turn: three times the L2 cache of an H100."""
_MOST = 64
"""Calls in one graph, at most."""
ROWS = (2, 3, 24, 8, 16)
_OUTPUTS = ("y", "values", "out", "norms")
"""What a kernel writes, by the name of its argument; the first that is there."""


@dataclass(frozen=True)
class Timed:
    """A launch of a problem: seconds of one call, and whether its output has the default's bits."""

    problem: Problem
    launch: Launch
    seconds: float
    same: bool

    def line(self) -> dict[str, Any]:
        """As a plain value."""
        operation, problem, tokens = self.problem
        launch = {"tiles": dict(self.launch.tiles), "warps": self.launch.warps, "stages": self.launch.stages}
        return {
            "operation": operation, "problem": problem, "tokens": tokens, **launch, "seconds": self.seconds,
            "same": self.same,
        }  # fmt: skip

    @classmethod
    def of(cls, line: Mapping[str, Any]) -> Timed:
        """From a `line`."""
        launch = Launch(line["tiles"], line["warps"], line["stages"])
        return cls((line["operation"], line["problem"], line["tokens"]), launch, line["seconds"], line["same"])


@torch.no_grad()
def problems(pipe: TorchPipeline, rows: int) -> dict[Problem, Met]:
    """Those of a forward pass of so many rows, from tokens to hidden states, with their calls."""
    network = pipe.network
    side = network.transformer.config.sample_size
    context = network.context(network.text("a fox"), (side, side))
    tokens = torch.randint(network.transformer.config.codebook_size, (rows, side * side), device=network.device)
    contexts = [replace(context) for _ in range(rows)]
    with trial() as met:
        network.transformer.hidden(network.features(tokens, contexts))
    return met


def time_left(until: float) -> bool:
    """Whether the clock has not reached it."""
    return time.monotonic() < until


def timed(problem: Problem, met: Met, until: float, repeats: int) -> Iterator[Timed]:
    """Every launch of a problem, the default first, as long as there is time."""
    calls, expected = _cold(met.calls), None
    for launch in met.choices:
        if not time_left(until):
            return
        calls[0].run(launch)
        found = next(value for name in _OUTPUTS if isinstance(value := calls[0].arguments.get(name), Tensor))
        expected = found.clone() if expected is None else expected
        same = torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
        yield Timed(problem, launch, _seconds(calls, launch, repeats), same)


def _cold(calls: Sequence[Call]) -> list[Call]:
    """The calls, and as many with copies of their weights as push each other out of the L2 cache."""
    made = list(calls)
    size = sum(_weight(call).nbytes for call in calls)
    while 0 < size < _COLD and len(made) < _MOST:
        call = calls[len(made) % len(calls)]
        weight = _weight(call).clone()
        size += weight.nbytes
        given = {
            name: (replace(value, tensor=weight) if isinstance(value, Described) else weight)
            if name in ("weight", "weight_at")
            else value
            for name, value in call.arguments.items()
        }
        made.append(replace(call, arguments=given))
    return made


def _weight(call: Call) -> Tensor:
    weight = call.arguments.get("weight_at")
    return weight if isinstance(weight, Tensor) else torch.empty(0)


def _seconds(calls: Sequence[Call], launch: Launch, repeats: int) -> float:
    """Of one call: the median of replays of all of them as one graph; on a CPU of running them."""
    device = next(value.device for value in calls[0].arguments.values() if isinstance(value, Tensor))

    def run() -> None:
        for call in calls:
            call.run(launch)

    if device.type != "cuda":
        return statistics.median(measure.interleaved({"": run}, repeats=repeats, warm=0)[""]["wall"]) / len(calls)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    found = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize(device)
        found.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(found) / len(calls)


def yardstick(met: Met, repeats: int) -> float | None:
    """Seconds of cuBLAS for the same product, nothing around it; None where there is no product of one format."""
    calls = [call for call in _cold(met.calls) if call.arguments.get("weight_scales") is None]
    if not calls or "weight_at" not in calls[0].arguments:
        return None
    pairs = []
    for call in calls:
        x, weight = call.arguments["x"], _weight(call)
        pairs.append((x.tensor if isinstance(x, Described) else x, weight))

    def run() -> None:
        for x, weight in pairs:
            F.linear(x, weight)  # type: ignore[arg-type]

    return statistics.median(
        measure.on_device({"": run}, repeats=repeats, device=pairs[0][1].device, warm=1)[""]
    ) / len(pairs)


def fastest(found: Sequence[Timed]) -> dict[str, dict[str, dict[str, Any]]]:
    """By operation, problem and tokens, as the tuned file has it; of equal bits only."""
    best: dict[str, dict[str, dict[str, Any]]] = {}
    for operation, problem in dict.fromkeys(each.problem[:2] for each in found):
        mine = [each for each in found if each.problem[:2] == (operation, problem) and each.same]
        for tokens in dict.fromkeys(each.problem[2] for each in mine):
            here = [each for each in mine if each.problem[2] == tokens]
            launches = list({str(each.launch): each.launch for each in here}.values())
            # Where the launch may not depend on the tokens, each was timed for several of them: the geometric mean.
            means = [
                statistics.geometric_mean([each.seconds for each in here if each.launch == launch])
                for launch in launches
            ]
            least = min(range(len(means)), key=means.__getitem__)
            chosen = launches[least]
            entry = {"tiles": dict(chosen.tiles), "warps": chosen.warps, "stages": chosen.stages}
            place = best.setdefault(operation, {}).setdefault(problem, {})
            place["any" if tokens is None else str(tokens)] = entry | {"seconds": means[least]}
    return best


def write(file: Path, device: torch.device, found: Sequence[Timed]) -> None:
    """The tuned file; entries of problems that were not measured stay as they are."""
    before = json.loads(file.read_text(encoding="utf-8"))["launches"] if file.exists() else {}
    for operation, sizes in fastest(found).items():
        for problem, entries in sizes.items():
            before.setdefault(operation, {})[problem] = entries
    facts = measure.machine(device)
    versions = measure.versions()
    document = {
        "gpu": facts["gpu"] or facts["cpu"], "torch": versions.get("torch"), "triton": versions.get("triton"),
        "commit": measure.commit(), "origin": "stylemuse bench tune", "launches": before,
    }  # fmt: skip
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def compiled(met: Mapping[Problem, Met], seconds: float) -> list[str]:
    """All launches of these problems, compiled by as many processes as there are cores; what went wrong."""
    launches = [
        (each.calls[index], launch)
        for each in met.values()
        for launch in each.choices
        for index in compiling.distinct(each.calls)
    ]
    return compiling.warm(launches, workers=min(14, os.cpu_count() or 1), seconds=seconds)


def tune(pipe: TorchPipeline, rows: Sequence[int], folder: Path, file: Path, *, minutes: float, repeats: int) -> None:
    """All of it; see the module's text."""
    device, until = pipe.network.device, time.monotonic() + 60 * minutes
    folder.mkdir(parents=True, exist_ok=True)
    lines = folder / "tune.jsonl"
    there = [json.loads(line) for line in lines.read_text("utf-8").splitlines()] if lines.exists() else []
    found = [Timed.of(line) for line in there if "tiles" in line]
    done = {(each.problem, str(each.launch)) for each in found}
    with lines.open("a", encoding="utf-8") as out:

        def note(line: Mapping[str, Any]) -> None:
            out.write(json.dumps(line) + "\n")
            out.flush()

        for index, number in enumerate(rows):
            met = problems(pipe, number)
            if index == 0 and device.type == "cuda":
                began = time.monotonic()
                faults = compiled(met, until - began)
                note({"compiled": time.monotonic() - began, "faults": faults})
            # The most expensive first: what the defaults take of a step.
            cost = {problem: _cost(each) for problem, each in met.items()}
            for problem in sorted(met, key=lambda each: -cost[each]):
                known = all((problem, str(launch)) in done for launch in met[problem].choices)
                if known or len(met[problem].choices) == 1:
                    continue
                for each in timed(problem, met[problem], until, repeats):
                    found.append(each)
                    note(each.line() | {"rows": number})
                if problem[0] == "linear" and time_left(until):
                    facts = {"problem": problem[1], "tokens": problem[2], "rows": number}
                    note(facts | {"cublas": yardstick(met[problem], repeats)})
            del met
            write(file, device, found)
            print(f"{number} rows: {len(found)} launches", file=sys.stderr, flush=True)
            if not time_left(until):
                break


def _cost(met: Met) -> int:
    """The bytes of the weights of all calls: a measure of how much of a step they are."""
    return sum(_weight(call).nbytes for call in met.calls)


def main(arguments: Sequence[str] | None = None) -> None:
    """Tune within the time, and leave the file."""
    parser = Arguments(prog="stylemuse bench tune", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=(*MODELS, "tiny"), default="amused-256")
    parser.add_argument("--rows", nargs="+", type=count, default=list(ROWS), help="of a forward pass, 256 tokens each")
    parser.add_argument("--minutes", type=float, default=5.0, help="the time there is")
    parser.add_argument("--repeats", type=count, default=8, help="replays of a launch")
    parser.add_argument("--quantization", choices=("int8", "fp8"), help="of the projections' weights and inputs")
    parser.add_argument("--compile-only", action="store_true", help="leave all launches in Triton's cache, and end")
    parser.add_argument("--folder", type=Path, default=Path("out/gpu"), help="where the measurements lie")
    parser.add_argument("--file", type=Path, help="the tuned file; the GPU's in kernels/tuned if left out")
    parser.common()
    options = parser.parse_args(arguments)
    machine = choose(options.device)
    if (reason := obstacle(machine.device)) is not None:
        parser.error(reason)
    pipe = in_torch(
        pipeline(
            options.model, device=str(machine.device), seed=options.seed, slots=1, rank=16, backend="triton",
            quantization=options.quantization,
        )
    )  # fmt: skip
    if options.compile_only:
        for fault in compiled(problems(pipe, options.rows[0]), 60 * options.minutes):
            print(fault, file=sys.stderr)
        return
    gpu = torch.cuda.get_device_name(machine.device) if machine.device.type == "cuda" else None
    file = options.file or (options.folder / "tuned.json" if gpu is None else tuned_file(gpu))
    tune(pipe, options.rows, options.folder, file, minutes=options.minutes, repeats=options.repeats)
    print(file)
