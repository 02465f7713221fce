"""kernels/dispatch.py and kernels/tuning.py: who runs, what is refused, and the list of all launches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from comparator import TRITON
from interpreter import DEVICE

from stylemuse.backend.machine import choose_kernels
from stylemuse.core import StylemuseError
from stylemuse.kernels import tuning
from stylemuse.kernels.dispatch import OPERATIONS, REFERENCE, STEP, obstacle
from stylemuse.kernels.tuning import FAMILIES, SHARED_MEMORY, Launch, pick, specimens

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="it is about machines without a GPU")


def answer(program: str, *, interpret: bool) -> str:
    """What a fresh process prints, with or without TRITON_INTERPRET."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_INTERPRET": "1"} if interpret else {}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.strip()


def test_an_operation_runs_where_its_kernels_say() -> None:
    assert not REFERENCE.triton
    assert TRITON.triton == {*OPERATIONS, STEP}
    assert choose_kernels("reference", DEVICE) == (REFERENCE, "asked for")
    assert choose_kernels("triton", DEVICE) == (TRITON, "asked for")
    with pytest.raises(StylemuseError, match=r"^backend 'tpu' is not there; allowed: auto, reference, triton, onnx$"):
        choose_kernels("tpu", DEVICE)


@without_gpu
def test_auto_is_the_reference_on_a_cpu() -> None:
    assert choose_kernels("auto", DEVICE) == (REFERENCE, "no GPU is used")


@without_gpu
def test_triton_on_a_cpu_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    need = "on a CPU Triton only runs interpreted, for tests; it needs TRITON_INTERPRET=1 in the environment"
    assert obstacle(DEVICE) == need
    with pytest.raises(StylemuseError, match=f"^backend 'triton' cannot run here: {need}$"):
        choose_kernels("triton", DEVICE)


@without_gpu
def test_the_interpreter_is_chosen_before_the_import() -> None:
    program = (
        "import os, torch; from stylemuse.kernels.dispatch import obstacle;"
        "os.environ['TRITON_INTERPRET'] = '1'; print(obstacle(torch.device('cpu')))"
    )
    assert "TRITON_INTERPRET" in answer(program, interpret=False)
    assert answer(program, interpret=True) == "None"


@without_gpu
def test_triton_is_imported_only_where_it_can_be_used() -> None:
    program = "import sys, stylemuse.kernels.linear, stylemuse.pipeline; print('triton' in sys.modules)"
    assert answer(program, interpret=True) == "True"
    if torch.version.cuda is None and torch.version.hip is None:
        assert answer(program, interpret=False) == "False"


def test_kernel_files_load_without_triton() -> None:
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, stylemuse.kernels.adapted_attention, stylemuse.kernels.response_norm\n"
        "from stylemuse.kernels.linear import linear; from stylemuse.kernels.dispatch import obstacle\n"
        "x = torch.ones(1, 2, 3); print(linear(x, torch.ones(4, 3)).sum().item(), obstacle(torch.device('cuda')))"
    )
    assert answer(program, interpret=False) == "24.0 the package triton is not installed"


@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_launch_is_listed(architecture: str) -> None:
    """Each with a signature that has every argument, and tiles that are powers of two."""
    listed = list(specimens(architecture))
    names = [specimen.name for specimen in listed]
    assert len(set(names)) == len(names)
    assert architecture in SHARED_MEMORY
    for specimen in listed:
        assert specimen.launches, specimen.name
        for launch in specimen.launches:
            assert all(size & (size - 1) == 0 for size in launch.tiles.values())
            types, constants, aligned = specimen.call.signature(launch)
            assert list(types) == specimen.call.kernel.arg_names
            assert {name for name, kind in types.items() if kind == "constexpr"} == set(constants)
            assert all(types[specimen.call.kernel.arg_names[index]] != "constexpr" for (index,) in aligned)
            assert all(count > 0 for count in specimen.call.grid(launch.tiles))


def test_a_measured_launch_comes_before_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured, default = Launch({"BLOCK": 64}, 8, 3), Launch({"BLOCK": 32}, 4, 2)
    entry = {"tiles": {"BLOCK": 64}, "warps": 8, "stages": 3}
    (tmp_path / "tuned").mkdir()
    file = tmp_path / "tuned" / "nvidia-h100-80gb-hbm3.json"
    file.write_text(json.dumps({"gpu": "NVIDIA H100 80GB HBM3", "launches": {"linear": {"a problem": {"512": entry}}}}))
    monkeypatch.setattr(tuning, "__file__", str(tmp_path / "tuning.py"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    for cached in (tuning._tuned, tuning._gpu):
        cached.cache_clear()
    gpu = torch.device("cuda", 0)
    assert pick("linear", "a problem", gpu, (default, measured), 600) == measured
    assert pick("linear", "a problem", gpu, (default,), 600) == default, (
        "it is none of the choices: its bits may differ"
    )
    assert pick("linear", "another", gpu, (default, measured), 600) == default
    assert pick("linear", "a problem", torch.device("cpu"), (default, measured), 600) == default
    for cached in (tuning._tuned, tuning._gpu):
        cached.cache_clear()
