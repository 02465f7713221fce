"""What a kernel takes of a chip, read from its compiled code; no GPU is needed.

Registers, spills and instructions: of NVIDIA's from the cubin, by the ``cuobjdump`` that comes with Triton, and from
the PTX; of AMD's from the assembly's metadata. Shared memory is what the launch asks for.

Occupancy is the share of a multiprocessor's warps that can be resident, bound by its registers, its shared memory, and
how many warps and programs it holds. Source: CUDA C++ programming guide, table of compute capabilities, and the CUDA
occupancy calculator (registers come in units of 256 a warp, 1 KiB of shared memory is the system's); AMD CDNA 3
instruction set, section 3 (512 vector registers a lane in units of 8, 8 waves on each of 4 SIMDs, 64 KiB of LDS).

Triton reads TRITON_INTERPRET and our kernels look for Triton when they are imported. So this file runs as a program of
its own, ``worker``, in an environment where kernels are made for GPUs.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.language import constexpr
from triton.runtime import JITFunction

from stylemuse.kernels.tuning import SHARED_MEMORY, Launch, Specimen, specimens

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
MATRIX_UNITS = {
    "sm_80": r"\bmma\.sync",
    "sm_90": r"\bwgmma\.mma_async|\bmma\.sync",
    "sm_100": r"\btcgen05\.mma\.cta|\bmma\.sync",
    "gfx942": r"\bv_mfma_\w+",
}
"""Instructions of the matrix units, in PTX or in AMD's assembly."""
NEWEST_UNITS = {"sm_90": r"\bwgmma\.mma_async", "sm_100": r"\btcgen05\.mma\.cta"}
"""Those that alone reach the chip's rate; they take tiles of 64 rows and more, the first size of a launch."""
_LEAST_ROWS = 64
_SHARED_OF_PROCESSOR = {"sm_80": 164 << 10, "sm_90": 228 << 10, "sm_100": 228 << 10, "gfx942": 64 << 10}


@dataclass(frozen=True)
class Figures:
    """One launch of one specimen on one architecture.

    `registers` are a thread's; `spilled` are bytes of local memory a thread has; `shared` bytes of a program;
    `matrix_instructions` counts those of the matrix units in the code, by name; `faults` says what is wrong; `key` is
    that of what was compiled.
    """

    architecture: str
    name: str
    launch: str
    default: bool
    warps: int
    registers: int
    spilled: int
    shared: int
    occupancy: float
    matrix_instructions: dict[str, int]
    faults: tuple[str, ...]
    key: str


def key(architecture: str, specimen: Specimen, launch: Launch) -> str:
    """What the compiled code depends on: the source of the kernel and of all it calls, its arguments, the compiler.

    Triton's own key of a kernel is another one when other kernels were asked for theirs before.
    """
    source = _source(specimen, launch)
    parts = (
        triton.__version__, TARGETS[architecture], launch.options, source.signature, source.constants, source.attrs,
        dict(_sources(specimen.call.kernel)),
    )  # fmt: skip
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _sources(function: JITFunction[Any]) -> Iterator[tuple[str, object]]:
    """The texts of a kernel and of what it calls, and the numbers that it reads from its module."""
    yield function.fn.__qualname__, function.src
    for name in function.fn.__code__.co_names:
        value = function.fn.__globals__.get(name)
        if isinstance(value, JITFunction):
            yield from _sources(value)
        elif isinstance(value, constexpr):
            yield f"{function.fn.__qualname__} {name}", value.value


def _source(specimen: Specimen, launch: Launch) -> ASTSource:
    return ASTSource(specimen.call.kernel, *specimen.call.signature(launch))


def compiled(architecture: str, specimen: Specimen, launch: Launch) -> Figures:
    """Compile it and look."""
    source = _source(specimen, launch)
    made = triton.compile(source, target=TARGETS[architecture], options=launch.options)
    if "cubin" in made.asm:
        text, (registers, spilled) = made.asm["ptx"], _of_cubin(made.asm["cubin"])
    else:
        text = made.asm["amdgcn"]
        registers, spilled = _metadata(text, "vgpr_count"), _metadata(text, "private_segment_fixed_size")
    found: dict[str, int] = {}
    for instruction in re.findall(MATRIX_UNITS[architecture], text):
        found[instruction] = found.get(instruction, 0) + 1
    shared = made.metadata.shared
    return Figures(
        architecture,
        specimen.name,
        str(launch),
        launch == specimen.launches[0],
        launch.warps,
        registers,
        spilled,
        shared,
        occupancy(architecture, launch.warps, registers, shared),
        found,
        tuple(_faults(architecture, specimen, launch, spilled, shared, text)),
        key(architecture, specimen, launch),
    )


def _faults(
    architecture: str, specimen: Specimen, launch: Launch, spilled: int, shared: int, text: str
) -> Iterator[str]:
    if spilled:
        yield f"{spilled} bytes a thread in local memory"
    if shared > SHARED_MEMORY[architecture]:
        yield f"{shared} bytes of shared memory, {SHARED_MEMORY[architecture]} are there"
    if specimen.matrix and "float32" not in specimen.name:
        units = MATRIX_UNITS[architecture]
        if specimen.newest and next(iter(launch.tiles.values())) >= _LEAST_ROWS:
            units = NEWEST_UNITS.get(architecture, units)
        if not re.search(units, text):
            yield f"no instruction of the matrix units ({units})"


def _of_cubin(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of the stack, on which spills lie) of a thread."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(file)]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", told)
    assert usage is not None, told
    return int(usage[1]), int(usage[2])


def _metadata(assembly: str, name: str) -> int:
    found = re.search(rf"\.{name}:\s+(\d+)", assembly)
    assert found is not None, name
    return int(found[1])


def occupancy(architecture: str, warps: int, registers: int, shared: int) -> float:
    """Resident warps of a multiprocessor, of those it can hold; registers of a thread, shared bytes of a program."""
    room = _SHARED_OF_PROCESSOR[architecture]
    if architecture == "gfx942":
        waves = min(8, 512 // max(8, -(-registers // 8) * 8)) * 4
        programs = min(waves // warps, room // shared if shared else 32)
        return programs * warps / 32
    of_warp = -(-max(registers, 1) * 32 // 256) * 256
    programs = min(65536 // (of_warp * warps), room // (shared + 1024), 64 // warps, 32)
    return programs * warps / 64


def jobs(architectures: list[str], pattern: str) -> Iterator[tuple[str, Specimen, Launch]]:
    """Every launch of every specimen whose name matches, in a fixed order."""
    for architecture in architectures:
        for specimen in specimens(architecture):
            if re.search(pattern, specimen.name):
                for launch in specimen.launches:
                    yield architecture, specimen, launch


def worker() -> None:
    """Read what to do as JSON from standard input; print the figures of every n-th job, a line each.

    Figures that are `known`, by their keys, are not compiled again. With `keys`, keys alone are told.
    """
    order: dict[str, Any] = json.load(sys.stdin)
    known: dict[str, dict[str, Any]] = order["known"]
    for index, job in enumerate(jobs(order["architectures"], order["match"])):
        architecture, specimen, launch = job
        if index % order["workers"] != order["worker"] or (order["defaults"] and launch != specimen.launches[0]):
            continue
        made = key(*job)
        if order["keys"]:
            figures: dict[str, Any] = {"key": made}
        elif made in known:
            names = {"architecture": architecture, "name": specimen.name, "launch": str(launch)}
            figures = {**known[made], **names, "default": launch == specimen.launches[0]}
        else:
            figures = asdict(compiled(*job))
        print(json.dumps({"index": index, **figures}), flush=True)
