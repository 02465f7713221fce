"""The kernel of kernels/query_attention.py against its definition in fp64, its parts in Triton, and rows to the bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from comparator import DTYPES, TRITON, assert_close
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interpreter import DEVICE
from test_triton_linear import LENGTHS, low_rank, random, rows
from torch import Tensor

from stylemuse.kernels.norm import Kind, Norm
from stylemuse.kernels.query_attention import query_attention
from stylemuse.kernels.rows import LowRank

pytestmark = pytest.mark.usefixtures("nan_filled")
formats = pytest.mark.parametrize("dtype", DTYPES, ids=str)
APART = replace(TRITON, triton=TRITON.triton - {"query_attention"})


def doubled(pair: LowRank) -> LowRank:
    return LowRank(pair.down.double(), pair.up.double(), pair.ranks)


@formats
@pytest.mark.parametrize("size", [8, 64, 72, 128])
def test_head_sizes(size: int, dtype: torch.dtype) -> None:
    """With adapters of ranks beyond and up to the narrow loop, none, and a base row; two heads."""
    width, slots = 45, rows(0, -1, 3, 2, scales=[0.5, 1.0, -0.3, 1.0])
    x, weight = random(4, 7, width, dtype=dtype), random(2 * size, width, seed=3, dtype=dtype) * width**-0.5
    pair, bias = low_rank(width, 2 * size, dtype=dtype), random(2 * size, seed=5, dtype=dtype)
    k, v = random(4, 2, 2, 40, size, seed=1, dtype=dtype).unbind(1)
    y = query_attention(x, weight, k, v, bias, pair, slots, kernels=TRITON)
    exact = query_attention(x.double(), weight.double(), k.double(), v.double(), bias.double(), doubled(pair), slots)
    # Rounded: the adapter's hidden states, q, whose error the softmax multiplies by its size, the weights, the output.
    assert_close(y, exact, depth=width + size + 40, roundings=6)


@formats
@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norms_and_lengths(tokens: int, kind: Kind, dtype: torch.dtype) -> None:
    """Modulated or not; any number of queries, padding among the keys, and all in one with its parts."""
    width, size = 70, 16
    x, weight = random(2, tokens, width, dtype=dtype) + 1, random(size, width, seed=3, dtype=dtype) * width**-0.5
    k, v = random(2, 2, 1, 21, size, seed=1, dtype=dtype).unbind(1)
    lengths = torch.tensor([9, 21], device=DEVICE)
    k[0, :, 9:], v[0, :, 9:] = torch.nan, torch.nan
    for modulation in (None, random(2, 2, width, seed=2, dtype=dtype)):
        norm = Norm(random(width, seed=4, dtype=dtype), 1e-6, kind, modulation)
        exact_norm = Norm(norm.weight.double(), 1e-6, kind, None if modulation is None else modulation.double())
        y = query_attention(x, weight, k, v, lengths=lengths, norm=norm, kernels=TRITON)
        exact = query_attention(x.double(), weight.double(), k.double(), v.double(), lengths=lengths, norm=exact_norm)
        assert_close(y, exact, depth=width + size + 21, roundings=6)


@formats
def test_it_is_its_parts(dtype: torch.dtype) -> None:
    """To the bit where both pass over inputs and keys in the same tiles, as they do interpreted."""
    width, size, slots = 48, 24, rows(0, -1)
    x, weight = random(2, 77, width, dtype=dtype), random(3 * size, width, seed=3, dtype=dtype) * width**-0.5
    k, v = random(2, 2, 3, 77, size, seed=1, dtype=dtype).unbind(1)
    norm = Norm(random(width, seed=4, dtype=dtype), 1e-6, "rms", random(2, 2, width, seed=2, dtype=dtype))
    pair = low_rank(width, 3 * size, dtype=dtype)
    both = [
        query_attention(x, weight, k, v, None, pair, slots, norm=norm, kernels=kernels) for kernels in (TRITON, APART)
    ]
    if DEVICE.type == "cpu":
        assert torch.equal(*both)
    assert_close(both[0], both[1].double(), depth=width + size + 77, roundings=6)


def test_rows_are_alone_and_base_is_base() -> None:
    """Views, too: a row has its bits alone, a base row those of a call without adapters."""
    width, size, slots = 40, 20, (0, -1, 3)
    x, weight = random(width, 3, 9).permute(1, 2, 0), random(2 * size, width, seed=3)
    k, v = random(3, 13, 2, 2, size, seed=1).permute(0, 2, 3, 1, 4).unbind(1)
    pair, norm = low_rank(width, 2 * size), Norm(random(2 * width, seed=4)[::2], 1e-6, "layer", random(3, 2, width))

    def some(part: slice, adapter: LowRank | None = pair) -> Tensor:
        own = replace(norm, modulation=norm.modulation[part])
        given_rows = rows(*slots[part], scales=[0.5] * len(slots[part]))
        return query_attention(x[part], weight, k[part], v[part], None, adapter, given_rows, norm=own, kernels=TRITON)

    together = some(slice(None))
    for row in range(3):
        assert torch.equal(some(slice(row, row + 1))[0], together[row])
    assert torch.equal(some(slice(1, 2), None)[0], together[1])


@given(st.integers(1, 70), st.integers(1, 50), st.integers(1, 40), st.integers(1, 3), st.integers(1, 60))
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_sizes(tokens: int, keys: int, size: int, heads: int, width: int) -> None:
    x, weight = random(1, tokens, width), random(heads * size, width, seed=1) * width**-0.5
    k, v = random(1, 2, heads, keys, size, seed=2).unbind(1)
    y = query_attention(x, weight, k, v, kernels=TRITON)
    exact = query_attention(x.double(), weight.double(), k.double(), v.double())
    assert_close(y, exact, depth=width + size + keys, roundings=6)
