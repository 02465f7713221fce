"""kernels/quantization.py and kernels/quantized_linear.py: the definition, and the Triton kernels against it.

Quantized numbers and their scales are compared to the bit. What a product makes of them is compared with fp64 of the
same 8-bit numbers, so that its tolerance (`comparator`) has nothing to do with what quantization loses; that has a
bound of its own, from the formats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from comparator import DTYPES, TRITON, assert_close
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interpreter import DEVICE
from test_triton_linear import low_rank, random, rows
from torch import Tensor

from stylemuse.kernels import linear as module
from stylemuse.kernels import quantized_linear as quantized_products
from stylemuse.kernels.dispatch import REFERENCE
from stylemuse.kernels.inputs import Inputs, inputs
from stylemuse.kernels.inputs import norm as normed
from stylemuse.kernels.linear import linear
from stylemuse.kernels.norm import Kind, Norm
from stylemuse.kernels.quantization import FORMATS, LARGEST, Quantized, obstacle, quantize_reference
from stylemuse.kernels.quantized_linear import product_reference, quantized_linear
from stylemuse.kernels.rows import LowRank, RowSlots

pytestmark = pytest.mark.usefixtures("nan_filled")
NUMBERS = [number for name, number in FORMATS.items() if obstacle(name, DEVICE) is None]
LENGTHS = (1, 7, 77, 256 + 77)


def weights(outputs: int, inputs: int, number: torch.dtype) -> Quantized:
    return quantize_reference(random(outputs, inputs, seed=3), number)


def quantize(
    x: Tensor,
    number: torch.dtype,
    adapter: LowRank | None = None,
    given_rows: RowSlots | None = None,
    norm: Norm | None = None,
) -> Inputs:
    """The first launch alone."""
    return inputs(x.contiguous(), norm, adapter, given_rows, number)


def numbers(made: Inputs) -> Quantized:
    """Values and their scales."""
    assert made.scales is not None
    return Quantized(made.values, made.scales)


def exact(
    x: Tensor, weight: Quantized, bias: Tensor | None, adapter: LowRank | None, *rest: Any, **after: Any
) -> Tensor:
    """In fp64, from the 8-bit numbers that the definition makes of x."""
    wide = {name: value.double() if isinstance(value, Tensor) else value for name, value in after.items()}
    small = quantize_reference(x, weight.values.dtype)
    product = (small.values.double() @ weight.values.double().T) * small.scales.double()[..., None]
    product = product * weight.scales.double()
    product = product if bias is None else product + bias.double()
    pair = None if adapter is None else LowRank(adapter.down.double(), adapter.up.double(), adapter.ranks)
    # The pair and what follows, around a product that is there already.
    zero = torch.zeros(product.shape[-1], x.shape[-1], device=x.device, dtype=torch.float64)
    delta = linear(x.double(), zero, None, pair, *rest)
    eye = torch.eye(product.shape[-1], device=x.device, dtype=torch.float64)
    return linear(product + delta, eye, **wide)


@pytest.mark.parametrize("number", FORMATS.values(), ids=FORMATS)
def test_the_definition_is_the_nearest_number(number: torch.dtype) -> None:
    """Vectors of any size, of zeros, and with ties; none is further away than half a step of the format."""
    x = torch.cat([random(5, 33) * 10.0 ** torch.arange(-20, 30, 10)[:, None], torch.zeros(1, 33)]).to(DEVICE)
    found = quantize_reference(x, number)
    assert found.scales.dtype == torch.float32
    assert found.values.dtype == number
    assert torch.equal(found.values[-1].float(), torch.zeros(33, device=DEVICE))
    assert torch.equal(found.values[:-1].float().abs().amax(1), torch.full((5,), LARGEST[number], device=DEVICE))
    scaled = x.double() / found.scales.double()[:, None]
    if number == torch.int8:
        step = torch.ones_like(scaled)
    else:
        step = 2.0 ** (scaled.abs().clamp(min=2.0**-6).log2().floor() - 3)
    assert bool(((found.values.double() - scaled).abs() <= step * 0.5001).all())
    ties = torch.tensor([[127.0, 0.5, 1.5, -2.5, -126.5]], device=DEVICE)
    if number == torch.int8:
        assert quantize_reference(ties, number).values.tolist() == [[127, 0, 2, -2, -126]]


def test_int8_products_are_exact_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest sums there are, on CPUs with and without VNNI."""
    x = torch.full((2, 3, 2817), 127, dtype=torch.int8, device=DEVICE)
    x[1] = torch.randint(-127, 128, (3, 2817), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    weight = torch.full((5, 2817), -127, dtype=torch.int8, device=DEVICE)
    expected = x.double() @ weight.double().T
    for exact_product in {quantized_products.int_mm_is_exact(), False}:
        monkeypatch.setattr(quantized_products, "int_mm_is_exact", lambda answer=exact_product: answer)
        found = product_reference(x, weight)
        assert found.dtype == torch.int32
        assert torch.equal(found.double(), expected)


def test_the_product_is_asked_whether_it_saturates(monkeypatch: pytest.MonkeyPatch) -> None:
    def saturating(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        pairs = ((a.int() + 128)[:, :, None] * b.int()[None]).unflatten(1, (-1, 2)).sum(2)
        return pairs.clamp(-(2**15), 2**15 - 1).sum(1) - 128 * b.int().sum(0)

    quantized_products.int_mm_is_exact.cache_clear()
    monkeypatch.setattr(torch, "_int_mm", saturating)
    assert not quantized_products.int_mm_is_exact()
    monkeypatch.undo()
    quantized_products.int_mm_is_exact.cache_clear()


@pytest.mark.parametrize("number", FORMATS.values(), ids=FORMATS)
def test_what_quantization_loses(number: torch.dtype) -> None:
    """About what independent roundings of both operands lose: a few per cent at most, and less in int8."""
    x, weight, slots = random(3, 77, 256), random(96, 256, seed=3), rows(0, -1, 2)
    adapter = low_rank(256, 96)
    expected = linear(x, weight, None, adapter, slots)
    found = quantized_linear(x, quantize_reference(weight, number), None, adapter, slots)
    lost = float((found - expected).norm() / expected.norm())
    assert 1e-3 < lost < (0.02 if number == torch.int8 else 0.05)


def test_the_definition_keeps_the_laws() -> None:
    """Base rows to the bit, rows alone to the bit, bias and all that follows."""
    inputs, outputs, slots = 45, 70, (0, -1, 3, 2, 1)
    x, weight, bias = random(5, 21, inputs), weights(3 * outputs, inputs, torch.int8), random(3 * outputs, seed=4)
    adapter, given_rows = low_rank(inputs, outputs, 3), rows(*slots)
    together = quantized_linear(x, weight, bias, adapter, given_rows)
    plain = quantized_linear(x, weight, bias)
    assert torch.equal(together[[1, 3]], plain[[1, 3]])
    torch.testing.assert_close(plain.double(), exact(x, weight, bias, None), rtol=1e-6, atol=1e-6)
    for row, slot in enumerate(slots):
        own = rows(slot, scales=given_rows.scales[row : row + 1].tolist())
        alone = quantized_linear(x[row : row + 1], weight, bias, adapter, own)
        assert torch.equal(alone[0], together[row]) if slot == -1 else torch.allclose(alone[0], together[row])
    both = quantized_linear(x, weights(64, inputs, torch.int8), activation="geglu", residual=random(5, 21, 32))
    value, gate = quantized_linear(x, weights(64, inputs, torch.int8)).chunk(2, dim=-1)
    assert torch.equal(both, random(5, 21, 32) + value * F.gelu(gate))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("number", NUMBERS, ids=str)
def test_activations_are_the_definitions_to_the_bit(number: torch.dtype, dtype: torch.dtype) -> None:
    """Sizes of no tile, views, zeros, tiny and large numbers."""
    x = random(45, 3, 77, dtype=dtype).permute(1, 2, 0)
    x[0, 3], x[1, 4], x[2, :, 1:] = 0.0, x[1, 4] * 1e-4, x[2, :, 1:] * 1e-3
    found, expected = numbers(quantize(x, number)), quantize_reference(x, number)
    assert torch.equal(found.values.view(torch.uint8), expected.values.view(torch.uint8))
    assert torch.equal(found.scales, expected.scales)
    every = torch.arange(-448, 449, 0.25, device=DEVICE).view(1, 1, -1).to(dtype)
    assert torch.equal(numbers(quantize(every, number)).wide(), quantize_reference(every, number).wide())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_lowered_is_of_the_unquantized(dtype: torch.dtype) -> None:
    inputs, slots = 45, rows(0, -1, 3, 2)
    x, adapter = random(4, 21, inputs, dtype=dtype), low_rank(inputs, 70, 2, dtype=dtype)
    hidden = quantize(x, torch.int8, adapter, slots).hidden
    assert hidden is not None
    for row, slot in enumerate(slots.slots.tolist()):
        rank = 0 if slot < 0 else int(adapter.ranks[slot])
        expected = x[row].double() @ adapter.down[slot, :, :, :rank].double() * float(slots.scales[row])
        if rank:
            assert_close(hidden[row, :, :, :rank].transpose(0, 1), expected, depth=inputs)
        else:
            assert bool(hidden[row].isnan().all()), "nothing is computed for it"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("number", NUMBERS, ids=str)
@pytest.mark.parametrize("tokens", LENGTHS)
def test_fused_projections_with_adapters(tokens: int, number: torch.dtype, dtype: torch.dtype) -> None:
    inputs, outputs, slots = 45, 70, rows(0, -1, 3, 2) if tokens < 100 else rows(3, -1)
    x, weight = random(len(slots.slots), tokens, inputs, dtype=dtype), weights(3 * outputs, inputs, number)
    adapter = low_rank(inputs, outputs, 3, dtype=dtype)
    y = quantized_linear(x, weight, None, adapter, slots, kernels=TRITON)
    assert y.dtype == dtype
    assert_close(y, exact(x, weight, None, adapter, slots), depth=inputs, roundings=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("number", NUMBERS, ids=str)
@pytest.mark.parametrize("activation", ["none", "gelu", "geglu"])
def test_all_that_follows(activation: str, number: torch.dtype, dtype: torch.dtype) -> None:
    inputs, outputs, slots = 64, 66, rows(0, -1, 3)
    both = outputs * (2 if activation == "geglu" else 1)
    x, weight, bias = random(3, 7, inputs, dtype=dtype), weights(both, inputs, number), random(both, seed=4)
    after: dict[str, Any] = {
        "activation": activation,
        "residual": random(9, 3, 2 * outputs, seed=5, dtype=dtype)[:7].transpose(0, 1)[:, :, ::2],
        "modulation": random(3, outputs, 2, seed=6, dtype=dtype).transpose(1, 2),
    }
    adapter, bias = low_rank(inputs, both, dtype=dtype), bias.to(dtype)
    if activation == "geglu":
        wide = exact(x, weight, bias, adapter, slots)
        value, gate = wide.chunk(2, dim=-1)
        gain, shift = after["modulation"].double().chunk(2, dim=1)
        expected = (after["residual"].double() + value * F.gelu(gate)) * gain + shift
    else:
        expected = exact(x, weight, bias, adapter, slots, **after)
    y = quantized_linear(x, weight, bias, adapter, slots, kernels=TRITON, **after)
    assert_close(y, expected, depth=inputs, roundings=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_a_norm_that_comes_along(kind: Kind, dtype: torch.dtype) -> None:
    """Numbers at a tie may fall to either side, so int8 may be off by one where the norm was rounded otherwise."""
    inputs, outputs, slots = 45, 70, rows(0, -1, 3)
    x, weight = (random(inputs, 3, 77, dtype=dtype) + 3).permute(1, 2, 0), weights(outputs, inputs, torch.int8)
    adapter = low_rank(inputs, outputs, dtype=dtype)
    for modulation in (None, random(3, inputs, 2, seed=4, dtype=dtype).transpose(1, 2)):
        norm = Norm(random(2 * inputs, seed=5, dtype=dtype)[::2], 1e-6, kind, modulation)
        before = normed(x, norm, kernels=TRITON)
        made, expected = numbers(quantize(x, torch.int8, norm=norm)), quantize_reference(before, torch.int8)
        assert (made.values.int() - expected.values.int()).abs().max() <= (1 if dtype == torch.float32 else 2)
        found = quantized_linear(x, weight, None, adapter, slots, norm=norm, kernels=TRITON)
        apart = quantized_linear(before, weight, None, adapter, slots, kernels=TRITON)
        assert (found - apart).abs().max() <= 2 / 127 * apart.abs().max()
        alone = replace(norm, modulation=None if modulation is None else modulation[2:])
        own = rows(3, scales=slots.scales[2:].tolist())
        assert torch.equal(quantized_linear(x[2:], weight, None, adapter, own, norm=alone, kernels=TRITON)[0], found[2])


@given(
    st.lists(st.tuples(st.integers(-1, 3), st.floats(-3, 3, width=32)), min_size=1, max_size=4),
    st.tuples(st.integers(1, 70), st.integers(1, 70), st.integers(1, 70)),
    st.lists(st.integers(0, 64), min_size=4, max_size=4).filter(any),
    st.integers(1, 2),
    st.sampled_from(NUMBERS),
)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_slots_ranks_and_sizes(
    mixed: list[tuple[int, float]],
    sizes: tuple[int, int, int],
    ranks: list[int],
    parts: int,
    number: torch.dtype,
) -> None:
    tokens, inputs, outputs = sizes
    slots = rows(*(slot for slot, _ in mixed), scales=[scale for _, scale in mixed])
    x, weight = random(len(mixed), tokens, inputs), weights(parts * outputs, inputs, number)
    adapter = low_rank(inputs, outputs, parts, ranks=ranks)
    y = quantized_linear(x, weight, None, adapter, slots, kernels=TRITON)
    # The roundings of a delta much larger than the output stay in it.
    assert_close(y, exact(x, weight, None, adapter, slots), depth=inputs + max(ranks), roundings=8)
    plain = quantized_linear(x, weight, kernels=TRITON)
    if number == torch.int8:
        assert torch.equal(plain, quantized_linear(x, weight, kernels=REFERENCE)), "sums of whole numbers are exact"
    base = [row for row, (slot, _) in enumerate(mixed) if slot < 0 or not ranks[slot]]
    assert torch.equal(y[base], plain[base])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("number", NUMBERS, ids=str)
def test_a_row_is_the_same_to_the_bit_in_any_batch(number: torch.dtype, dtype: torch.dtype) -> None:
    inputs, outputs, slots = 45, 70, (0, -1, 3, 2, 1)
    x, weight = random(5, 21, inputs, dtype=dtype), weights(3 * outputs, inputs, number)
    adapter = low_rank(inputs, outputs, 3, dtype=dtype)
    together = quantized_linear(x, weight, None, adapter, rows(*slots), kernels=TRITON)
    scales: Sequence[float] = rows(*slots).scales.tolist()
    for row, slot in enumerate(slots):
        own = rows(slot, scales=scales[row : row + 1])
        alone = quantized_linear(x[row : row + 1], weight, None, adapter, own, kernels=TRITON)
        assert torch.equal(alone[0], together[row])


def test_gradients_are_refused() -> None:
    with pytest.raises(AssertionError, match="Triton kernels have no gradient"):
        quantized_linear(random(1, 2, 4).requires_grad_(), weights(4, 4, torch.int8), kernels=TRITON)


def test_one_op_for_the_compilers() -> None:
    """The operator's fake has the kernel's shape, format and device."""
    x, weight = random(2, 7, 45), weights(70, 45, torch.int8)
    arguments = (x, weight.values, weight.scales, None, None, None, *(None,) * 7, 0.0, "none", "geglu")
    torch.library.opcheck(module._projection, arguments, test_utils=("test_schema", "test_faketensor"))
