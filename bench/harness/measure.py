"""The clock: interleaved runs, the machine's rates, and the document that every benchmark writes.

Protocol: warm up, then the variants in turns (A B A B ...), each as often as the others; medians with the 20th and 80th
percentile, all values kept, none dropped. Wall time and the processor time of the process stand apart.

Document, schema 1 (`check` holds a value against it):

    schema 1, command, seed, machine {...}, versions {...}, commit or null, roofs {...},
    rows [{name, what it was: any plain values, ...,
           wall / cpu / part names: {"seconds": [...], "p20", "p50", "p80"},
           skipped: why nothing was measured}]
    load, first_image, step, call, adapter_swap, serve: the rows of each kind, or absent
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import numpy as np
import torch

SCHEMA = 1
KINDS = ("load", "first_image", "step", "call", "adapter_swap", "serve")
_PACKAGES = ("stylemuse", "torch", "triton", "onnxruntime-gpu", "diffusers", "transformers", "peft")
_CACHE_BYTES = 256 << 20
"""More than the last-level cache of any GPU."""
_REQUIRED: Mapping[str, type | tuple[type, ...]] = {
    "schema": int,
    "command": str,
    "seed": int,
    "machine": dict,
    "versions": dict,
    "commit": (str, type(None)),
    "roofs": dict,
}


def series(seconds: Iterable[float]) -> dict[str, Any]:
    """All values with their percentiles."""
    values = [float(value) for value in seconds]
    assert values, "nothing was measured"
    low, middle, high = (float(value) for value in np.percentile(values, (20, 50, 80)))
    return {"seconds": values, "p20": low, "p50": middle, "p80": high}


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    variants: Mapping[str, Callable[[], Any]],
    *,
    repeats: int,
    warm: int = 1,
    device: torch.device | None = None,
    on_run: Callable[[int, int], None] | None = None,
) -> dict[str, dict[str, list[float]]]:
    """Seconds of each variant, "wall" and "cpu", run in turns ``repeats`` times after ``warm`` turns that don't count.

    Turns change direction, so that no variant always runs behind the same other.
    """
    device = device or torch.device("cpu")
    found: dict[str, dict[str, list[float]]] = {name: {"wall": [], "cpu": []} for name in variants}
    names, done = list(variants), 0
    for turn in range(warm + repeats):
        for name in names if turn % 2 == 0 else reversed(names):
            synchronize(device)
            wall, cpu = time.perf_counter(), time.process_time()
            variants[name]()
            synchronize(device)
            if turn >= warm:
                found[name]["wall"].append(time.perf_counter() - wall)
                found[name]["cpu"].append(time.process_time() - cpu)
            done += 1
            if on_run is not None:
                on_run(done, (warm + repeats) * len(names))
    return found


def on_device(
    variants: Mapping[str, Callable[[], Any]], *, repeats: int, device: torch.device, warm: int = 3
) -> dict[str, list[float]]:
    """Seconds of each variant, in turns; on a GPU the device's own, the inputs not in its cache.

    A large write before each run pushes the inputs out of the cache and keeps the GPU busy while the host prepares the
    launch, so that what lies between the two events is the variant alone.
    """
    if device.type != "cuda":
        return {name: found["wall"] for name, found in interleaved(variants, repeats=repeats, warm=warm).items()}
    flushed = torch.empty(_CACHE_BYTES, dtype=torch.uint8, device=device)
    names, seconds = list(variants), {name: list[float]() for name in variants}
    for turn in range(warm + repeats):
        for name in names if turn % 2 == 0 else reversed(names):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flushed.zero_()
            begin.record()
            variants[name]()
            end.record()
            torch.cuda.synchronize(device)
            if turn >= warm:
                seconds[name].append(begin.elapsed_time(end) / 1e3)
    return seconds


def roofs(
    device: torch.device, dtypes: Sequence[torch.dtype], *, sides: Sequence[int] = (), repeats: int = 5
) -> dict[str, Any]:
    """What this machine reaches: FLOP/s of large matrix products per number format, bytes/s of one large copy.

    Products of several sizes, the second matrix as it is and transposed, as weights lie: on a CPU that decides more
    than the size. The best of all repeats: a roof is what was possible once.
    """
    rates: dict[str, Any] = {}
    sides = sides or ((4096, 8192) if device.type == "cuda" else (1024, 2048, 4096))
    for dtype in dtypes:
        reached = []
        for side in sides:
            a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
            orders = (b.T,) if dtype == torch.float8_e4m3fn else (b, b.T)
            reached += [2 * side**3 / _best(partial(_product, a, each), device, repeats) for each in orders]
        rates[f"{short(dtype)}_flops"] = max(reached)
    source = torch.empty(1 << 26, device=device)
    target = torch.empty_like(source)
    rates["bytes"] = 2 * source.nbytes / _best(lambda: target.copy_(source), device, repeats)
    return rates | {"matrix_sides": list(sides), "copied_bytes": source.nbytes}


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """torch's own product of two matrices of any number format; of fp8 only with the second one transposed."""
    if a.dtype == torch.int8:
        return torch._int_mm(a, b)
    if a.dtype == torch.float8_e4m3fn:
        one = torch.ones((), device=a.device)
        return torch._scaled_mm(a, b, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
    return torch.mm(a, b)


def _best(run: Callable[[], Any], device: torch.device, repeats: int) -> float:
    return min(interleaved({"": run}, repeats=repeats, device=device)[""]["wall"])


def short(dtype: torch.dtype | str) -> str:
    """ "float32" of torch.float32, and of itself."""
    return str(dtype).removeprefix("torch.")


def resident_bytes() -> int | None:
    """Memory of this process that is in RAM, or None where the system doesn't tell."""
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    except OSError:
        return None
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures depend on."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "cores": usable,
        "threads": torch.get_num_threads(),
        "gpu": None,
    }
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        facts["gpu"] = {
            "name": gpu.name,
            "capability": f"{gpu.major}.{gpu.minor}",
            "memory": gpu.total_memory,
            "driver": _output("nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem", "--format=csv,noheader"),
        }
    return facts


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else "unknown"


def _output(*command: str) -> str | None:
    """The first line a program prints, or None where it can't be asked."""
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip().splitlines()[0] if found.stdout.strip() else None


def versions() -> dict[str, str | None]:
    """Of the interpreter and of the packages that a benchmark may run; None where one is not installed."""
    installed = {found.name: found.version for found in distributions()}
    return {"python": platform.python_version()} | {package: installed.get(package) for package in _PACKAGES}


def commit() -> str | None:
    """The commit of the checkout this file lies in, with "+" where files differ from it; None in an installed copy."""
    here = str(Path(__file__).resolve().parent)
    found = _output("git", "-C", here, "rev-parse", "HEAD")
    return (
        found if found is None or _output("git", "-C", here, "status", "--porcelain", "-uno") is None else f"{found}+"
    )


def document(
    command: str, seed: int, device: torch.device, rates: Mapping[str, Any], **kinds: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The document of a run; ``kinds`` are rows by kind."""
    made = {
        "schema": SCHEMA,
        "command": command,
        "seed": seed,
        "machine": machine(device),
        "versions": versions(),
        "commit": commit(),
        "roofs": dict(rates),
        **{kind: [dict(row) for row in rows] for kind, rows in kinds.items()},
    }
    check(made)
    return made


def publish(made: Mapping[str, Any], out: Path | None) -> None:
    """Write a document to a file, if one is named, and print it on the last line."""
    check(made)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(made))


def progress(done: int, total: int) -> None:
    """How far `interleaved` is, on standard error."""
    print(f"{done} of {total} runs", file=sys.stderr, flush=True)


def check(value: Any) -> None:
    """Raises ValueError, naming the place, where a value is not a document of this schema."""
    if not isinstance(value, dict):
        raise ValueError("a document is an object")
    for name, allowed in _REQUIRED.items():
        if not isinstance(value.get(name, ...), allowed):
            raise ValueError(f"{name}: {value.get(name)!r} is not allowed")
    if value["schema"] != SCHEMA:
        raise ValueError(f"schema {value['schema']} is not known; allowed: {SCHEMA}")
    if unknown := sorted(set(value) - set(_REQUIRED) - set(KINDS)):
        raise ValueError(f"unknown: {', '.join(unknown)}")
    for kind in KINDS:
        for index, row in enumerate(value.get(kind, ())):
            _check_row(f"{kind}[{index}]", row)
    json.dumps(value, allow_nan=False)


def _check_row(place: str, row: Any) -> None:
    if not isinstance(row, dict) or not isinstance(row.get("name"), str):
        raise ValueError(f"{place}: a row is an object with a name")
    measured = {name: part for name, part in row.items() if isinstance(part, dict) and "seconds" in part}
    if bool(measured) == ("skipped" in row):
        raise ValueError(f"{place}: a row has seconds or says why it was skipped")
    for name, part in measured.items():
        if part != series(part["seconds"]):
            raise ValueError(f"{place}.{name}: percentiles are not those of the seconds")
