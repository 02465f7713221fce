"""The Triton kernels of attention, bottleneck and norms against their definitions in fp64, and rows to the bit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from comparator import DTYPES, TRITON, assert_close
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interpreter import DEVICE
from test_triton_linear import LENGTHS, low_rank, random, rows
from torch import Tensor

from stylemuse.kernels import adapted_attention
from stylemuse.kernels.attention import attention
from stylemuse.kernels.bottleneck import bottleneck
from stylemuse.kernels.depthwise import depthwise_norm
from stylemuse.kernels.inputs import norm
from stylemuse.kernels.norm import Kind, Norm
from stylemuse.kernels.projection import Projection
from stylemuse.kernels.resample import double, halve
from stylemuse.kernels.response_norm import response_norm
from stylemuse.kernels.rows import Bottleneck

pytestmark = pytest.mark.usefixtures("nan_filled")

formats = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def neck(width: int, *, shared: bool = False, dtype: torch.dtype = torch.float32) -> Bottleneck:
    """Random bottlenecks of 20, 1, 0 and 4 lanes; lanes that must not be read hold NaN."""
    widths = (20, 1, 0, 4)
    down, up = random(4, width, 20, seed=1, dtype=dtype) * width**-0.5, random(4, 20, width, seed=2, dtype=dtype)
    down_shift = random(4, 20, seed=3, dtype=dtype) * width**-0.5
    for slot, lanes in enumerate(widths):
        down[slot, :, lanes:], up[slot, lanes:], down_shift[slot, lanes:] = torch.nan, torch.nan, torch.nan
    shifts = (down_shift, random(4, width, seed=4, dtype=dtype)) if shared else (None, None)
    return Bottleneck(down, up, torch.tensor(widths, device=DEVICE), *shifts)


def wide(adapter: Bottleneck) -> Bottleneck:
    shifts = (None if side is None else side.double() for side in (adapter.down_shift, adapter.up_shift))
    return Bottleneck(adapter.down.double(), adapter.up.double(), adapter.widths, *shifts)


def assert_rows_are_alone(operation: Callable[[slice], Tensor], rows: int) -> None:
    """Every row computed alone has the bits it has among all of them."""
    together = operation(slice(None))
    for row in range(rows):
        assert torch.equal(operation(slice(row, row + 1))[0], together[row])


@formats
@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_bottleneck(tokens: int, shared: bool, dtype: torch.dtype) -> None:
    width, slots = 70, rows(0, -1, 3, 2) if tokens < 100 else rows(1, -1)
    y, adapter = random(len(slots.slots), tokens, width, dtype=dtype), neck(width, shared=shared, dtype=dtype)
    out = bottleneck(y, adapter, slots, kernels=TRITON)
    untouched = [row for row, slot in enumerate(slots.slots.tolist()) if slot in (-1, 2)]
    assert torch.equal(out[untouched], y[untouched])
    assert_close(out, bottleneck(y.double(), wide(adapter), slots), depth=width, roundings=2)


def test_bottleneck_of_views_and_of_rows_alone() -> None:
    y, adapter, slots = random(70, 4, 9).permute(1, 2, 0), neck(70, shared=True), (0, -1, 3, 1)
    own = rows(*slots, scales=[0.5] * 4)
    out = bottleneck(y, adapter, own, kernels=TRITON)
    assert_close(out, bottleneck(y.double(), wide(adapter), own), depth=70, roundings=2)

    def alone(part: slice) -> Tensor:
        return bottleneck(y[part], adapter, rows(*slots[part], scales=[0.5] * len(slots[part])), kernels=TRITON)

    assert_rows_are_alone(alone, 4)
    assert bottleneck(y, kernels=TRITON) is y


@formats
@pytest.mark.parametrize("size", [8, 64, 72, 128])
def test_attention(size: int, dtype: torch.dtype) -> None:
    """Among tokens that lie fused, and to cached keys."""
    q, k, v = random(2, 77, 3, 2, size, dtype=dtype).permute(2, 0, 3, 1, 4).unbind(0)
    cached = random(2, 2, 2, 7, size, seed=1, dtype=dtype)
    for keys, values in ((k, v), cached.unbind(1)):
        y = attention(q, keys, values, kernels=TRITON)
        # Rounded: the weights of the values, and the output.
        assert_close(y, attention(q.double(), keys.double(), values.double()), depth=size + keys.shape[2], roundings=3)


@formats
@pytest.mark.parametrize("tokens", LENGTHS)
def test_attention_of_any_length(tokens: int, dtype: torch.dtype) -> None:
    q, k, v = (random(1, 1, length, 16, seed=length, dtype=dtype) for length in (tokens, 334 - tokens, 334 - tokens))
    y = attention(q, k, v, kernels=TRITON)
    assert_close(y, attention(q.double(), k.double(), v.double()), depth=16 + k.shape[2], roundings=3)


@formats
def test_attention_skips_padding(dtype: torch.dtype) -> None:
    """Whatever the padding holds; a row without keys is zero."""
    lengths = torch.tensor([5, 0, 40, 33], device=DEVICE)
    q, keys = random(4, 2, 9, 24, dtype=dtype), random(4, 2, 2, 40, 24, seed=1, dtype=dtype)
    for row, length in enumerate(lengths.tolist()):
        keys[row, :, :, length:] = torch.nan
    k, v = keys.unbind(1)
    y = attention(q, k, v, lengths, kernels=TRITON)
    assert torch.equal(y[1], torch.zeros_like(y[1]))
    for row in (0, 2, 3):
        own = keys[row : row + 1, :, :, : lengths[row]].double().unbind(1)
        assert_close(y[row : row + 1], attention(q[row : row + 1].double(), *own), depth=64, roundings=3)
    reference = attention(q.double(), k.double(), v.double(), lengths)
    assert_close(y, reference, depth=64, roundings=3)
    assert_rows_are_alone(lambda part: attention(q[part], k[part], v[part], lengths[part], kernels=TRITON), 4)


def test_attention_survives_large_scores() -> None:
    q, k, v = random(1, 1, 5, 16) * 1e3, random(1, 1, 40, 16, seed=1) * 1e3, random(1, 1, 40, 16, seed=2)
    y = attention(q, k, v, kernels=TRITON)
    # Scores of 1e6 have an fp32 spacing of 1/16, and exp(1/16) - 1 is 0.06.
    assert (y - attention(q.double(), k.double(), v.double())).abs().max() < 0.2


@given(st.integers(1, 80), st.integers(1, 80), st.integers(1, 40), st.integers(1, 3))
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_attention_of_any_sizes(tokens: int, keys: int, size: int, heads: int) -> None:
    q, k, v = (random(1, heads, length, size, seed=seed) for seed, length in enumerate((tokens, keys, keys)))
    y = attention(q, k, v, kernels=TRITON)
    assert_close(y, attention(q.double(), k.double(), v.double()), depth=size + keys, roundings=3)


@formats
@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norm(kind: Kind, tokens: int, dtype: torch.dtype) -> None:
    x, weight = random(2, tokens, 70, dtype=dtype) + 3, random(70, seed=1, dtype=dtype)
    for modulation in (None, random(2, 70, 2, seed=2, dtype=dtype).transpose(1, 2)):
        y = norm(x, Norm(weight, 1e-6, kind, modulation), kernels=TRITON)
        scale_shift = None if modulation is None else modulation.double()
        assert_close(y, norm(x.double(), Norm(weight.double(), 1e-6, kind, scale_shift)), depth=70, roundings=1)


def test_norm_of_views_and_of_rows_alone() -> None:
    x, weight, modulation = random(70, 3, 9).permute(1, 2, 0), random(140, seed=1)[::2], random(3, 2, 70, seed=2)
    y = norm(x, Norm(weight, 1e-6, "layer", modulation), kernels=TRITON)
    assert_close(y, norm(x.double(), Norm(weight.double(), 1e-6, "layer", modulation.double())), depth=70)
    assert_rows_are_alone(lambda part: norm(x[part], Norm(weight, 1e-6, "rms", modulation[part]), kernels=TRITON), 3)


@formats
@pytest.mark.parametrize("tokens", LENGTHS)
def test_response_norm(tokens: int, dtype: torch.dtype) -> None:
    x, gamma, beta = (
        random(2, tokens, 70, dtype=dtype),
        random(70, seed=1, dtype=dtype),
        random(70, seed=2, dtype=dtype),
    )
    y = response_norm(x, gamma, beta, kernels=TRITON)
    assert_close(y, response_norm(x.double(), gamma.double(), beta.double()), depth=tokens + 70)
    assert_rows_are_alone(lambda part: response_norm(x[part], gamma, beta, kernels=TRITON), 2)


def test_response_norm_of_views() -> None:
    x, gamma, beta = random(70, 2, 9).permute(1, 2, 0), random(70, seed=1), random(70, seed=2)
    y = response_norm(x, gamma, beta, kernels=TRITON)
    assert_close(y, response_norm(x.double(), gamma.double(), beta.double()), depth=79)


@formats
@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (11, 7), (9, 37)], ids=str)
def test_depthwise_norm(grid: tuple[int, int], dtype: torch.dtype) -> None:
    x = random(2, grid[0] * grid[1], 70, dtype=dtype)
    kernel, weight = random(70, 1, 3, 3, seed=1, dtype=dtype), random(70, seed=2, dtype=dtype)
    y = depthwise_norm(x, grid, kernel, weight, 1e-6, kernels=TRITON)
    assert_close(y, depthwise_norm(x.double(), grid, kernel.double(), weight.double(), 1e-6), depth=79)
    assert_rows_are_alone(lambda part: depthwise_norm(x[part], grid, kernel, weight, 1e-6, kernels=TRITON), 2)


@formats
def test_resampling(dtype: torch.dtype) -> None:
    """Against torch's convolutions, on views too."""
    x, kernel = random(20, 2, 24, dtype=dtype).permute(1, 2, 0), random(20, 20, 2, 2, seed=1, dtype=dtype)
    for operation, grid in ((halve, (4, 6)), (double, (3, 8))):
        y = operation(x, grid, kernel, kernels=TRITON)
        assert_close(y, operation(x.double(), grid, kernel.double()), depth=80)
        assert_rows_are_alone(partial(_resampled, operation, x, grid, kernel), 2)


def _resampled(
    operation: Callable[..., Tensor], x: Tensor, grid: tuple[int, int], kernel: Tensor, part: slice
) -> Tensor:
    return operation(x[part], grid, kernel, kernels=TRITON)


@formats
@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
def test_adapted_attention(cross: bool, dtype: torch.dtype) -> None:
    """All stages together, with adapters on each, and a bottleneck; two heads of 12."""
    # Gentle ones: a softmax multiplies its scores' relative error by their size.
    width, slots, adapter = 24, rows(0, -1, 3, scales=[0.2, 1.0, -0.2]), neck(24, dtype=dtype)
    x, gain = random(3, 21, width, dtype=dtype), random(3, 2, width, seed=1, dtype=dtype)
    norm = Norm(random(width, seed=10, dtype=dtype), 1e-6, "layer" if cross else "rms", gain)
    exact_norm = Norm(norm.weight.double(), 1e-6, norm.kind, gain.double())
    lengths = torch.tensor([7, 3, 5], device=DEVICE) if cross else None

    def projection(parts: int, seed: int) -> Projection:
        weight = random(parts * width, width, seed=seed, dtype=dtype) * width**-0.5
        return Projection(
            weight, low_rank(width, width, parts, dtype=dtype), random(parts * width, seed=9, dtype=dtype)
        )

    def double(one: Projection) -> Projection:
        assert one.adapter is not None and one.bias is not None  # noqa: PT018
        pair = type(one.adapter)(one.adapter.down.double(), one.adapter.up.double(), one.adapter.ranks)
        return Projection(one.weight.double(), pair, one.bias.double())

    out = projection(1, 5)
    if cross:
        q, kv, text = projection(1, 6), projection(2, 7), random(3, 7, width, seed=8, dtype=dtype)
        keys = adapted_attention.keys_values(text, kv, 2, slots, kernels=TRITON)
        found = adapted_attention.cross_attention(x, norm, q, keys, out, slots, adapter, lengths, kernels=TRITON)
        keys = adapted_attention.keys_values(text.double(), double(kv), 2, slots)
        exact = adapted_attention.cross_attention(
            x.double(), exact_norm, double(q), keys, double(out), slots, wide(adapter), lengths
        )
    else:
        qkv = projection(3, 6)
        found = adapted_attention.self_attention(x, norm, qkv, out, 2, slots, adapter, kernels=TRITON)
        exact = adapted_attention.self_attention(
            x.double(), exact_norm, double(qkv), double(out), 2, slots, wide(adapter)
        )
    # The normed, q, k, v, the weights, the attended, the adapters' hidden states, the projected, the bottleneck's.
    assert_close(found, exact, depth=224, roundings=9)
