"""``stylemuse bench gpu``: everything a GPU has to answer, in one command and in under nine minutes.

correct   the tests of the kernels, on the device
sweep     the launches of every operation of a step, timed; the fastest go into ``kernels/tuned``
kernels   every operation beside torch, compiled torch and the roof
steps     steps and whole pictures of 1, 2 and 3 branches, 1 and 8 pictures; kernels launched per step
peers     diffusers and compiled diffusers on the same weights, where diffusers is installed
adapters  a batch in as many styles as pictures, swaps with 1 to 256 registered

A part that is done lies in the folder as a file and is not done again; ``--only`` chooses parts. Needs torch, triton
and a checkout. On a CPU it runs with tiny sizes (``--tiny``), to see that all of it runs.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count as counting
from pathlib import Path
from typing import Any

import torch

import stylemuse as sm
from stylemuse.backend.machine import choose
from stylemuse.kernels import tuning
from stylemuse.kernels.dispatch import obstacle
from stylemuse.loading.assembly import TorchPipeline, in_torch
from stylemuse.models.amused import AmusedConfig

from ..harness import measure, networks, report, targets
from ..harness.arguments import Arguments
from ..harness.networks import TINY
from ..peers import peers
from ..serving import adapters
from . import kernels, steps, tune

ROOT = Path(__file__).resolve().parent.parent.parent
TESTS = (
    "test_triton_linear.py", "test_quantized_linear.py", "test_triton_kernels.py", "test_triton_model.py",
    "test_quantization.py", "test_decoding_step.py",
)  # fmt: skip
FULL = AmusedConfig()

Document = dict[str, list[dict[str, Any]]]
"""Rows by kind."""


@dataclass(frozen=True)
class Plan:
    """How much of everything; `TINY_PLAN` is for a run that shows that it runs."""

    device: torch.device
    dtype: torch.dtype
    tuned: Path
    seed: int
    rates: dict[str, Any]
    config: AmusedConfig = FULL
    model: str = "amused-256"
    rows: tuple[int, ...] = (2, 3, 24)
    branches: tuple[int, ...] = (1, 2, 3)
    batches: tuple[int, ...] = (1, 8)
    decoding: int = 12
    mixed: int = 16
    registered: tuple[int, ...] = (1, 16, 64, 256)
    repeats: int = 20
    swaps: int = 50
    implementations: tuple[str, ...] = kernels.IMPLEMENTATIONS
    folder: Path = Path("out/gpu")
    minutes: float = 1.5

    def pipeline(self, slots: int = 32, *, plain: bool = False) -> TorchPipeline:
        """Triton where it can run; in a dry run of many pictures the reference, which is not interpreted."""
        backend = "reference" if obstacle(self.device) or plain else "triton"
        made = networks.pipeline(
            self.model, device=str(self.device), dtype=measure.short(self.dtype), seed=self.seed, slots=slots,
            rank=steps.RANK, backend=backend,
        )  # fmt: skip
        return in_torch(made)


def tiny(plan: Plan) -> Plan:
    """The same on sizes that a CPU can interpret."""
    return replace(
        plan, config=TINY, model="tiny", rows=(2,), branches=(2,), batches=(1,), decoding=2, mixed=2,
        registered=(1, 2), repeats=1, swaps=2, implementations=("reference", "triton"), minutes=0.5,
    )  # fmt: skip


def correct(plan: Plan) -> Document:
    """The kernels' tests, as pytest runs them; a failure stops the whole run."""
    row: dict[str, Any] = {"name": "tests of the kernels", "device": str(plan.device)}
    missing = [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]
    files = [str(ROOT / "tests" / name) for name in TESTS]
    if missing or not all(Path(file).exists() for file in files):
        why = f"{' and '.join(missing)} not installed" if missing else "the tests are not there"
        return {"call": [row | {"skipped": why}]}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    if plan.config is TINY:
        command = [*command[: -len(files) + 1], "--collect-only"]

    def run() -> None:
        done = subprocess.run(command, cwd=ROOT / "tests", capture_output=True, text=True, check=False)
        if done.returncode:
            raise sm.StylemuseError(f"the kernels are wrong on {plan.device}:\n{done.stdout[-4000:]}")

    wall = measure.interleaved({"": run}, repeats=1, warm=0)[""]["wall"]
    return {"call": [row | {"wall": measure.series(wall)}]}


def sweep(plan: Plan) -> Document:
    """The fastest launch of every problem of a step, by `tune`."""
    reason = obstacle(plan.device)
    if reason:
        return {"call": [{"name": "launch sweep", "skipped": reason}]}
    folder = plan.tuned.parent if plan.config is TINY else plan.folder
    tune.tune(plan.pipeline(1), plan.rows, folder, plan.tuned, minutes=plan.minutes, repeats=plan.repeats)
    found = [json.loads(line) for line in (folder / "tune.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [
        {
            "name": f"{line['operation']}, {line['problem']}, {line['tokens']} tokens",
            "wall": measure.series([line["seconds"]]),
        }
        for line in found
        if "tiles" in line
    ]
    return {"call": rows}


def each_kernel(plan: Plan) -> Document:
    """Every operation beside torch and the roof."""
    return {
        "call": [
            row
            for rows in plan.rows
            for row in kernels.run(
                plan.config,
                plan.device,
                plan.dtype,
                rows=rows,
                repeats=plan.repeats,
                rates=plan.rates,
                chosen=plan.implementations,
                seed=plan.seed,
            )
        ]
    }


def whole_steps(plan: Plan) -> Document:
    """Steps, pictures, and how many kernels a step launches."""
    pipe = plan.pipeline()
    chosen = steps.variants(plan.branches, plan.batches, ("none", "one"))
    step_rows, call_rows = steps.run(pipe, chosen, steps=plan.decoding, repeats=plan.repeats, rates=plan.rates)
    for row, variant in zip(step_rows, chosen, strict=True):
        if plan.device.type == "cuda" and variant.batch == 1:
            row["launches"] = _launches(pipe, variant, plan)
    return {"step": step_rows, "call": call_rows}


def _launches(pipe: sm.Pipeline, variant: steps.Variant, plan: Plan) -> int:
    """Kernels of one decoding step: those of a picture of two steps less those of a picture of one."""
    found = []
    for number in (plan.decoding, plan.decoding + 1):
        requests = variant.requests(number, counting(10**6).__next__)
        pipe.run(requests)  # text and conditioning are kept from here on
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            pipe.run(requests)
        found.append(sum(1 for event in profile.events() if event.device_type == torch.profiler.DeviceType.CUDA))
    return found[1] - found[0]


def others(plan: Plan) -> Document:
    """The peers that are installed."""
    if importlib.util.find_spec("diffusers") is None:
        return {"step": [{"name": "diffusers", "skipped": "diffusers is not installed"}]}
    numbers, rows = counting(), []
    groups = ("diffusers",) if plan.config is TINY else ("diffusers", "compiled")
    with networks.write_folder(plan.model, seed=plan.seed) as folder:
        job = peers.Job(folder, plan.model, plan.device, [plan.dtype], plan.decoding, batch=1)
        for group in groups:
            with peers.GROUPS[group](job) as contestants:
                rows += [row | {"group": group} for row in peers.run(job, contestants, plan.repeats, numbers)]
            del contestants
            gc.collect()
    return {"step": rows}


def with_adapters(plan: Plan) -> Document:
    """A mixed batch, one adapter on one picture, swaps."""
    pipe = plan.pipeline(slots=max(*plan.registered, plan.mixed) + 1, plain=plan.config is TINY)
    mixed = adapters.mixing(
        pipe, plan.mixed, branches=2, decoding=plan.decoding, repeats=plan.repeats, rates=plan.rates
    )
    alone = [steps.Variant(2, 1, each) for each in ("none", "one")]
    rows, _ = steps.run(pipe, alone, steps=plan.decoding, repeats=plan.repeats, rates=plan.rates)
    mixed.append(rows[1] | {"to_base": rows[1]["step"]["p50"] / rows[0]["step"]["p50"]})
    return {"step": mixed, "adapter_swap": adapters.swaps(pipe, plan.registered, repeats=plan.swaps)}


PARTS: Mapping[str, Callable[[Plan], Document]] = {
    "correct": correct, "sweep": sweep, "kernels": each_kernel, "steps": whole_steps, "peers": others,
    "adapters": with_adapters,
}  # fmt: skip


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    """Do what is not done yet, print the targets, and on the last line all of it as one JSON document."""
    parser = Arguments(prog="stylemuse bench gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--folder", type=Path, default=Path("out/gpu"), help="where the parts that are done lie")
    parser.add_argument(
        "--tuned", type=Path, help="file of the fastest launches; the GPU's in kernels/tuned if left out"
    )
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, for a CPU: shows that all of it runs")
    parser.common()
    options = parser.parse_args(arguments)
    machine = choose(options.device)
    if machine.device.type != "cuda" and not options.tiny:
        parser.error("there is no GPU here; --tiny runs all of it on tiny sizes")
    if options.tuned is None:
        gpu = torch.cuda.get_device_name(machine.device) if machine.device.type == "cuda" else None
        options.tuned = options.folder / "tuned.json" if gpu is None else tuning.tuned_file(gpu)
    dtype = torch.float32 if options.tiny else machine.dtype
    formats = [dtype, *kernels.eight_bit_formats(machine.device)]
    rates = measure.roofs(machine.device, formats, sides=(64,) if options.tiny else ())
    plan = Plan(machine.device, dtype, options.tuned, options.seed, rates, folder=options.folder)
    plan = tiny(plan) if options.tiny else plan
    options.folder.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        file = options.folder / f"{name}.json"
        if file.exists():
            print(f"{name}: done before", file=sys.stderr, flush=True)
            continue
        print(name, file=sys.stderr, flush=True)
        document = measure.document(parser.command, plan.seed, plan.device, rates, **PARTS[name](plan))
        file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        gc.collect()
    done = [
        report.read(options.folder / f"{name}.json") for name in PARTS if (options.folder / f"{name}.json").exists()
    ]
    whole: Document = {
        kind: [row for document in done for row in document.get(kind, ())]
        for kind in measure.KINDS
        if any(kind in document for document in done)
    }
    for row in targets.reached(targets.GPU, done):
        print(f"{row['name']:5}{row['what']:48}{row['text']:>14}  {row['side']} {row['bound']}")
    measure.publish(measure.document(parser.command, plan.seed, plan.device, rates, **whole), options.out)
