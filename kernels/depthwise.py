"""Depthwise 3x3 convolution over the grid, then the RMS norm of every token: the entrance of a ConvNeXt block.

    h[t, c] = sum over the 3 x 3 neighbours s of t of x[s, c] k[c, s - t], zero beyond the border
    y = h / sqrt(mean over channels of h^2 + eps) w

x (R, N, C) with N = height x width, k (C, 1, 3, 3), w (C,) -> (R, N, C). Source: ConvNeXt, arXiv 2201.03545, figure 4;
the norm as in diffusers' `ConvNextBlock`.

The kernel: a program keeps whole tokens in registers, so h, T C numbers written and read, never reaches memory, and x
is read as the blocks have it, channels last; a neighbour's second read finds the L1 cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from .convolution import convolve
from .dispatch import REFERENCE, Kernels, forward_only, jit, operator, tl
from .norm import norm_reference
from .tuning import Call, Launch, Specimen, ceil_div, named_strides, pick, power_of_two


def depthwise_norm_reference(
    x: Tensor, grid: tuple[int, int], kernel: Tensor, weight: Tensor, epsilon: float
) -> Tensor:
    """The definition in plain torch."""
    h = convolve(x.unflatten(1, grid).permute(0, 3, 1, 2), kernel, padding=1, groups=kernel.shape[0])
    return norm_reference(h.permute(0, 2, 3, 1).flatten(1, 2), weight, epsilon)


def choices(channels: int) -> tuple[Launch, ...]:
    """The launches for a width, the default first: about 2048 numbers a program."""
    fits = max(1, 2048 // power_of_two(channels))
    return tuple(Launch({"BLOCK_TOKENS": tokens}, 4, 1) for tokens in (fits, 2 * fits))


@jit
def _depthwise_kernel(
    x: tl.tensor,
    kernel: tl.tensor,
    weight: tl.tensor,
    y: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    epsilon: tl.tensor,
    x_row: tl.tensor,
    x_token: tl.tensor,
    x_channel: tl.tensor,
    y_row: tl.tensor,
    y_token: tl.tensor,
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
) -> None:
    """Some tokens of one row."""
    row_tiles = tl.cdiv(height * width, BLOCK_TOKENS)
    row = (tl.program_id(0) // row_tiles).to(tl.int64)
    token = (tl.program_id(0) % row_tiles) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    line, column = token // width, token % width
    channel = tl.arange(0, PADDED)
    channel_inside = channel < CHANNELS
    value = tl.zeros((BLOCK_TOKENS, PADDED), tl.float32)
    for tap in tl.static_range(9):
        down, right = tap // 3 - 1, tap % 3 - 1
        inside = (line + down >= 0) & (line + down < height) & (column + right >= 0) & (column + right < width)
        at = x + row * x_row + (token + down * width + right)[:, None] * x_token + channel[None, :] * x_channel
        neighbour = tl.load(at, inside[:, None] & channel_inside[None, :], 0.0).to(tl.float32)
        value += neighbour * tl.load(kernel + channel * 9 + tap, channel_inside, 0.0).to(tl.float32)[None, :]
    spread = tl.sqrt(tl.sum(value * value, 1) / CHANNELS + epsilon)
    value = value / spread[:, None] * tl.load(weight + channel, channel_inside, 0.0).to(tl.float32)[None, :]
    y_at = y + row * y_row + token[:, None] * y_token + channel[None, :]
    tl.store(y_at, value.to(y.dtype.element_ty), (token < height * width)[:, None] & channel_inside[None, :])


def _call(x: Tensor, grid: tuple[int, int], kernel: Tensor, weight: Tensor, epsilon: float, y: Tensor) -> Call:
    """The launch that fills y."""
    rows, tokens, channels = x.shape
    height, width = grid
    assert tokens == height * width, "as many tokens as the grid has"
    assert (kernel.shape, weight.shape) == ((channels, 1, 3, 3), (channels,)), "one filter and one weight per channel"
    assert all(parameter.is_contiguous() for parameter in (kernel, weight)), "parameters lie in one piece"
    strides = named_strides(x, "x_row", "x_token", "x_channel") | named_strides(y, "y_row", "y_token")
    constants = {"CHANNELS": channels, "PADDED": power_of_two(channels)}

    def programs(tiles: Mapping[str, int]) -> tuple[int, ...]:
        return (rows * ceil_div(tokens, tiles["BLOCK_TOKENS"]),)

    tensors = {"x": x, "kernel": kernel, "weight": weight, "y": y}
    sizes = {"height": height, "width": width}
    return Call(_depthwise_kernel, {**tensors, **sizes, "epsilon": float(epsilon), **strides}, constants, programs)


def _output(x: Tensor, *_: object) -> Tensor:
    """An empty y."""
    return x.new_empty(x.shape)


@operator(
    "depthwise_norm(Tensor x, SymInt height, SymInt width, Tensor kernel, Tensor weight, float epsilon) -> Tensor",
    fake=_output,
)
def _depthwise_norm(x: Tensor, height: int, width: int, kernel: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    y = _output(x)
    problem = f"{x.shape[2]} {str(x.dtype).removeprefix('torch.')}"
    call = _call(x, (height, width), kernel, weight, epsilon, y)
    call.run(pick("depthwise_norm", problem, x.device, choices(x.shape[2])))
    return y


def depthwise_norm(
    x: Tensor,
    grid: tuple[int, int],
    kernel: Tensor,
    weight: Tensor,
    epsilon: float,
    *,
    kernels: Kernels = REFERENCE,
) -> Tensor:
    """The convolution over the grid (height, width) and the norm; see the module's docstring."""
    if "depthwise_norm" not in kernels.triton:
        return depthwise_norm_reference(x, grid, kernel, weight, epsilon)
    forward_only(x, kernel, weight)
    return _depthwise_norm(x, *grid, kernel, weight, epsilon)


def specimens(architecture: str) -> Iterator[Specimen]:
    """Every way the kernel is compiled for amused-256."""
    channels = 768
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x = torch.empty(2, 256, channels, dtype=dtype, device="meta")
        call = _call(x, (16, 16), x.new_empty(channels, 1, 3, 3), x.new_empty(channels), 1e-6, _output(x))
        yield Specimen(f"depthwise norm, {str(dtype).removeprefix('torch.')}", call, choices(channels), matrix=False)
