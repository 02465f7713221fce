"""Conditioning in one piece: what the blocks make one by one, bit for bit, with few launches and no weight twice."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from comparator import TRITON
from interpreter import DEVICE
from models import random_style
from peers import text_inputs, transformers
from torch import Tensor

from stylemuse.adapters.bank import Bank
from stylemuse.kernels.rows import BASE, RowAdapters, RowSlots
from stylemuse.models import conditioning
from stylemuse.models.amused import Amused
from stylemuse.models.conditioning import Layout, SideBySide

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "equal widths": {"hidden_size": 36, "num_attention_heads": 6},
    "no conv blocks": {"num_res_blocks": 0},
}


def network(**changes: Any) -> Amused:
    _, made = transformers(**changes)
    return made.to(DEVICE).rest(TRITON)


def inputs(made: Amused, rows: int = 3) -> dict[str, Tensor]:
    return {name: value.to(DEVICE) for name, value in text_inputs(made.config, rows, 5).items()}


def same(side_by_side: SideBySide, given: dict[str, Tensor], adapters: RowAdapters | None = None) -> None:
    """Asserts that it gives what the blocks give, under their names."""
    with torch.no_grad():
        expected = side_by_side.network.condition(**given, adapters=adapters)
        packed, layout = side_by_side.condition(**given, adapters=adapters)
    found = layout.views(packed)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert packed.shape == (len(given["text"]), sum(value[0].numel() for value in expected.values()))


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_is_what_the_blocks_make(variant: str) -> None:
    made = network(**VARIANTS[variant])
    given = inputs(made)
    with torch.no_grad():
        before = made.condition(**given)
    side_by_side = SideBySide(made)
    same(side_by_side, given)
    with torch.no_grad():
        assert all(torch.equal(value, before[name]) for name, value in made.condition(**given).items())


def test_styles_and_base_rows_beside_them() -> None:
    """A style on queries, keys and values, whose ranks differ; a base row has the bits it has alone."""
    made = network()
    bank = Bank(made.config.sites(), made.config.bottleneck_sites(), slots=2, rank=4, device=DEVICE)
    slots = [bank.add(random_style(made.config, name, rank=rank, seed=rank)) for name, rank in (("a", 2), ("b", 4))]
    numbers = torch.tensor([slots[0], BASE, slots[1]], device=DEVICE)
    adapters = RowAdapters(RowSlots(numbers, torch.tensor([0.7, 1.0, 1.0], device=DEVICE)), bank.sites)
    side_by_side, given = SideBySide(made), inputs(made)
    same(side_by_side, given, adapters)
    with torch.no_grad():
        (plain, layout), (styled, other) = (
            side_by_side.condition(**given),
            side_by_side.condition(**given, adapters=adapters),
        )
    assert layout == other
    assert torch.equal(plain[1], styled[1])
    assert not torch.equal(plain[0], styled[0])


def test_rows_of_vectors_alone_are_left_out() -> None:
    made = network()
    given = inputs(made)
    side_by_side = SideBySide(made)
    with torch.no_grad():
        expected, _ = side_by_side.condition(**given)
        found, _ = side_by_side.condition(given["text"][:2], given["pooled"], given["micro"])
    assert torch.equal(found, expected[:2])


def test_few_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """One for all scales and shifts, one for the layers' keys and values."""
    made = network(num_res_blocks=0)
    side_by_side, calls, product = SideBySide(made), [], conditioning.linear

    def counted(x: Tensor, weight: Tensor, **rest: Any) -> Tensor:
        calls.append(len(weight))
        return product(x, weight, **rest)

    monkeypatch.setattr(conditioning, "linear", counted)
    with torch.no_grad():
        side_by_side.condition(**inputs(made))
    width, layers = made.config.hidden_size, made.config.num_hidden_layers
    assert calls == [layers * 3 * 2 * width, layers * 2 * width]


def test_no_weight_is_there_twice_and_names_stay() -> None:
    made = network()
    before = {name: value.clone() for name, value in made.state_dict().items()}
    side_by_side = SideBySide(made)
    after = made.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    mapper = made.transformer_layers[0].norm1.linear.weight
    assert mapper.untyped_storage().data_ptr() == side_by_side._scales.weight.untyped_storage().data_ptr()


def test_weights_that_left_are_the_ones_that_count() -> None:
    """A network that is moved, or whose copy is trained: nothing is computed from what it had before."""
    made = network()
    side_by_side, given = SideBySide(made), inputs(made)
    copied = deepcopy(made)
    with torch.no_grad():
        expected = copied.condition(**given)
        for parameter in made.parameters():
            parameter.data = parameter.data.clone() * 1.5
    assert not side_by_side._scales.whole
    same(side_by_side, given)
    with torch.no_grad():
        assert all(torch.equal(value, expected[name]) for name, value in copied.condition(**given).items())


def test_a_layout_brings_everything_back() -> None:
    values = {"a": torch.randn(2, 3, 4), "b": torch.randn(2, 1), "c": torch.randn(2, 2, 2, 5)}
    layout = Layout.of(values)
    found = layout.views(layout.pack(values))
    assert list(found) == list(values)
    assert all(torch.equal(found[name], value) for name, value in values.items())
