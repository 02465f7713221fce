"""8-bit numbers with a scale: of weights, once; of activations, at every call.

    Q = round(x / s),  s = max |x| / m        of each vector of the last dimension, in fp32
    int8    m = 127, the nearest whole number, a tie to the even one
    fp8     m = 448, the nearest e4m3 (1 sign, 4 exponent, 3 mantissa bits), whose error is a share of each number

A vector is an output of a weight, or a token: rows stay alone. Sources: scales per token and per channel, SmoothQuant,
arXiv 2211.10438; e4m3, arXiv 2209.05433.

The device's part of it is in `inputs`: a program holds whole tokens, so that it finds their largest number, divides by
it and writes them with x read once. What a pair shrinks is not quantized: SVDQuant, arXiv 2411.05007.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .dispatch import INTERPRETED, constant, jit, tl
from .tuning import INTERPRETER

FORMATS: Mapping[str, torch.dtype] = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
"""The number formats by the name they are asked for."""
NAMES: Mapping[torch.dtype, str] = {number: name for name, number in FORMATS.items()}
LARGEST: Mapping[torch.dtype, float] = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""m: where the largest number of a vector comes to lie."""
SMALLEST = 2.0**-100
"""The largest number of a vector is taken to be at least this, so that zeros have a scale."""
_WHOLE = constant(1.5 * 2**23)
"""fp32 numbers of this size have no fraction: adding it rounds to the nearest whole number, a tie to the even one."""
_ROUND_FIRST = constant(INTERPRETED)
"""Triton's interpreter drops the carry of an fp8 mantissa that is rounded up, so there it is given rounded numbers."""


@dataclass(frozen=True)
class Quantized:
    """8-bit numbers (..., n) and the fp32 scale (...) of each vector of them; together s Q."""

    values: Tensor
    scales: Tensor

    @property
    def nbytes(self) -> int:
        """The memory both take."""
        return self.values.nbytes + self.scales.nbytes

    def wide(self) -> Tensor:
        """s Q in fp32."""
        return self.values.float() * self.scales[..., None]


def quantize_reference(x: Tensor, number: torch.dtype) -> Quantized:
    """Every vector of the last dimension with a scale of its own: weights by output, activations by token."""
    wide = x.float()
    most = wide.abs().amax(-1).clamp(min=SMALLEST)
    # By a tensor: on a GPU torch divides by a number through its reciprocal, which rounds otherwise.
    scales = most / torch.full_like(most, LARGEST[number])
    values = wide / scales[..., None]
    return Quantized((values.round() if number == torch.int8 else values).to(number), scales)


@jit
def rounded(value: tl.tensor, INTEGER: tl.constexpr) -> tl.tensor:
    """fp32 numbers at which the 8-bit format has one."""
    if INTEGER:
        value = (value + _WHOLE) - _WHOLE
    elif _ROUND_FIRST:
        # Adding 1.5 2^23 times the step between neighbours, which is 2^-9 at least, rounds to one of them.
        bits = value.to(tl.int32, bitcast=True)
        exponent = tl.maximum((bits >> 23) & 255, 121)
        far = (((exponent + 20) << 23) | 0x400000).to(tl.float32, bitcast=True)
        nearest = (tl.abs(value) + far) - far
        value = (nearest.to(tl.int32, bitcast=True) | ((bits >> 31) << 31)).to(tl.float32, bitcast=True)
    return value


def obstacle(name: str, device: torch.device) -> str | None:
    """What keeps the kernels from a format on a device, as a sentence that says what is needed; None where nothing."""
    if name != "fp8" or device.type == "cpu":
        return None
    if torch.version.hip:
        return "AMD's GPUs have another fp8 than e4m3; allowed here: int8"
    capability = torch.cuda.get_device_capability(device)
    if capability >= (8, 9):
        return None
    return f"fp8 needs compute capability 8.9, this GPU has {capability[0]}.{capability[1]}; allowed here: int8"


def formats(architecture: str) -> tuple[str, ...]:
    """The names of those that an architecture's matrix units multiply."""
    return ("int8", "fp8") if architecture in ("sm_90", "sm_100", INTERPRETER) else ("int8",)
