"""The Triton kernel of kernels/linear.py against its definition in fp64, and its laws to the bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from comparator import DTYPES, TRITON, assert_close
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interpreter import DEVICE
from torch import Tensor

from stylemuse.kernels.linear import linear
from stylemuse.kernels.norm import Kind, Norm
from stylemuse.kernels.rows import LowRank, RowSlots

pytestmark = pytest.mark.usefixtures("nan_filled")
RANKS = (24, 1, 0, 16)
LENGTHS = (1, 7, 77, 256 + 77)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def low_rank(
    inputs: int, outputs: int, parts: int = 1, *, ranks: Sequence[int] = RANKS, dtype: torch.dtype = torch.float32
) -> LowRank:
    """Random pairs; lanes that must not be read hold NaN."""
    lanes = max(ranks)
    down = random(len(ranks), parts, inputs, lanes, seed=1, dtype=dtype) * inputs**-0.5
    up = random(len(ranks), parts, lanes, outputs, seed=2, dtype=dtype)
    for slot, rank in enumerate(ranks):
        down[slot, :, :, rank:], up[slot, :, rank:] = torch.nan, torch.nan
    return LowRank(down, up, torch.tensor(ranks, device=DEVICE))


def rows(*slots: int, scales: Sequence[float] | None = None) -> RowSlots:
    given_scales = scales or [1.0 - 0.4 * index for index in range(len(slots))]
    return RowSlots(torch.tensor(slots, device=DEVICE), torch.tensor(given_scales, device=DEVICE))


def exact(x: Tensor, weight: Tensor, bias: Tensor | None, adapter: LowRank | None, *rest: Any, **after: Any) -> Tensor:
    """The definition on the same numbers in fp64."""
    wide = {name: value.double() if isinstance(value, Tensor) else value for name, value in after.items()}
    pair = None if adapter is None else LowRank(adapter.down.double(), adapter.up.double(), adapter.ranks)
    return linear(x.double(), weight.double(), None if bias is None else bias.double(), pair, *rest, **wide)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", LENGTHS)
def test_fused_projections_with_adapters(tokens: int, dtype: torch.dtype) -> None:
    """Ranks beyond and up to the narrow loop, none, and base rows; no size is a multiple of a tile."""
    inputs, outputs, slots = 45, 70, rows(0, -1, 3, 2) if tokens < 100 else rows(3, -1)
    x, weight = random(len(slots.slots), tokens, inputs, dtype=dtype), random(3 * outputs, inputs, seed=3, dtype=dtype)
    adapter = low_rank(inputs, outputs, 3, dtype=dtype)
    y = linear(x, weight, None, adapter, slots, kernels=TRITON)
    assert y.dtype == dtype
    assert_close(y, exact(x, weight, None, adapter, slots), depth=inputs, roundings=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["none", "gelu", "geglu"])
def test_all_that_follows(activation: str, dtype: torch.dtype) -> None:
    inputs, outputs, slots = 64, 66, rows(0, -1, 3)
    both = outputs * (2 if activation == "geglu" else 1)
    x, weight, bias = random(3, 7, inputs, dtype=dtype), random(both, inputs, seed=3, dtype=dtype), random(both, seed=4)
    after = {
        "activation": activation,
        "residual": random(3, 7, outputs, seed=5, dtype=dtype),
        "modulation": random(3, 2, outputs, seed=6, dtype=dtype),
    }
    adapter, bias = low_rank(inputs, both, dtype=dtype), bias.to(dtype)
    y = linear(x, weight, bias, adapter, slots, kernels=TRITON, **after)
    assert_close(y, exact(x, weight, bias, adapter, slots, **after), depth=inputs, roundings=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_a_norm_that_comes_along(kind: Kind, dtype: torch.dtype) -> None:
    """Of numbers far from 0, modulated or not, on sizes of no tile."""
    inputs, outputs, slots = 45, 70, rows(0, -1, 3)
    x = (random(inputs, 3, 77, dtype=dtype) + 3).permute(1, 2, 0)
    weight, adapter = random(outputs, inputs, seed=3, dtype=dtype), low_rank(inputs, outputs, dtype=dtype)
    for modulation in (None, random(3, inputs, 2, seed=4, dtype=dtype).transpose(1, 2)):
        norm = Norm(random(2 * inputs, seed=5, dtype=dtype)[::2], 1e-6, kind, modulation)
        gain = None if modulation is None else modulation.double()
        expected = exact(x, weight, None, adapter, slots, norm=Norm(norm.weight.double(), 1e-6, kind, gain))
        y = linear(x, weight, None, adapter, slots, norm=norm, kernels=TRITON)
        assert_close(y, expected, depth=2 * inputs, roundings=3)
    alone = linear(x[2:], weight, None, adapter, rows(3, scales=[slots.scales[2]]), norm=_row(norm, 2), kernels=TRITON)
    assert torch.equal(alone[0], y[2])


def _row(norm: Norm, row: int) -> Norm:
    assert norm.modulation is not None
    return replace(norm, modulation=norm.modulation[row : row + 1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views_are_read_as_they_lie(dtype: torch.dtype) -> None:
    inputs, outputs = 33, 40
    x = random(inputs, 2, 9, dtype=dtype).permute(1, 2, 0)
    weight = random(inputs, 2 * outputs, seed=3, dtype=dtype).T[::2]
    residual = random(9, 2, 2 * outputs, seed=4, dtype=dtype).transpose(0, 1)[:, :, ::2]
    modulation = random(2, outputs, 2, seed=5, dtype=dtype).transpose(1, 2)
    pair = low_rank(inputs, outputs, dtype=dtype)
    adapter = LowRank(
        pair.down.transpose(2, 3).contiguous().transpose(2, 3), pair.up.transpose(2, 3).contiguous().mT, pair.ranks
    )
    after = {"residual": residual, "modulation": modulation}
    y = linear(x, weight, None, adapter, rows(0, 1), kernels=TRITON, **after)
    assert_close(y, exact(x, weight, None, adapter, rows(0, 1), **after), depth=inputs, roundings=2)


@given(
    st.lists(st.tuples(st.integers(-1, 3), st.floats(-3, 3, width=32)), min_size=1, max_size=4),
    st.tuples(st.integers(1, 70), st.integers(1, 70), st.integers(1, 70)),
    st.lists(st.integers(0, 64), min_size=4, max_size=4).filter(any),
    st.integers(1, 2),
)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_slots_ranks_and_sizes(
    mixed: list[tuple[int, float]], sizes: tuple[int, int, int], ranks: list[int], parts: int
) -> None:
    tokens, inputs, outputs = sizes
    slots = rows(*(slot for slot, _ in mixed), scales=[scale for _, scale in mixed])
    x, weight = random(len(mixed), tokens, inputs), random(parts * outputs, inputs, seed=3)
    adapter = low_rank(inputs, outputs, parts, ranks=ranks)
    y = linear(x, weight, None, adapter, slots, kernels=TRITON)
    expected = exact(x, weight, None, adapter, slots)
    # The roundings of a delta much larger than the output stay in it.
    assert_close(y, expected, depth=inputs + max(ranks), roundings=8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_is_the_same_to_the_bit_in_any_batch(dtype: torch.dtype) -> None:
    inputs, outputs, slots = 45, 70, (0, -1, 3, 2, 1)
    x, weight = random(5, 21, inputs, dtype=dtype), random(3 * outputs, inputs, seed=3, dtype=dtype)
    adapter = low_rank(inputs, outputs, 3, dtype=dtype)
    together = linear(x, weight, None, adapter, rows(*slots), kernels=TRITON)
    scales = rows(*slots).scales.tolist()
    for row, slot in enumerate(slots):
        own = rows(slot, scales=scales[row : row + 1])
        alone = linear(x[row : row + 1], weight, None, adapter, own, kernels=TRITON)
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_base_rows_are_what_a_kernel_without_adapters_gives(dtype: torch.dtype) -> None:
    inputs, outputs = 45, 70
    x, weight = random(4, 21, inputs, dtype=dtype), random(3 * outputs, inputs, seed=3, dtype=dtype)
    plain = linear(x, weight, kernels=TRITON)
    mixed = linear(x, weight, None, low_rank(inputs, outputs, 3, dtype=dtype), rows(0, -1, 2, 1), kernels=TRITON)
    assert torch.equal(mixed[[1, 2]], plain[[1, 2]])
    assert not torch.equal(mixed[0], plain[0])


def test_gradients_are_refused() -> None:
    weight = random(4, 4).requires_grad_()
    with pytest.raises(AssertionError, match="Triton kernels have no gradient"):
        linear(random(1, 2, 4), weight, kernels=TRITON)
    with torch.no_grad():
        assert linear(random(1, 2, 4), weight, kernels=TRITON).shape == (1, 2, 4)
