"""What to compute on: device and number format, chosen by what the machine has, with the reason."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..core import StylemuseError
from ..kernels import quantization
from ..kernels.dispatch import REFERENCE, Kernels, obstacle, triton_kernels
from . import cpu

BACKENDS = ("reference", "triton", "onnx")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Machine:
    """Where and in which format a pipeline computes; ``why`` has a sentence for each."""

    device: torch.device
    dtype: torch.dtype
    why: dict[str, str]


def choose(device: str | torch.device | None = None, dtype: str | torch.dtype | None = None) -> Machine:
    """The machine to use; what is asked for is taken or refused, never replaced."""
    chosen, device_why = _device(device)
    number, dtype_why = _dtype(chosen, dtype)
    return Machine(chosen, number, {"device": device_why, "dtype": dtype_why})


def choose_kernels(backend: str, device: torch.device) -> tuple[Kernels, str]:
    """What the operations run with, and why; a backend that is asked for is taken or refused, never replaced."""
    if backend not in ("auto", *BACKENDS):
        raise StylemuseError(f"backend {backend!r} is not there; allowed: auto, {', '.join(BACKENDS)}")
    if backend == "reference":
        return REFERENCE, "asked for"
    problem = obstacle(device)
    if backend == "triton":
        if problem:
            raise StylemuseError(f"backend 'triton' cannot run here: {problem}")
        return triton_kernels(device), "asked for"
    if device.type == "cpu":
        return REFERENCE, "no GPU is used"
    if problem:
        return REFERENCE, f"Triton cannot run here: {problem}"
    return triton_kernels(device), "a GPU is there; measured on an H100 in bf16, on no other yet"


def choose_quantization(asked: str | None, kernels: Kernels, device: torch.device) -> torch.dtype | None:
    """The 8-bit format that is asked for, which is taken or refused; None where none is."""
    if asked is None:
        return None
    if asked not in quantization.FORMATS:
        raise StylemuseError(f"quantization {asked!r} is not there; allowed: {', '.join(quantization.FORMATS)}")
    problem = quantization.obstacle(asked, device) if "quantized_linear" in kernels.triton else None
    if problem:
        raise StylemuseError(f"quantization {asked!r} cannot run here: {problem}")
    return quantization.FORMATS[asked]


def _device(asked: str | torch.device | None) -> tuple[torch.device, str]:
    if asked is None:
        if torch.cuda.is_available():
            return torch.device("cuda"), "a GPU is there"
        return torch.device("cpu"), "no GPU is there"
    try:
        device = torch.device(asked)
    except RuntimeError:
        raise StylemuseError(f"device {asked!r} is unknown; allowed: cpu, cuda, cuda:0, ...") from None
    if device.type not in ("cpu", "cuda"):
        raise StylemuseError(f"device {asked!r} is not supported; allowed: cpu, cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise StylemuseError(f"device {asked!r} is not on this machine, which has {torch.cuda.device_count()} GPUs")
    return device, "asked for"


def _dtype(device: torch.device, asked: str | torch.dtype | None) -> tuple[torch.dtype, str]:
    if asked is not None:
        dtype = DTYPES.get(asked) if isinstance(asked, str) else asked
        if dtype is None or dtype not in DTYPES.values():
            raise StylemuseError(f"dtype {asked!r} is not supported; allowed: {', '.join(DTYPES)}")
        return dtype, "asked for"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "this GPU has bf16 tensor cores"
        return torch.float32, "this GPU has no bf16 tensor cores; fp16 overflows in the VQ decoder"
    found = cpu.features()
    for name in ("AMX", "AVX-512 BF16"):
        if name in found:
            return torch.bfloat16, f"this CPU has bf16 instructions ({name})"
    if "BF16" in found:
        return torch.float32, "bf16 has not been measured on this kind of CPU; ask for it to try"
    return torch.float32, "this CPU has no bf16 instructions, and emulated ones are slow"
