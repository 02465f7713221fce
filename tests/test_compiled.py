"""Ahead-of-time compilation without a GPU: every kernel compiles, spills nothing and uses the matrix units."""

from __future__ import annotations

import importlib.metadata
import json
import re
from pathlib import Path
from typing import Any

import pytest
from command_line import Run, refused

from stylemuse.bench.step import compiled
from stylemuse.kernels.tuning import FAMILIES, SHARED_MEMORY, specimens

TOGETHER = (
    "^(product q,k,v with adapter|bottleneck|attention self, heads of 64|inputs: norm layer modulated|draw|"
    "blend, 3 branches)"
)
RESULTS = Path(__file__).parent.parent / "bench/results/compiled.json"
FIELDS = {
    "architecture", "name", "launch", "default", "warps", "registers", "spilled", "shared", "occupancy",
    "matrix_instructions", "faults", "key",
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


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    """The committed table."""
    return compiled.read(RESULTS)


def test_the_committed_table_is_of_these_kernels(document: dict[str, Any]) -> None:
    """Every launch of every kernel as it is now, on every chip, without faults. After a change to a kernel:

    stylemuse bench compiled --known bench/results/compiled.json --out bench/results/compiled.json
    """
    wanted = [(a, s.name, str(launch)) for a in FAMILIES for s in specimens(a) for launch in s.launches]
    assert [(row["architecture"], row["name"], row["launch"]) for row in document["launches"]] == wanted
    assert not faults(document["launches"])
    if document["versions"]["triton"] != (here := importlib.metadata.version("triton")):
        pytest.skip(f"compiled by Triton {document['versions']['triton']}; {here} is here")
    keys = compiled.keys(FAMILIES)
    changed = sorted({row["name"] for row, now in zip(document["launches"], keys, strict=True) if row["key"] != now})
    assert not changed


def test_what_is_known_is_not_compiled_again(document: dict[str, Any]) -> None:
    """And what was known with a fault, or of another source, is."""
    match = "^bottleneck.*bfloat16"
    launches = [row for row in document["launches"] if re.search(match, row["name"])]
    of_one = [row for row in launches if row["architecture"] == "sm_80"]
    told = [{**row, "registers": -1} for row in of_one]
    assert {row["registers"] for row in compiled.rows(["sm_80"], match=match, known=told)} == {-1}
    stale = [{**told[0], "key": "another"}, *({**row, "faults": ["spilled"]} for row in told[1:])]
    assert all(row["registers"] > 0 for row in compiled.rows(["sm_80"], match=match, known=stale))


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
