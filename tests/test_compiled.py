"""Ahead-of-time compilation without a GPU: every kernel compiles, spills nothing and uses the matrix units."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from command_line import Run, refused

from stylemuse.bench import compiled
from stylemuse.kernels.tuning import FAMILIES, SHARED_MEMORY, specimens

TOGETHER = (
    "^(product q,k,v with adapter|bottleneck|attention self, heads of 64|inputs: norm layer modulated|draw, 3 branches)"
)
RESULTS = Path(__file__).parent.parent / "bench/results/compiled.json"
FIELDS = {
    "architecture", "name", "launch", "default", "warps", "registers", "spilled", "shared", "occupancy",
    "matrix_instructions", "faults",
}  # fmt: skip
pytest.importorskip("triton")


def faults(rows: list[dict]) -> list[str]:
    return [f"{row['architecture']} {row['name']} ({row['launch']}): {row['faults']}" for row in rows if row["faults"]]


@pytest.mark.parametrize("architecture", FAMILIES)
def test_default_launches_of_half_precision(architecture: str) -> None:
    """Some of each file's kernels; tests run interpreted, the compiling processes must not."""
    rows = compiled.rows([architecture], match=f"{TOGETHER}.*, bfloat16|16 x 16", defaults=True, workers=2)
    assert not faults(rows)
    assert len(rows) == len({row["name"] for row in rows}) >= 6
    for row in rows:
        assert set(row) == FIELDS
        assert row["spilled"] == 0 < row["registers"]
        assert row["shared"] <= SHARED_MEMORY[architecture]
        assert 0 < row["occupancy"] <= 1
    used = {name for row in rows for name in row["matrix_instructions"]}
    newest = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma.cta"}.get(architecture)
    assert newest in used if newest else any(name.startswith("v_mfma") for name in used)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_default_launch_of_bfloat16(architecture: str) -> None:
    """Every default in one number format; `stylemuse bench compiled` compiles all launches in all of them."""
    match = "bfloat16|reveal"
    rows = compiled.rows([architecture], match=match, defaults=True, workers=os.cpu_count() or 1)
    named = [each for each in specimens(architecture) if "bfloat16" in each.name or "reveal" in each.name]
    assert [(row["name"], row["launch"]) for row in rows] == [(s.name, str(s.launches[0])) for s in named]
    assert not faults(rows)


@pytest.mark.skipif(not RESULTS.exists(), reason="no bench/results/compiled.json; `stylemuse bench compiled` makes it")
def test_results_are_of_all_kernels() -> None:
    """The committed table has every launch, without faults."""
    document = json.loads(RESULTS.read_text(encoding="utf-8"))
    there = {(row["architecture"], row["name"], row["launch"]) for row in document["launches"]}
    wanted = {(a, s.name, str(launch)) for a in FAMILIES for s in specimens(a) for launch in s.launches}
    assert there == wanted
    assert not faults(document["launches"])


def test_the_command(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its table and document, and what it says where a launch has faults."""
    row = dict.fromkeys(FIELDS, 0) | {"architecture": "sm_90", "name": "draw", "launch": "64, 4 warps, 1 stages"}
    row |= {"matrix_instructions": {"wgmma.mma_async": 4}, "faults": [], "default": True, "occupancy": 0.25}
    monkeypatch.setattr(compiled, "_run", lambda order: [row | {"index": order["worker"]}])
    done = run("bench", "compiled", "--workers", "2", "--out", "found.json")
    assert done.code == 0
    assert "64, 4 warps, 1 stages *" in done.out
    assert "4 wgmma.mma_async" in done.out
    document = json.loads(done.out.splitlines()[-1])
    assert document == json.loads(Path("found.json").read_text())
    assert document["launches"] == [row, row]
    assert "25%  4 wgmma.mma_async" in Path("found.txt").read_text()

    row["faults"] = ["8 bytes a thread in local memory"]
    done = run("bench", "compiled", "--workers", "1")
    assert done.code == 2
    assert "1 of 1 launches have faults; the first: sm_90 draw" in done.error


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--match", "("], "not a regular expression"),
        (["--architectures", "sm_70"], "sm_80"),
        (["--match", "nothing of this name"], "no kernel"),
    ],
)
def test_refusals(run: Run, arguments: list[str], told: str) -> None:
    refused(run("bench", "compiled", "--workers", "1", *arguments), told)
