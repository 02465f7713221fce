"""kernels/linear.py and kernels/bottleneck.py: the definitions, row isolation, base rows to the bit, and gradients."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stylemuse.kernels.bottleneck import bottleneck
from stylemuse.kernels.linear import linear
from stylemuse.kernels.rows import Bottleneck, LowRank, RowAdapters, RowSlots

SLOTS, PARTS, INPUTS, OUTPUTS, RANK, TOKENS = 5, 3, 7, 11, 6, 9


def rows(slots: Sequence[int], scales: Sequence[float] | None = None) -> RowSlots:
    return RowSlots(torch.tensor(slots), torch.tensor(scales or [1.0] * len(slots)))


def low_rank(ranks: Sequence[int] = (6, 1, 3, 0, 5)) -> LowRank:
    """Random pairs; lanes that must not be read hold NaN."""
    down, up = torch.randn(SLOTS, PARTS, INPUTS, RANK), torch.randn(SLOTS, PARTS, RANK, OUTPUTS)
    for slot, rank in enumerate(ranks):
        down[slot, :, :, rank:], up[slot, :, rank:] = torch.nan, torch.nan
    return LowRank(down, up, torch.tensor(ranks))


def expected_linear(x: Tensor, weight: Tensor, adapter: LowRank, given: RowSlots) -> Tensor:
    """Row by row, part by part, in fp64."""
    y = F.linear(x, weight).double()
    for row, (slot, scale) in enumerate(zip(given.slots.tolist(), given.scales.tolist(), strict=True)):
        rank = int(adapter.ranks[slot]) if slot >= 0 else 0
        for part in range(PARTS):
            down, up = adapter.down[slot, part, :, :rank].double(), adapter.up[slot, part, :rank].double()
            y[row, :, part * OUTPUTS : (part + 1) * OUTPUTS] += scale * (x[row].double() @ down) @ up
    return y


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@given(st.lists(st.tuples(st.integers(-1, SLOTS - 1), st.floats(-3, 3, width=32)), min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_linear_is_its_equation(mixed: list[tuple[int, float]]) -> None:
    given_rows = rows([slot for slot, _ in mixed], [scale for _, scale in mixed])
    x, weight, adapter = torch.randn(len(mixed), TOKENS, INPUTS), torch.randn(PARTS * OUTPUTS, INPUTS), low_rank()
    y = linear(x, weight, None, adapter, given_rows)
    torch.testing.assert_close(y.double(), expected_linear(x, weight, adapter, given_rows), rtol=1e-5, atol=1e-4)
    plain = F.linear(x, weight)
    untouched = [row for row, (slot, _) in enumerate(mixed) if slot in (-1, 3)]
    assert torch.equal(y[untouched], plain[untouched])


def test_linear_with_bias_and_without_adapters() -> None:
    x, weight, bias = torch.randn(2, TOKENS, INPUTS), torch.randn(PARTS * OUTPUTS, INPUTS), torch.randn(PARTS * OUTPUTS)
    plain = F.linear(x, weight, bias)
    assert torch.equal(linear(x, weight, bias), plain)
    assert torch.equal(linear(x, weight, bias, low_rank(), rows([-1, -1])), plain)
    assert torch.equal(linear(x, weight, bias, None, rows([0, 1])), plain)
    with_bias, without = (linear(x, weight, b, low_rank(), rows([0, 1])) for b in (bias, None))
    assert with_bias.shape == without.shape


def test_base_rows_keep_negative_zero() -> None:
    x, weight = -torch.zeros(2, 1, INPUTS), torch.ones(PARTS * OUTPUTS, INPUTS)
    plain = F.linear(x, weight)
    y = linear(x, weight, None, low_rank(), rows([0, -1]))
    assert torch.equal(torch.signbit(y[1]), torch.signbit(plain[1]))


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    x, weight, adapter = torch.randn(4, TOKENS, INPUTS), torch.randn(PARTS * OUTPUTS, INPUTS), low_rank()
    together = linear(x, weight, None, adapter, rows([1, 0, -1, 2]))
    for row, slot in enumerate([1, 0, -1, 2]):
        alone = linear(x[row : row + 1], weight, None, adapter, rows([slot]))
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-6, atol=1e-6)


@given(st.lists(st.integers(-1, 3), max_size=12))
@settings(deadline=None)
def test_runs_hold_every_adapted_row_once(slots: list[int]) -> None:
    widths = [4, 0, 4, 2]
    numbers = list(range(len(slots)))
    found = [(row, width) for width, run in rows(slots).runs(torch.tensor(widths)) for row in numbers[run]]
    assert found == [(row, widths[slot]) for row, slot in enumerate(slots) if slot >= 0 and widths[slot]]


def test_runs_are_neighbours_a_power_of_two_at_a_time() -> None:
    widths = torch.tensor([4, 2, 4])
    assert rows([-1, -1, 0, 2, 1]).runs(widths) == ((4, slice(2, 4)), (2, slice(4, 5)))
    assert rows([0, 2, 0, -1, 2]).runs(widths) == ((4, slice(0, 2)), (4, slice(2, 3)), (4, slice(4, 5)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_the_same_to_the_bit_among_many(dtype: torch.dtype) -> None:
    """At a size where matrix products are blocked and threaded."""
    inputs, outputs, rank = 192, 160, 16
    down, up = torch.randn(SLOTS, PARTS, inputs, rank), torch.randn(SLOTS, PARTS, rank, outputs)
    adapter = LowRank(down.to(dtype), up.to(dtype), torch.tensor([16, 8, 16, 0, 5]))
    x, weight = torch.randn(7, 77, inputs).to(dtype), torch.randn(PARTS * outputs, inputs).to(dtype)
    slots = [0, -1, 0, 4, 0, 1, 2]
    together = linear(x, weight, None, adapter, rows(slots)) - F.linear(x, weight)
    for row, slot in enumerate(slots):
        one = x[row : row + 1]
        assert torch.equal(
            together[row : row + 1], linear(one, weight, None, adapter, rows([slot])) - F.linear(one, weight)
        )


def test_linear_gradients() -> None:
    given_rows, ranks = rows([1, -1, 1, 4], [0.5, 1.0, 2.0, -1.0]), torch.tensor([6, 2, 3, 0, 5])
    x, weight = torch.randn(4, 2, INPUTS).double(), torch.randn(PARTS * OUTPUTS, INPUTS).double()
    down, up = torch.randn(SLOTS, PARTS, INPUTS, RANK).double(), torch.randn(SLOTS, PARTS, RANK, OUTPUTS).double()
    inputs = tuple(tensor.requires_grad_() for tensor in (x, weight, down, up))

    def run(x: Tensor, weight: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return linear(x, weight, None, LowRank(down, up, ranks), given_rows)

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_linear_keeps_the_type(dtype: torch.dtype) -> None:
    adapter = low_rank()
    half = LowRank(adapter.down.to(dtype), adapter.up.to(dtype), adapter.ranks)
    x, weight = torch.randn(3, TOKENS, INPUTS), torch.randn(PARTS * OUTPUTS, INPUTS)
    y = linear(x.to(dtype), weight.to(dtype), None, half, rows([0, -1, 2], [0.3, 1.0, 1.7]))
    assert y.dtype == dtype
    exact = expected_linear(x, weight, adapter, rows([0, -1, 2], [0.3, 1.0, 1.7]))
    assert (y.double() - exact).abs().max() < 8 * torch.finfo(dtype).eps * exact.abs().max()


@given(st.lists(st.tuples(st.integers(-1, 3), st.floats(-3, 3, width=32)), min_size=1, max_size=6))
@settings(max_examples=40, deadline=None)
def test_bottleneck_is_its_equation(mixed: list[tuple[int, float]]) -> None:
    widths, width = torch.tensor([4, 1, 0, 3]), 10
    adapter = Bottleneck(torch.randn(4, width, 4), torch.randn(4, 4, width), widths)
    for slot, lanes in enumerate(widths.tolist()):
        adapter.down[slot, :, lanes:], adapter.up[slot, lanes:] = torch.nan, torch.nan
    y = torch.randn(len(mixed), TOKENS, width)
    before = y.clone()
    out = bottleneck(y, adapter, rows([slot for slot, _ in mixed], [scale for _, scale in mixed]))
    assert torch.equal(y, before)
    for row, (slot, scale) in enumerate(mixed):
        if slot in (-1, 2):
            assert torch.equal(out[row], y[row])
            continue
        lanes = int(widths[slot])
        hidden = F.gelu(y[row].double() @ adapter.down[slot, :, :lanes].double())
        exact = y[row].double() + scale * hidden @ adapter.up[slot, :lanes].double()
        torch.testing.assert_close(out[row].double(), exact, rtol=1e-5, atol=1e-4)


def test_bottleneck_gradients_and_identity() -> None:
    widths, given_rows = torch.tensor([3, 2]), rows([1, -1, 0], [1.0, 1.0, 0.5])
    inputs = tuple(torch.randn(*shape).double().requires_grad_() for shape in ((3, 2, 5), (2, 5, 3), (2, 3, 5)))

    def run(y: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return bottleneck(y, Bottleneck(down, up, widths), given_rows)

    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    y = torch.randn(2, 3, 5)
    assert bottleneck(y) is y
    zero = Bottleneck(torch.randn(2, 5, 3), torch.zeros(2, 3, 5), widths)
    assert torch.equal(bottleneck(y, zero, rows([0, 1])), y)


def test_row_adapters_tell_the_kinds_apart() -> None:
    pair, neck = low_rank(), Bottleneck(torch.zeros(1, 2, 1), torch.zeros(1, 1, 2), torch.zeros(1, dtype=torch.int64))
    adapters = RowAdapters(rows([0]), {"a": pair, "b": neck})
    assert adapters.low_rank("a") is pair
    assert adapters.bottleneck("b") is neck
    assert adapters.low_rank("c") is None
    with pytest.raises(AssertionError, match="bottleneck site"):
        adapters.low_rank("b")
