"""adapters/bank.py: fixed addresses, A -> B -> A to the bit, refusals that change nothing, names and slots in use."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from stylemuse.adapters.bank import Bank
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
    for tensor in stacked(made):  # what torch.empty may hold
        if tensor.is_floating_point():
            tensor.fill_(torch.nan)
    return made


def stacked(bank: Bank) -> list[Tensor]:
    tensors: list[Tensor] = []
    for site in bank.sites.values():
        tensors += [site.down, site.up, site.ranks if isinstance(site, LowRank) else site.widths]
    return tensors


def state(bank: Bank) -> tuple[list[bytes], tuple[str, ...]]:
    return [tensor.numpy().tobytes() for tensor in stacked(bank)], bank.names


def rows(*slots: int) -> RowSlots:
    return RowSlots(torch.tensor(slots), torch.ones(len(slots)))


def test_addresses_never_change() -> None:
    made = bank()
    addresses = [tensor.data_ptr() for tensor in stacked(made)]
    made.add(lora("a"))
    made.add(neck("b"))
    made.add(lora("a"), replace=True)
    made.remove("b")
    made.add(lora("c"))
    assert [tensor.data_ptr() for tensor in stacked(made)] == addresses


def test_sites_that_nobody_touches_stay_out_of_a_batch() -> None:
    """What an adapter leaves alone is base for its rows, so a batch need not look there."""
    made = bank()
    query, chin = made.add(lora("a", {"layer.to_q": 2})), made.add(neck("b"))
    assert made.touched([]) == {}
    assert made.touched([query]) == {"layer.qkv": made.sites["layer.qkv"]}
    assert set(made.touched([query, chin, query])) == {"layer.qkv", "layer"}
    made.put(query, lora("a", {"layer.to_out.0": 1}))
    assert set(made.touched([query])) == {"layer.to_out"}


def test_a_then_b_then_a_is_a_to_the_bit() -> None:
    made, a, b = bank(), lora("a"), lora("b", {"layer.to_q": 4, "layer.to_k": 1})
    for adapter in (neck("n"), b, a):  # after these, every site of the slot has been written once
        made.put(1, adapter)
    once = state(made)[0]
    made.put(1, b)
    made.put(1, neck("n"))
    made.clear(1)
    made.put(1, a)
    assert state(made)[0] == once


def test_lanes_beyond_the_rank_are_zero_and_other_slots_are_untouched() -> None:
    made = bank()
    made.put(1, lora("a"))
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
        (lora("a"), "'a' exists already"),
        (lora("huge"), "overflows torch.float16"),
    ],
)
def test_a_refused_adapter_changes_nothing(adapter: Adapter, words: str) -> None:
    made = bank(base_sha256="a" * 64, dtype=torch.float16)
    made.add(lora("a"))
    made.put(1, lora("b"))
    if adapter.name == "huge":
        down, up = adapter.tensors["layer.to_v"]
        adapter = replace(adapter, tensors={**adapter.tensors, "layer.to_v": (down * 1e6, up)})
    before = state(made)
    with pytest.raises(StylemuseError, match=words):
        made.add(adapter)
    with pytest.raises(StylemuseError, match=r"unknown; allowed are a$"):
        made.remove("nobody")
    assert state(made) == before


def test_all_slots_in_use_is_said() -> None:
    made = bank(slots=2)
    made.add(lora("a"))
    made.add(lora("b"))
    before = state(made)
    with pytest.raises(StylemuseError, match="all 2 slots are in use \\(a, b\\)"):
        made.add(lora("c"))
    assert state(made) == before
    made.remove("a")
    made.add(lora("c"))
    assert made.names == ("b", "c")


def test_unknown_names_list_what_is_allowed() -> None:
    made = bank()
    with pytest.raises(StylemuseError, match="'ink' is unknown; allowed are none yet"):
        made.slot("ink")
    slot = made.add(lora("neon"))
    with pytest.raises(StylemuseError, match="allowed are neon"):
        made.slot("ink")
    assert made.slot("neon") == slot
    assert made.adapter("neon").name == "neon"


def test_a_running_request_keeps_its_version() -> None:
    made = bank()
    made.add(lora("a"))
    held = made.acquire("a")
    qkv = made.sites["layer.qkv"]
    before = qkv.up[held].clone()
    fresh = made.add(lora("a"), replace=True)
    assert fresh != held
    assert made.slot("a") == fresh
    made.remove("a")
    assert torch.equal(qkv.up[held], before)
    made.release(held)
    assert not qkv.up[held].any()
    assert {made.add(lora(name)) for name in "bcd"} == {0, 1, 2}, "every slot is free again"


def test_threads_that_add_and_remove() -> None:
    made = bank(slots=8)

    def work(name: str) -> None:
        for _ in range(20):
            made.add(lora(name))
            made.release(made.acquire(name))
            made.remove(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made.names == ()
    assert all(not tensor.any() for tensor in stacked(made) if not tensor.is_floating_point())


def test_unused_slots_cost_no_memory() -> None:
    resident = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096  # noqa: E731, SIM115
    before = resident()
    sites = {f"{i}": Site(f"{i}", 0, 1, 1024, 1024) for i in range(32)}
    made = Bank(sites, {}, slots=64, rank=64)
    made.put(0, Adapter("a", "lora", {"0": (torch.ones(4, 1024), torch.ones(1024, 4))}))
    reserved = sum(tensor.numel() * tensor.element_size() for tensor in stacked(made))
    assert reserved > 1 << 30
    assert resident() - before < 64 << 20


def test_a_bank_without_room_is_refused() -> None:
    with pytest.raises(StylemuseError, match="slots=0"):
        Bank(SITES, NECKS, slots=0)
