"""``stylemuse bench gpu`` and ``kernels`` on tiny sizes: all of it runs, and says what it could not measure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Run
from interpreter import DEVICE
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from stylemuse.bench.harness import measure, report, targets
from stylemuse.bench.step import gpu, kernels
from stylemuse.kernels import tuning
from stylemuse.kernels.dispatch import REFERENCE, triton_kernels

RATES = {f"{number}_flops": 1e9 for number in ("float32", "bfloat16", "int8", "float8_e4m3fn")} | {"bytes": 1e9}


@torch.no_grad()
def test_every_operation_is_what_its_reference_is() -> None:
    rows = kernels.run(gpu.TINY, DEVICE, torch.float32, rows=2, repeats=1, rates=RATES, chosen=("reference", "triton"))
    compared = [row for row in rows if "error" in row]
    assert {row["implementation"] for row in compared} == {"reference", "triton"}
    assert len(rows) - len(compared) == 2, "the sampling changes its inputs"
    assert all(row["error"] < 1e-5 for row in compared)
    assert all(row["floor"] > 0 for row in rows)


@torch.no_grad()
def test_operations_cost_what_torch_counts() -> None:
    def flop(_: object, a: Sequence[int], b: Sequence[int], **__: object) -> int:
        return 2 * a[0] * a[1] * a[2] * b[2]

    def whole(a: Sequence[int], b: Sequence[int], **__: object) -> int:
        return 2 * a[0] * a[1] * b[1]

    # The counter knows the one that is not in place, and no product of whole numbers.
    in_place = {torch.ops.aten.baddbmm_: flop, torch.ops.aten._int_mm: whole}
    for operation in kernels.operations(gpu.TINY, torch.device("cpu"), torch.float32, rows=2):
        with FlopCounterMode(display=False, custom_mapping=in_place) as counter, sdpa_kernel(SDPBackend.MATH):
            operation.run(REFERENCE)
        assert counter.get_total_flops() == operation.flop, operation.name


@torch.no_grad()
def test_trials_force_a_launch_and_only_within() -> None:
    operation = next(iter(kernels.operations(gpu.TINY, DEVICE, torch.float32, rows=2)))
    triton = triton_kernels(DEVICE)
    with tuning.trial() as met:
        expected = operation.run(triton)
    ((name, problem, tokens), found), *_ = met.items()
    assert len(found.calls) == 1, "with the call itself, to be made again"
    other = tuning.Launch({**found.choices[0].tiles, "BLOCK_TOKENS": 16}, 4, 1)
    with tuning.trial({(name, problem): other}):
        assert tuning.pick(name, problem, DEVICE, found.choices, tokens) is other
        torch.testing.assert_close(operation.run(triton), expected, rtol=1e-5, atol=1e-5)
    assert tuning.pick(name, problem, DEVICE, found.choices, tokens) is found.choices[0]


@pytest.mark.slow
def test_a_dry_run_does_every_part_and_resumes(run: Run, tmp_path: Path) -> None:
    ran = run("bench", "gpu", "--tiny", "--device", "cpu", "--folder", "parts", "--out", "gpu.json")
    assert ran.code == 0, ran.error
    document: dict[str, Any] = json.loads(ran.out.splitlines()[-1])
    measure.check(document)
    assert document == report.read(tmp_path / "gpu.json")
    assert {file.stem for file in (tmp_path / "parts").glob("*.json")} == {*gpu.PARTS, "tuned"}
    tuned = json.loads((tmp_path / "parts/tuned.json").read_text(encoding="utf-8"))
    assert {"linear", "inputs"} <= set(tuned["launches"]), "what has more than one launch under the interpreter"
    assert document["step"]
    assert document["adapter_swap"]
    again = run("bench", "gpu", "--tiny", "--device", "cpu", "--folder", "parts")
    assert again.error.count("done before") == len(gpu.PARTS)
    assert json.loads(again.out.splitlines()[-1])["call"] == document["call"]


def test_without_a_gpu_it_says_so(run: Run) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    ran = run("bench", "gpu")
    assert ran.code == 2
    assert "no GPU here; --tiny" in ran.error


def test_targets_read_what_was_measured() -> None:
    step = measure.series([0.5])
    ours = {"name": "a", "who": "stylemuse", "dtype": "bfloat16", "adapters": "none", "batch": 1, "step": step}
    ours["times_as_long"] = {"diffusers, float32": 2.5, "diffusers, bfloat16": 1.0}
    swap = {"name": "b", "from": "resident", "registered": 1, "wall": measure.series([2e-6])}
    document = measure.document("c", 0, torch.device("cpu"), {}, step=[ours], adapter_swap=[swap])
    found = targets.reached(targets.CPU, [document])
    read = [(row["name"], row["met"], row["text"]) for row in found if row["value"] is not None]
    assert read == [("C1", True, "2.50 x"), ("C1", False, "1.00 x"), ("C6", True, "2 us")]
    assert {(row["met"], row["text"]) for row in found if row["value"] is None} == {(None, "not measured")}
    assert all(row["value"] is None for row in targets.reached(targets.GPU, []))
