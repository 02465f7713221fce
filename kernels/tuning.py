"""How kernels are cut into tiles and scheduled, and the list of everything that can be launched.

A launch has two parts. A `Call` is what is computed: a kernel, its arguments, and the constants that select its code.
A `Launch` is how: tile sizes, warps, pipeline stages. A kernel's file has its default launch per architecture;
`tuned/<gpu>.json`, written on that GPU by ``stylemuse bench tune``, overrides it for the problems it lists.

The same row must give the same bits alone and in any batch. So the choices of a problem are a family: all give equal
bits, and only then may the launch depend on how many tokens a batch has. What decides bits, as a split of a sum does,
depends on the problem's weights, number format and head size alone.

Each file with kernels has a function `specimens(family)`: calls on meta tensors, one for every way its kernels are
compiled, each with every launch that may be chosen for it. So all launches can be enumerated without a GPU, to compile
them ahead of time or to time them:

    for specimen in specimens("sm_90"):
        for launch in specimen.launches:
            signature, constants, attributes = specimen.call.signature(launch)
            source = ASTSource(specimen.call.kernel, signature, constants, attributes)
            triton.compile(source, target=..., options=launch.options)
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from .dispatch import UNSPECIALIZED

FAMILIES = ("sm_80", "sm_90", "sm_100", "gfx942")
"""Architectures with defaults of their own; another GPU takes the nearest older one's."""

INTERPRETER = "interpreter"
"""The family of a CPU, where kernels only run interpreted."""

MODULES = ("inputs", "product", "bottleneck", "attention", "response_norm", "depthwise", "decoding_step")
"""The files with kernels."""

SHARED_MEMORY = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
"""Bytes of shared memory one program can have (CUDA C++ programming guide, table of compute capabilities; CDNA 3)."""

_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "i1",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.float8_e4m3fn: "fp8e4nv",
}


@dataclass(frozen=True)
class Launch:
    """Tile sizes by the name of the kernel's constant, warps of a program, stages of its pipeline."""

    tiles: Mapping[str, int]
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, int]:
        """The compiler's options, as Triton names them."""
        return {"num_warps": self.warps, "num_stages": self.stages}

    def __str__(self) -> str:
        return "x".join(str(size) for size in self.tiles.values()) + f", {self.warps} warps, {self.stages} stages"


@dataclass(frozen=True)
class Described:
    """A matrix (rows, columns), contiguous, as a kernel's argument from which whole tiles are loaded.

    On NVIDIA's chips from Hopper on a load is then one instruction of the tensor memory accelerator.

    Attributes:
        tensor: rows must start at multiples of 16 bytes.
        tile: the names of the tile's two sizes.
    """

    tensor: Tensor
    tile: tuple[str, str]

    def shape(self, tiles: Mapping[str, int]) -> list[int]:
        """Of a launch's tile."""
        return [tiles[name] for name in self.tile]

    def given(self, tiles: Mapping[str, int]) -> Any:
        """As Triton takes it."""
        from triton.tools.tensor_descriptor import TensorDescriptor

        return TensorDescriptor(self.tensor, list(self.tensor.shape), list(self.tensor.stride()), self.shape(tiles))


def describable(tensor: Tensor) -> bool:
    """Whether a contiguous matrix can be `Described`."""
    return tensor.shape[1] * tensor.itemsize % 16 == 0 and tensor.data_ptr() % 16 == 0


@dataclass(frozen=True)
class Call:
    """A kernel with its arguments.

    Attributes:
        kernel: the jitted function.
        arguments: tensors, described matrices, numbers, or None for what is absent, by name.
        constants: what selects the kernel's code, by name; tiles come from the launch.
        grid: the tiles -> how many programs along each axis.
    """

    kernel: Any
    arguments: Mapping[str, Tensor | Described | int | float | None]
    constants: Mapping[str, Any]
    grid: Callable[[Mapping[str, int]], tuple[int, ...]]

    def run(self, launch: Launch) -> None:
        """Launch it, on the device of its tensors."""
        if (tried := _TRIAL.get()) is not None:
            tried.add(self)
        if (calls := _NOTED.get()) is not None:
            calls.append(self)
            return
        device = next(value.device for value in self.arguments.values() if isinstance(value, Tensor))
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            self.kernel[self.grid(launch.tiles)](**self._given(launch))

    def compile(self, launch: Launch) -> None:
        """Compile it for the current GPU, which leaves it in Triton's cache; nothing is launched."""
        self.kernel.run(grid=(1,), warmup=True, **self._given(launch))

    def _given(self, launch: Launch) -> dict[str, Any]:
        """All that Triton's launcher takes by name."""
        arguments = {
            name: value.given(launch.tiles) if isinstance(value, Described) else value
            for name, value in self.arguments.items()
        }
        options = launch.options | ({"launch_pdl": True} if self.constants.get("DEPENDENT") else {})
        return {**arguments, **self.constants, **launch.tiles, **options}

    def signature(self, launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list[list[Any]]]]:
        """What Triton would specialize this launch on: types by argument, constants, and which numbers are aligned.

        Like Triton's own launcher: an integer of 1 and an absent argument are constants; tensors, which torch aligns,
        and multiples of 16 are marked as divisible by 16; `UNSPECIALIZED` integers are neither.
        """
        constants: dict[str, Any] = {**self.constants, **launch.tiles}
        types: dict[str, str] = {}
        aligned: dict[tuple[int], list[list[Any]]] = {}
        for index, name in enumerate(self.kernel.arg_names):
            value = constants.get(name, self.arguments.get(name))
            special = name not in UNSPECIALIZED
            if name in constants or value is None or (special and isinstance(value, int) and value == 1):
                types[name], constants[name] = "constexpr", value
            elif isinstance(value, Described):
                types[name] = f"tensordesc<{_TYPES[value.tensor.dtype]}{value.shape(launch.tiles)}>"
            elif isinstance(value, Tensor):
                types[name], aligned[(index,)] = f"*{_TYPES[value.dtype]}", [["tt.divisibility", 16]]
            elif isinstance(value, float):
                types[name] = "fp32"
            else:
                types[name] = "i32" if abs(value) < 2**31 else "i64"
                if special and value % 16 == 0:
                    aligned[(index,)] = [["tt.divisibility", 16]]
        return types, constants, aligned


@dataclass(frozen=True)
class Specimen:
    """One way a kernel is compiled, with all launches that may be chosen for it, the default first.

    `name` tells the kernel, what is computed and the number format, say "linear q,k,v with adapter, bfloat16". A
    `matrix` kernel must use the chip's matrix units where its number format is not fp32; the `newest` of them where
    its tiles are large enough, unless Triton has none for the format.
    """

    name: str
    call: Call
    launches: tuple[Launch, ...]
    matrix: bool
    newest: bool = True


def specimens(family: str) -> Iterator[Specimen]:
    """Everything of this package that can be launched on an architecture of `FAMILIES`."""
    for module in MODULES:
        yield from import_module(f".{module}", __package__).specimens(family)


def family(device: torch.device) -> str:
    """The architecture of a device, one of `FAMILIES` or `INTERPRETER`."""
    if device.type == "cpu":
        return INTERPRETER
    return _family(device.index if device.index is not None else torch.cuda.current_device())


@cache
def _family(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return "gfx942"
    return "sm_80" if properties.major < 9 else "sm_90" if properties.major < 10 else "sm_100"


def precision(architecture: str) -> str:
    """How matrix units multiply fp32, as Triton names it.

    NVIDIA's have no fp32: three products of TF32 parts, which leave out 2^-22 of a product, about what fp32 rounds off
    (3xTF32, NVIDIA CUTLASS example 27). CDNA 3 multiplies fp32 as it is, and so does the interpreter.
    """
    return "tf32x3" if architecture.startswith("sm_") else "ieee"


def dependent(architecture: str) -> bool:
    """Whether kernels are put on the chip while the one before still runs (`device.follow`)."""
    return architecture in ("sm_90", "sm_100")


Problem = tuple[str, str, int | None]
"""Operation, problem, and tokens of the batch, None where the launch must not depend on them."""


@dataclass
class Met:
    """A problem that came up, with the launches that may be chosen for it, and its calls."""

    choices: tuple[Launch, ...]
    calls: list[Call]


class _Trial:
    """What `trial` was given, and what it has met; a call is launched right after its launch was picked."""

    def __init__(self, forced: Mapping[tuple[str, str], Launch]) -> None:
        self.met: dict[Problem, Met] = {}
        self._forced = forced
        self._last: Met | None = None

    def pick(self, problem: Problem, choices: tuple[Launch, ...]) -> Launch:
        """The launch that is forced, or the default."""
        self._last = self.met.setdefault(problem, Met(choices, []))
        return self._forced.get(problem[:2], choices[0])

    def add(self, call: Call) -> None:
        """A call of the problem that was picked for last."""
        if self._last is not None:
            self._last.calls.append(call)
            self._last = None


_NONE_FORCED: Mapping[tuple[str, str], Launch] = MappingProxyType({})


@contextmanager
def trial(forced: Mapping[tuple[str, str], Launch] = _NONE_FORCED) -> Iterator[dict[Problem, Met]]:
    """Within it the launches of these (operation, problem) are taken, and defaults for the rest, whatever was measured
    before; the problems that come up are collected, with their calls and so with their tensors.
    """
    made = _Trial(forced)
    token = _TRIAL.set(made)
    try:
        yield made.met
    finally:
        _TRIAL.reset(token)


_TRIAL: ContextVar[_Trial | None] = ContextVar("trial", default=None)


@contextmanager
def noted() -> Iterator[list[Call]]:
    """Within it nothing is launched: the calls are collected, and what they would have written holds anything."""
    calls: list[Call] = []
    token = _NOTED.set(calls)
    try:
        yield calls
    finally:
        _NOTED.reset(token)


_NOTED: ContextVar[list[Call] | None] = ContextVar("noted", default=None)


def pick(
    operation: str, problem: str, device: torch.device, choices: tuple[Launch, ...], tokens: int | None = None
) -> Launch:
    """The launch for a problem on a device: the one measured at the nearest number of tokens, else the first choice.

    ``choices`` give equal bits. A measured launch that is none of them is not taken: its bits may be others.
    """
    if (tried := _TRIAL.get()) is not None:
        return tried.pick((operation, problem, tokens), choices)
    measured = {} if device.type == "cpu" else _tuned(_gpu(device)).get((operation, problem), {})
    launch = measured.get(_nearest(tuple(measured), tokens))
    return choices[0] if launch is None or launch not in choices else launch


def _nearest(measured: tuple[int | None, ...], tokens: int | None) -> int | None:
    """The measured number of tokens that is nearest in ratio; None stands for any number."""
    sizes = [size for size in measured if size is not None]
    if tokens is None or not sizes:
        return None
    return min(sizes, key=lambda size: max(size / tokens, tokens / size))


def tuned_file(gpu: str) -> Path:
    """Where the measured launches of a GPU are, by the name its driver gives it."""
    return Path(__file__).parent / "tuned" / f"{re.sub(r'[^a-z0-9]+', '-', gpu.lower()).strip('-')}.json"


Tuned = Mapping[tuple[str, str], Mapping[int | None, Launch]]
"""(operation, problem) -> tokens at which it was measured, None for any -> launch."""


def read_tuned(file: Path) -> Tuned:
    """The launches of a GPU's file; empty where there is none.

    {gpu, torch, triton, commit, "launches": {operation: {problem: {tokens or "any": {tiles, warps, stages, seconds}}}}}
    """
    if not file.exists():
        return {}
    launches = json.loads(file.read_text(encoding="utf-8"))["launches"]
    return {
        (operation, problem): {
            None if tokens == "any" else int(tokens): Launch(entry["tiles"], entry["warps"], entry["stages"])
            for tokens, entry in sizes.items()
        }
        for operation, problems in launches.items()
        for problem, sizes in problems.items()
    }


@cache
def _gpu(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


@cache
def _tuned(gpu: str) -> Tuned:
    return read_tuned(tuned_file(gpu))


def ceil_div(value: int, size: int) -> int:
    """How many tiles of a size cover a value."""
    return -(-value // size)


def power_of_two(value: int, least: int = 16) -> int:
    """The smallest power of two that is not below the value nor below ``least``."""
    return max(least, 1 << (value - 1).bit_length())


def named_strides(tensor: Tensor | None, *names: str) -> dict[str, int]:
    """A tensor's first strides by name, in elements; zeros where there is no tensor."""
    return dict.fromkeys(names, 0) if tensor is None else dict(zip(names, tensor.stride(), strict=False))
