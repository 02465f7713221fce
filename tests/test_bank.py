"""adapters/bank.py: fixed addresses, A -> B -> A to the bit, refusals that change nothing, memory when it is needed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from stylemuse.adapters.bank import Bank, SlotsInUse
from stylemuse.adapters.canonical import Adapter
from stylemuse.core import StylemuseError
from stylemuse.kernels.bottleneck import bottleneck
from stylemuse.kernels.linear import linear
from stylemuse.kernels.rows import Bottleneck, LowRank, RowSlots, Site

SITES = {
    "layer.to_q": Site("layer.qkv", 0, 3, 6, 4),
    "layer.to_k": Site("layer.qkv", 1, 3, 6, 4),
    "layer.to_v": Site("layer.qkv", 2, 3, 6, 4),
    "layer.to_out.0": Site("layer.to_out", 0, 1, 4, 6),
}
NECKS = {"layer": 6}


def lora(name: str, ranks: dict[str, int] | None = None, **facts: object) -> Adapter:
    ranks = ranks or {"layer.to_q": 2, "layer.to_v": 3, "layer.to_out.0": 1}
    pairs = {
        site: (torch.randn(rank, SITES[site].inputs), torch.randn(SITES[site].outputs, rank))
        for site, rank in ranks.items()
    }
    return Adapter(name=name, kind="lora", tensors=pairs, **facts)  # type: ignore[arg-type]


def neck(name: str, width: int = 6, lanes: int = 2, site: str = "layer") -> Adapter:
    return Adapter(name=name, kind="bottleneck", tensors={site: (torch.randn(width, lanes), torch.randn(lanes, width))})


def bank(slots: int = 3, rank: int = 4, **options: object) -> Bank:
    made = Bank(SITES, NECKS, slots=slots, rank=rank, **options)  # type: ignore[arg-type]
    for adapter in (lora("first", dict.fromkeys(SITES, 1)), neck("second")):  # every kind of layer has its stacks
        made.clear(made.add(adapter))
    for tensor in stacked(made):  # what torch.empty may hold
        if tensor.is_floating_point():
            tensor.fill_(torch.nan)
    return made


def stacked(bank: Bank) -> list[Tensor]:
    tensors: list[Tensor] = []
    for site in bank.sites.values():
        tensors += [site.down, site.up, site.ranks if isinstance(site, LowRank) else site.widths]
    return tensors


def state(bank: Bank) -> list[bytes]:
    return [tensor.numpy().tobytes() for tensor in stacked(bank)]


def rows(*slots: int) -> RowSlots:
    return RowSlots(torch.tensor(slots), torch.ones(len(slots)))


def test_addresses_never_change() -> None:
    made = bank()
    addresses = [tensor.data_ptr() for tensor in stacked(made)]
    made.add(lora("a"))
    made.clear(made.add(neck("b")))
    made.write(0, lora("c"))
    assert [tensor.data_ptr() for tensor in stacked(made)] == addresses


def test_sites_that_nobody_touches_stay_out_of_a_batch() -> None:
    """What an adapter leaves alone is base for its rows, so a batch need not look there."""
    made = bank()
    query, chin = made.add(lora("a", {"layer.to_q": 2})), made.add(neck("b"))
    assert made.touched([]) == {}
    assert made.touched([query]) == {"layer.qkv": made.sites["layer.qkv"]}
    assert set(made.touched([query, chin, query])) == {"layer.qkv", "layer"}
    made.write(query, lora("a", {"layer.to_out.0": 1}))
    assert set(made.touched([query])) == {"layer.to_out"}


def test_a_then_b_then_a_is_a_to_the_bit() -> None:
    made, a, b = bank(), lora("a"), lora("b", {"layer.to_q": 4, "layer.to_k": 1})
    for adapter in (neck("n"), b, a):  # after these, every site of the slot has been written once
        made.write(1, adapter)
    once = state(made)
    made.write(1, b)
    made.write(1, neck("n"))
    made.clear(1)
    made.write(1, a)
    assert state(made) == once


def test_lanes_beyond_the_rank_are_zero_and_other_slots_are_untouched() -> None:
    made = bank()
    made.write(1, lora("a"))
    qkv = made.sites["layer.qkv"]
    assert isinstance(qkv, LowRank)
    assert qkv.ranks.tolist() == [0, 3, 0]
    assert not qkv.down[1, 0, :, 2:].any()
    assert not qkv.up[1, 0, 2:].any()
    assert not qkv.down[1, 1].any(), "the part the adapter does not touch"
    assert qkv.down[[0, 2]].isnan().all()


def test_rows_see_their_own_adapter() -> None:
    made, a, b = bank(), lora("a"), lora("b")
    slots = made.add(a), made.add(b)
    x, weight = torch.randn(3, 5, 6), torch.randn(12, 6)
    qkv = made.sites["layer.qkv"]
    assert isinstance(qkv, LowRank)
    y = linear(x, weight, None, qkv, rows(slots[1], -1, slots[0]))
    for row, adapter in ((0, b), (2, a)):
        merged = weight.clone()
        for site, part in (("layer.to_q", 0), ("layer.to_v", 2)):
            down, up = adapter.tensors[site]
            merged[part * 4 : part * 4 + 4] += up @ down
        torch.testing.assert_close(y[row], x[row] @ merged.T, rtol=1e-5, atol=1e-5)
    assert torch.equal(y[1], torch.nn.functional.linear(x, weight)[1])


def test_bottleneck_slots() -> None:
    made, adapter = bank(), neck("n")
    slot = made.add(adapter)
    site = made.sites["layer"]
    assert isinstance(site, Bottleneck)
    y = torch.randn(2, 3, 6)
    out = bottleneck(y, site, rows(-1, slot))
    down, up = adapter.tensors["layer"]
    torch.testing.assert_close(out[1], y[1] + torch.nn.functional.gelu(y[1] @ down) @ up)
    assert torch.equal(out[0], y[0])


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        (lora("big", {"layer.to_q": 5}), "rank 5; this bank allows at most 4"),
        (neck("wide", lanes=5), "rank 5; this bank allows at most 4"),
        (neck("other", width=8), "maps 8 to 8, here it is 6 to 6"),
        (neck("elsewhere", site="blocks.0"), "adapts blocks.0; allowed are layer"),
        (replace(lora("x"), tensors={"layer.norm": (torch.ones(1, 6), torch.ones(6, 1))}), "adapts layer.norm"),
        (replace(lora("x"), tensors={"layer.to_q": (torch.ones(1, 7), torch.ones(4, 1))}), "maps 7 to 4"),
        (replace(lora("x"), base_model="amused-512", base_sha256="b" * 64), "another base model \\(amused-512\\)"),
        (lora("huge"), "overflows torch.float16"),
    ],
)
def test_a_refused_adapter_changes_nothing(adapter: Adapter, words: str) -> None:
    made = bank(base_sha256="a" * 64, dtype=torch.float16)
    made.add(lora("a"))
    made.write(1, lora("b"))
    if adapter.name == "huge":
        down, up = adapter.tensors["layer.to_v"]
        adapter = replace(adapter, tensors={**adapter.tensors, "layer.to_v": (down * 1e6, up)})
    before = state(made)
    with pytest.raises(StylemuseError, match=words):
        made.add(adapter)
    assert state(made) == before


def test_all_slots_in_use_is_said() -> None:
    made = bank(slots=2)
    slots = made.add(lora("a")), made.add(lora("b"))
    before = state(made)
    with pytest.raises(SlotsInUse, match=r"^all 2 slots hold an adapter$"):
        made.add(lora("c"))
    assert state(made) == before
    assert [made.adapter(slot).name for slot in slots] == ["a", "b"]
    made.clear(slots[0])
    assert made.add(lora("c")) == slots[0]


def test_a_kind_of_layer_takes_memory_when_an_adapter_first_touches_it() -> None:
    """In all layers at once: what was captured for a kind goes on reading what it read."""
    sites = {
        f"layers.{index}.{name}": Site(f"layers.{index}.{name}", 0, 1, 8, 8) for index in range(3) for name in "qo"
    }
    made = Bank(sites, {"neck": 8}, slots=5, rank=4)
    assert (made.reserved, dict(made.sites)) == (0, {})
    adapter = Adapter("a", "lora", {"layers.1.q": (torch.ones(2, 8), torch.ones(8, 2))})
    slot, first = made.add(adapter), made.sites
    assert set(first) == {f"layers.{index}.q" for index in range(3)}
    assert made.reserved == 3 * 5 * 4 * (8 + 8) * 4
    ranks = [stack.ranks.tolist() for stack in first.values() if isinstance(stack, LowRank)]
    assert ranks == [[0] * 5, [2, 0, 0, 0, 0], [0] * 5]
    other = Adapter("b", "lora", {"layers.2.o": (torch.ones(2, 8), torch.ones(8, 2))})
    made.add(other)
    assert set(made.sites) == set(sites)
    assert all(made.sites[name] is stack for name, stack in first.items())
    assert set(first) != set(made.sites), "who goes through the old mapping meanwhile is not disturbed"
    assert set(made.touched([slot])) == {"layers.1.q"}
    with pytest.raises(StylemuseError, match="rank 5"):
        made.add(Adapter("c", "bottleneck", {"neck": (torch.ones(8, 5), torch.ones(5, 8))}))
    assert "neck" not in made.sites, "what is refused takes nothing"


def test_unused_slots_cost_no_memory() -> None:
    resident = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096  # noqa: E731, SIM115
    before = resident()
    sites = {f"{i}.q": Site(f"{i}.q", 0, 1, 1024, 1024) for i in range(33)}
    made = Bank(sites, {}, slots=64, rank=64)
    made.write(0, Adapter("a", "lora", {"0.q": (torch.ones(4, 1024), torch.ones(1024, 4))}))
    assert made.reserved > 1 << 30
    assert resident() - before < 64 << 20


def test_a_bank_without_room_is_refused() -> None:
    with pytest.raises(StylemuseError, match="slots=0"):
        Bank(SITES, NECKS, slots=0)
