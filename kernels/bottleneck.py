"""StyleDrop's bottleneck, one per row: out[row] = y + scale gelu(y Wd[slot]) Wu[slot].

y (R, N, D) -> (R, N, D). Wd (S, D, H) and Wu (S, H, D) are the stacked adapters of all slots, without bias; gelu is
the exact form. Source: StyleDrop, arXiv 2306.00983; the gelu as in `libs/uvit_t2i_vq.py` of StyleDrop-PyTorch.

In the shared form all sites of an adapter have one Wd and one Wu, and each site its own shifts dd (H,) and du (D,):
Wd + 1 dd^T and Wu + 1 du^T take their places, of which only two rank-1 corrections are computed,

    y (Wd + 1 dd^T) = y Wd + (sum_D y) dd^T,      h (Wu + 1 du^T) = h Wu + (sum_H h) du^T

Not linear in y, so it cannot be merged into a weight. Rows of slot -1, and rows whose adapter has nothing at this
site, are bitwise y. The reference is differentiable in y, Wd, Wu and the shifts.

The kernel: a program passes over its tokens twice, for h, which needs all of y's channels and stays in registers, and
for the sum; the second pass finds y in the L2 cache. h and the correction, T (2 H + 2 D) numbers, are neither written
nor read. It is not an epilogue of the projection before it, whose tiles have only some channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from .device import gelu, multiply
from .dispatch import REFERENCE, Kernels, forward_only, jit, operator, tl
from .rows import Bottleneck, RowSlots
from .tuning import INTERPRETER, Call, Launch, Specimen, ceil_div, family, named_strides, pick, power_of_two, precision


def bottleneck_reference(y: Tensor, adapter: Bottleneck | None = None, rows: RowSlots | None = None) -> Tensor:
    """The definition in plain torch; returns y itself where no row has a bottleneck here."""
    if adapter is None or rows is None:
        return y
    assert rows.slots.shape[0] == y.shape[0], "one slot per row"
    out = y
    for width, run in rows.runs(adapter.widths):
        slots, scales = rows.slots[run], rows.scales[run]
        down, up = adapter.down[:, :, :width][slots], adapter.up[:, :width][slots]
        if adapter.down_shift is not None:
            down = down + adapter.down_shift[:, None, :width][slots]
        if adapter.up_shift is not None:
            up = up + adapter.up_shift[:, None][slots]
        hidden = F.gelu(torch.bmm(y[run], down))
        hidden = (hidden * scales[:, None, None]).to(y.dtype)
        if out is y:
            out = y.clone()
        out[run].baddbmm_(hidden, up)
    return out


def choices(architecture: str, dtype: torch.dtype) -> tuple[Launch, ...]:
    """The launches, the default first; few tokens a program, since a batch of one has 256 of them."""
    if architecture == INTERPRETER:
        return (_launch(64, 32, 4, 1),)
    if dtype == torch.float32:
        return (_launch(16, 32, 8, 2),)
    return _launch(16, 64, 4, 3), _launch(32, 64, 8, 3), _launch(64, 64, 8, 2)


def _launch(tokens: int, channels: int, warps: int, stages: int) -> Launch:
    return Launch({"BLOCK_TOKENS": tokens, "BLOCK_CHANNELS": channels}, warps, stages)


@jit
def _bottleneck_kernel(
    y: tl.tensor,
    down: tl.tensor,
    up: tl.tensor,
    widths: tl.tensor,
    down_shift: tl.tensor,
    up_shift: tl.tensor,
    slots: tl.tensor,
    scales: tl.tensor,
    out: tl.tensor,
    tokens: tl.tensor,
    y_row: tl.tensor,
    y_token: tl.tensor,
    y_channel: tl.tensor,
    down_slot: tl.tensor,
    down_channel: tl.tensor,
    down_lane: tl.tensor,
    up_slot: tl.tensor,
    up_lane: tl.tensor,
    up_channel: tl.tensor,
    down_shift_slot: tl.tensor,
    down_shift_lane: tl.tensor,
    up_shift_slot: tl.tensor,
    up_shift_channel: tl.tensor,
    out_row: tl.tensor,
    out_token: tl.tensor,
    CHANNELS: tl.constexpr,
    LANES: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
) -> None:
    """Some tokens of one row."""
    row_tiles = tl.cdiv(tokens, BLOCK_TOKENS)
    row = (tl.program_id(0) // row_tiles).to(tl.int64)
    token = (tl.program_id(0) % row_tiles) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    token_inside = (token < tokens)[:, None]
    places = tl.arange(0, BLOCK_CHANNELS)
    y_at = y + row * y_row + token[:, None] * y_token
    out_at = out + row * out_row + token[:, None] * out_token
    slot = tl.load(slots + row)
    width = tl.load(widths + slot, slot >= 0, 0)
    if width == 0:
        for first in range(0, CHANNELS, BLOCK_CHANNELS):
            channel = first + places
            inside = token_inside & (channel < CHANNELS)[None, :]
            tl.store(out_at + channel[None, :], tl.load(y_at + channel[None, :] * y_channel, inside, 0.0), inside)
    else:
        lane = tl.arange(0, LANES)
        lane_inside = lane < width
        hidden = tl.zeros((BLOCK_TOKENS, LANES), tl.float32)
        total = tl.zeros((BLOCK_TOKENS,), tl.float32)
        for first in range(0, CHANNELS, BLOCK_CHANNELS):
            channel = first + places
            channel_inside = channel < CHANNELS
            value = tl.load(y_at + channel[None, :] * y_channel, token_inside & channel_inside[None, :], 0.0)
            down_at = down + slot * down_slot + channel[:, None] * down_channel + lane[None, :] * down_lane
            down_tile = tl.load(down_at, channel_inside[:, None] & lane_inside[None, :], 0.0)
            hidden = multiply(value, down_tile, hidden, PRECISION)
            if down_shift is not None:
                total += tl.sum(value.to(tl.float32), 1)
        if down_shift is not None:
            lane_shift = tl.load(down_shift + slot * down_shift_slot + lane * down_shift_lane, lane_inside, 0.0)
            hidden += total[:, None] * lane_shift.to(tl.float32)[None, :]
        # gelu(0) is 0: lanes beyond the width stay zero.
        hidden = gelu(hidden) * tl.load(scales + row)
        narrow = hidden.to(up.dtype.element_ty)
        for first in range(0, CHANNELS, BLOCK_CHANNELS):
            channel = first + places
            channel_inside = channel < CHANNELS
            inside = token_inside & channel_inside[None, :]
            value = tl.load(y_at + channel[None, :] * y_channel, inside, 0.0).to(tl.float32)
            up_at = up + slot * up_slot + lane[:, None] * up_lane + channel[None, :] * up_channel
            up_tile = tl.load(up_at, lane_inside[:, None] & channel_inside[None, :], 0.0)
            value = multiply(narrow, up_tile, value, PRECISION)
            if up_shift is not None:
                shift_at = up_shift + slot * up_shift_slot + channel * up_shift_channel
                channel_shift = tl.load(shift_at, channel_inside, 0.0).to(tl.float32)
                value += tl.sum(hidden, 1)[:, None] * channel_shift[None, :]
            tl.store(out_at + channel[None, :], value.to(out.dtype.element_ty), inside)


def _call(y: Tensor, adapter: Bottleneck, rows: RowSlots, out: Tensor, architecture: str) -> Call:
    """The launch that fills out."""
    count, tokens, channels = y.shape
    down, up, down_shift, up_shift = adapter.down, adapter.up, adapter.down_shift, adapter.up_shift
    assert (down.shape[1], up.shape[2]) == (channels, channels), "a bottleneck of this width"
    assert all(side is None or side.dtype == y.dtype for side in (down, up, down_shift, up_shift)), "one number format"
    tensors = {
        "y": y, "down": down, "up": up, "widths": adapter.widths, "down_shift": down_shift, "up_shift": up_shift,
        "slots": rows.slots, "scales": rows.scales, "out": out,
    }  # fmt: skip
    strides = {
        **named_strides(y, "y_row", "y_token", "y_channel"),
        **named_strides(down, "down_slot", "down_channel", "down_lane"),
        **named_strides(up, "up_slot", "up_lane", "up_channel"),
        **named_strides(down_shift, "down_shift_slot", "down_shift_lane"),
        **named_strides(up_shift, "up_shift_slot", "up_shift_channel"),
        **named_strides(out, "out_row", "out_token"),
    }

    def grid(tiles: Mapping[str, int]) -> tuple[int, ...]:
        return (count * ceil_div(tokens, tiles["BLOCK_TOKENS"]),)

    constants = {"CHANNELS": channels, "LANES": power_of_two(down.shape[2]), "PRECISION": precision(architecture)}
    return Call(_bottleneck_kernel, {**tensors, "tokens": tokens, **strides}, constants, grid)


def _output(y: Tensor, *_: object) -> Tensor:
    """An empty result."""
    return y.new_empty(y.shape)


@operator(
    "bottleneck(Tensor y, Tensor down, Tensor up, Tensor widths, Tensor? down_shift, Tensor? up_shift, Tensor slots, "
    "Tensor scales) -> Tensor",
    fake=_output,
)
def _bottleneck(
    y: Tensor,
    down: Tensor,
    up: Tensor,
    widths: Tensor,
    down_shift: Tensor | None,
    up_shift: Tensor | None,
    slots: Tensor,
    scales: Tensor,
) -> Tensor:
    out, architecture = _output(y), family(y.device)
    problem = f"{y.shape[2]} {str(y.dtype).removeprefix('torch.')}"
    call = _call(y, Bottleneck(down, up, widths, down_shift, up_shift), RowSlots(slots, scales), out, architecture)
    call.run(pick("bottleneck", problem, y.device, choices(architecture, y.dtype)))
    return out


def bottleneck(
    y: Tensor, adapter: Bottleneck | None = None, rows: RowSlots | None = None, *, kernels: Kernels = REFERENCE
) -> Tensor:
    """y + scale gelu(y Wd) Wu with the bottleneck of each row's slot; shapes as in the module's docstring."""
    if "bottleneck" not in kernels.triton:
        return bottleneck_reference(y, adapter, rows)
    forward_only(y)
    if adapter is None or rows is None:
        return y
    assert rows.slots.shape[0] == y.shape[0], "one slot per row"
    sides = (adapter.down, adapter.up, adapter.widths, adapter.down_shift, adapter.up_shift)
    return _bottleneck(y, *sides, rows.slots, rows.scales)


def specimens(architecture: str) -> Iterator[Specimen]:
    """Every way the kernel is compiled for amused-256, and for a bank of rank 64."""
    width, lanes = 1024, 64
    counts = torch.empty(2, dtype=torch.int64, device="meta")
    rows = RowSlots(counts, torch.empty(2, device="meta"))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        y = torch.empty(2, 256, width, dtype=dtype, device="meta")
        sides = y.new_empty(2, width, lanes), y.new_empty(2, lanes, width), counts
        shared = Bottleneck(*sides, y.new_empty(2, lanes), y.new_empty(2, width))
        for what, adapter in (("bottleneck", Bottleneck(*sides)), ("bottleneck, shared form", shared)):
            name = f"{what}, {str(dtype).removeprefix('torch.')}"
            yield Specimen(
                name, _call(y, adapter, rows, _output(y), architecture), choices(architecture, dtype), matrix=True
            )
