"""The clock's protocol and the document's schema; no speed is asserted."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch

from stylemuse.bench.harness import measure

CPU = torch.device("cpu")


def made() -> dict[str, Any]:
    row = {"name": "a", "rows": 2, "wall": measure.series([0.3, 0.1, 0.2])}
    return measure.document("a command", 7, CPU, {"bytes": 1.0}, step=[row, {"name": "b", "skipped": "no GPU here"}])


def test_percentiles_are_of_all_values() -> None:
    found = measure.series(range(11))
    assert found["seconds"] == [float(value) for value in range(11)]
    assert (found["p20"], found["p50"], found["p80"]) == (2.0, 5.0, 8.0)


def test_variants_take_turns() -> None:
    order: list[str] = []
    variants = {name: lambda name=name: order.append(name) for name in "ab"}
    found = measure.interleaved(variants, repeats=3, warm=1)
    assert "".join(order) == "abbaabba"
    assert {name: (len(each["wall"]), len(each["cpu"])) for name, each in found.items()} == {"a": (3, 3), "b": (3, 3)}
    assert all(value >= 0 for each in found.values() for values in each.values() for value in values)


def test_roofs_are_rates() -> None:
    found = measure.roofs(CPU, [torch.float32], sides=(64,), repeats=2)
    assert found["float32_flops"] > 0
    assert found["bytes"] > 0


def test_a_document_survives_json() -> None:
    document = made()
    measure.check(json.loads(json.dumps(document)))
    assert document["machine"]["threads"] == torch.get_num_threads()
    assert document["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: d.pop("command"), "command"),
        (lambda d: d.update(schema=2), "schema 2"),
        (lambda d: d.update(extra=1), "unknown: extra"),
        (lambda d: d["step"].append([]), r"step\[2\]"),
        (lambda d: d["step"].append({"name": "c"}), "why it was skipped"),
        (lambda d: d["step"][0].update(skipped="no"), "why it was skipped"),
        (lambda d: d["step"][0]["wall"].update(p50=0.15), r"step\[0\].wall"),
        (lambda d: d["step"][0]["wall"]["seconds"].append(9.0), r"step\[0\].wall"),
        (lambda d: d["roofs"].update(bytes=float("nan")), "JSON"),
    ],
)
def test_what_is_no_document_is_refused(change: Any, says: str) -> None:
    document = copy.deepcopy(made())
    change(document)
    with pytest.raises(ValueError, match=says):
        measure.check(document)
