"""``stylemuse bench onnx``: exports of every form and precision are measured, and kept for the next run."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from command_line import Run, refused

from stylemuse.bench.harness import measure, tables, targets
from stylemuse.bench.peers import exports

ARGUMENTS = ("--model", "tiny", "--steps", 3, "--repeats", 2, "--loads", 1)


@pytest.mark.slow
def test_the_document(run: Run, tmp_path: Path) -> None:
    ran = run("bench", "onnx", *ARGUMENTS, "--forms", "bank", "fused", "--out", f"onnx-demo-{tables.MACHINE}.json")
    assert ran.code == 0, ran.error
    document: dict[str, Any] = json.loads(ran.out.splitlines()[-1])
    measure.check(document)
    kinds = {(form, dtype) for form, dtype in product(("bank", "fused"), ("float32", "int8"))}
    assert {(row["form"], row["dtype"]) for row in document["load"]} == kinds
    for row in document["load"]:
        assert row["styles"] == (1 if row["form"] == "fused" else exports.STYLES)
        assert row["agreement"]["tokens"] >= (0.999 if row["dtype"] == "float32" else 0.3)
        assert row["bytes"] > sum(row["graph_bytes"].values()) > 0
        assert len(row["wall"]["seconds"]) == 1
    ours = {(row["form"], row["dtype"]): row for row in document["step"] if row["who"] == exports.WHO}
    assert set(ours) == kinds
    for (form, dtype), row in ours.items():
        assert len(row["step"]["seconds"]) == 2 * 2, "two pictures of three steps, the first left out"
        assert row["adapters"] == ("merged" if form == "fused" else "input")
        assert set(row["times_as_long"]) == (set() if dtype == "float32" else {exports.PEER})
        assert ("to_fused" in row) == (form != "fused")
    assert {row["name"] for row in document["step"]} - {row["name"] for row in ours.values()} == {exports.PEER}
    lines = tables.onnx(tmp_path).splitlines()
    assert len(lines) == 2 + len(kinds)
    assert "| demo | bank | int8 |" in "\n".join(lines)


def test_exports_are_kept(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ("bench", "onnx", *ARGUMENTS, "--forms", "single", "--precisions", "int8", "--folder", "kept")
    only = json.loads(run(*command, "--export-only").out.splitlines()[-1])
    assert [row["skipped"] for row in only["load"]] == ["only exported"]
    assert {path.name for path in (tmp_path / "kept" / "tiny-0").iterdir()} == {"model", "single-int8"}
    monkeypatch.setattr(exports.Kind, "write", lambda *_: pytest.fail("exported again"))
    again = json.loads(run(*command).out.splitlines()[-1])
    assert again["load"][0]["agreement"] == only["load"][0]["agreement"]
    assert [row["name"] for row in again["step"]] == [f"{exports.WHO}, single, int8", exports.PEER]


def test_refusals(run: Run) -> None:
    refused(run("bench", "onnx", "--steps", "1"), "at least 2")
    refused(run("bench", "onnx", "--export-only"), "needs --folder")
    refused(run("bench", "onnx", "--forms", "merged"), "bank")


def test_targets_are_read_from_the_document() -> None:
    def step(form: str, dtype: str, **facts: Any) -> dict[str, Any]:
        row = {
            "name": form,
            "who": exports.WHO,
            "model": "amused-256",
            "form": form,
            "dtype": dtype,
            "adapters": "input",
        }
        return row | {"times_as_long": {}, "step": measure.series([1.0])} | facts

    rows = [
        step("fused", "int8", times_as_long={exports.PEER: 3.6}),
        step("bank", "int8", times_as_long={exports.PEER: 3.1}, to_fused=1.2),
        step("single", "int8", times_as_long={exports.PEER: 3.2}, to_fused=1.1),
        step("bank", "float32", to_fused=1.04),
        step("bank", "float32", to_fused=9.0) | {"model": "demo"},
    ]
    found = targets.reached(targets.CPU, [{"step": rows}])
    values = {row["what"]: (row["value"], row["met"]) for row in found if row["name"] in ("C2", "C5")}
    assert list(values.values()) == [(3.6, True), (1.04, True), (1.2, False)]
