"""Global response norm: y = gamma (x n) + beta + x, n = |x_c| / (mean over channels of |x_c| + 1e-6).

x (R, N, C), gamma and beta (C,) -> (R, N, C). |x_c| is a channel's Euclidean norm over the N tokens of its row, so
every token hangs on all others of the row. Source: ConvNeXt V2, arXiv 2301.00808, section 4.

The kernels: one for the channels' norms, which reads x once, in token order whatever the launch; one that averages them
and writes y. Apart, the square, the sum, the gain and the product move T C numbers six times, here three times.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from .dispatch import REFERENCE, Kernels, constant, forward_only, jit, operator, tl
from .tuning import Call, Launch, Specimen, ceil_div, named_strides, pick, power_of_two

_EPSILON = constant(1e-6)


def response_norm_reference(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """The definition in plain torch, the sum of squares in fp32."""
    # `torch.linalg.vector_norm` over the positions takes 3 (bf16) to 9 times (fp32) as long on a CPU.
    squares = x.square().sum(dim=1, keepdim=True, dtype=torch.float32)
    # A channel of zeros has the norm 0, as near as fp32 can tell, and a gradient, which a root of 0 has not.
    norms = squares.clamp_min(torch.finfo(torch.float32).tiny).sqrt().to(x.dtype)
    gain = 1 + gamma * (norms / (norms.mean(dim=-1, keepdim=True) + 1e-6))
    return torch.addcmul(beta, x, gain)


def choices() -> tuple[Launch, ...]:
    """The launches of the channels' norms, the default first."""
    return tuple(Launch({"BLOCK_TOKENS": 32, "BLOCK_CHANNELS": channels}, 4, 2) for channels in (64, 32))


def apply_choices(channels: int) -> tuple[Launch, ...]:
    """The launches of what follows, the default first."""
    fits = max(1, 8192 // power_of_two(channels))
    return tuple(Launch({"BLOCK_TOKENS": tokens}, 8, 1) for tokens in (fits, max(1, fits // 2)))


@jit
def _norms_kernel(
    x: tl.tensor,
    norms: tl.tensor,
    tokens: tl.tensor,
    channels: tl.tensor,
    x_row: tl.tensor,
    x_token: tl.tensor,
    x_channel: tl.tensor,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
) -> None:
    """The norms of some channels of one row."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    total = tl.zeros((BLOCK_TOKENS, BLOCK_CHANNELS), tl.float32)
    for first in range(0, tokens, BLOCK_TOKENS):
        token = first + tl.arange(0, BLOCK_TOKENS)
        inside = (token < tokens)[:, None] & (channel < channels)[None, :]
        at = x + row * x_row + token[:, None] * x_token + channel[None, :] * x_channel
        value = tl.load(at, inside, 0.0).to(tl.float32)
        total += value * value
    tl.store(norms + row * channels + channel, tl.sqrt(tl.sum(total, 0)), channel < channels)


@jit
def _response_norm_kernel(
    x: tl.tensor,
    norms: tl.tensor,
    gamma: tl.tensor,
    beta: tl.tensor,
    y: tl.tensor,
    tokens: tl.tensor,
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
    row_tiles = tl.cdiv(tokens, BLOCK_TOKENS)
    row = (tl.program_id(0) // row_tiles).to(tl.int64)
    token = (tl.program_id(0) % row_tiles) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    channel = tl.arange(0, PADDED)
    channel_inside = channel < CHANNELS
    norm = tl.load(norms + row * CHANNELS + channel, channel_inside, 0.0)
    response = norm / (tl.sum(norm, 0) / CHANNELS + _EPSILON)
    gain = 1.0 + tl.load(gamma + channel, channel_inside, 0.0).to(tl.float32) * response
    inside = (token < tokens)[:, None] & channel_inside[None, :]
    at = x + row * x_row + token[:, None] * x_token + channel[None, :] * x_channel
    offset = tl.load(beta + channel, channel_inside, 0.0).to(tl.float32)
    value = tl.load(at, inside, 0.0).to(tl.float32) * gain[None, :] + offset[None, :]
    y_at = y + row * y_row + token[:, None] * y_token + channel[None, :]
    tl.store(y_at, value.to(y.dtype.element_ty), inside)


def _calls(x: Tensor, gamma: Tensor, beta: Tensor, norms: Tensor, y: Tensor) -> tuple[Call, Call]:
    """The launches that fill norms, and then y."""
    rows, tokens, channels = x.shape
    assert gamma.shape == beta.shape == (channels,), "one gamma and one beta per channel"
    assert gamma.is_contiguous(), "parameters lie in one piece"
    assert beta.is_contiguous(), "parameters lie in one piece"

    def sums_grid(tiles: Mapping[str, int]) -> tuple[int, ...]:
        return rows, ceil_div(channels, tiles["BLOCK_CHANNELS"])

    def apply_grid(tiles: Mapping[str, int]) -> tuple[int, ...]:
        return (rows * ceil_div(tokens, tiles["BLOCK_TOKENS"]),)

    constants = {"CHANNELS": channels, "PADDED": power_of_two(channels)}
    strides = named_strides(x, "x_row", "x_token", "x_channel")
    sums = Call(
        _norms_kernel, {"x": x, "norms": norms, "tokens": tokens, "channels": channels, **strides}, {}, sums_grid
    )
    tensors = {"x": x, "norms": norms, "gamma": gamma, "beta": beta, "y": y}
    strides |= named_strides(y, "y_row", "y_token")
    applied = Call(_response_norm_kernel, {**tensors, "tokens": tokens, **strides}, constants, apply_grid)
    return sums, applied


def _output(x: Tensor, *_: object) -> Tensor:
    """An empty y."""
    return x.new_empty(x.shape)


@operator("response_norm(Tensor x, Tensor gamma, Tensor beta) -> Tensor", fake=_output)
def _response_norm(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    y, norms = _output(x), torch.empty(x.shape[0], x.shape[2], device=x.device)
    sums, applied = _calls(x, gamma, beta, norms, y)
    problem = f"{x.shape[2]} {str(x.dtype).removeprefix('torch.')}"
    sums.run(pick("response_norm norms", problem, x.device, choices()))
    applied.run(pick("response_norm", problem, x.device, apply_choices(x.shape[2])))
    return y


def response_norm(x: Tensor, gamma: Tensor, beta: Tensor, *, kernels: Kernels = REFERENCE) -> Tensor:
    """The global response norm of every row; see the module's docstring."""
    if "response_norm" not in kernels.triton:
        return response_norm_reference(x, gamma, beta)
    forward_only(x, gamma, beta)
    return _response_norm(x, gamma, beta)


def specimens(architecture: str) -> Iterator[Specimen]:
    """Every way the kernels are compiled for amused-256."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x, gamma = (torch.empty(*shape, 3072, dtype=dtype, device="meta") for shape in ((2, 256), ()))
        norms = torch.empty(2, 3072, device="meta")
        sums, applied = _calls(x, gamma, gamma, norms, _output(x))
        name = str(dtype).removeprefix("torch.")
        yield Specimen(f"response norm: norms, {name}", sums, choices(), matrix=False)
        yield Specimen(f"response norm, {name}", applied, apply_choices(3072), matrix=False)
