"""``stylemuse bench adapters`` on the embedded model: what it swaps is swapped, and its document says what was."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from command_line import Run

from stylemuse.bench.harness import measure, networks
from stylemuse.bench.serving import adapters


def test_the_document(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "roofs", lambda device, dtypes: {"float32_flops": 1e9, "bytes": 1e9})
    monkeypatch.setattr(adapters, "MANY_SWAPS", 3)
    arguments = "--dtype float32 --batch 2 --steps 2 --repeats 1 --swaps 2 --registered 1 3"
    ran = run("bench", "adapters", *arguments.split())
    assert ran.code == 0, ran.error
    document: dict[str, Any] = json.loads(ran.out.splitlines()[-1])
    measure.check(document)
    assert [(row["adapters"], row["batch"]) for row in document["step"]] == [("none", 2), ("one", 2), ("many", 2)]
    assert document["step"][0]["to_base"] == 1.0
    kinds = [(row.get("from"), row.get("registered")) for row in document["adapter_swap"][:-1]]
    places = ("resident", "host memory", "disk")
    assert kinds == [(place, number) for number in (1, 3) for place in places]
    assert all(len(row["wall"]["seconds"]) == 2 for row in document["adapter_swap"][:-1])
    last = document["adapter_swap"][-1]
    assert last["swaps"] == len(last["wall"]["seconds"]) == 3
    assert last["bytes_grown"] == last["bytes_after"] - last["bytes_before"]


@pytest.mark.parametrize("where", ["host memory", "disk"])
def test_a_swap_changes_the_pictures(where: str) -> None:
    pipe = networks.pipeline("demo", dtype="float32", slots=3, rank=16)
    name = networks.style_name(0)
    pipe.adapters.add(name, networks.random_adapter(pipe, name))
    slot = pipe.adapters.version(name).slot
    with adapters._changes(pipe) as changes:
        changes[where]()
        one = pipe.adapters[name]
        assert pipe.adapters.version(name).slot != slot
        changes[where]()
        two = pipe.adapters[name]
        changes[where]()
        again = pipe.adapters[name]
    for site, (down, _) in one.tensors.items():
        assert not torch.equal(down, two.tensors[site][0])
        assert torch.equal(down, again.tensors[site][0])


def test_what_does_not_fit_says_so() -> None:
    pipe = networks.pipeline("demo", dtype="float32", slots=3, rank=16)
    rows = adapters.swaps(pipe, [2, 3], repeats=1)
    assert [("skipped" in row) for row in rows] == [False, False, False, True]
    assert rows[-1]["skipped"] == "3 styles and the one that comes are more than 3 slots"
