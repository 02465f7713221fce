"""What is computed on: taken as asked or refused, else chosen by what the machine has, with the reason."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import pytest
import torch

from stylemuse import StylemuseError
from stylemuse.backend import cpu
from stylemuse.backend.machine import choose

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


# What Linux tells of CPUs, as far as it matters here.
HASWELL = "fpu sse4_2 avx fma avx2 bmi2"
SKYLAKE = f"{HASWELL} avx512f avx512dq avx512bw avx512vl"
ICE_LAKE = f"{SKYLAKE} avx512_vnni avx512_bitalg"
ZEN4 = f"{ICE_LAKE} avx512_bf16"
SAPPHIRE_RAPIDS = f"{ICE_LAKE} avx_vnni avx512_bf16 amx_bf16 amx_tile amx_int8"
ALDER_LAKE = f"{HASWELL} avx_vnni"
NEOVERSE = "fp asimd asimddp sve"
GRAVITON3 = f"{NEOVERSE} i8mm bf16"


def pretend(patch: pytest.MonkeyPatch, *, gpus: int = 0, gpu_bf16: bool = False, flags: str = "") -> None:
    """Let torch see so many GPUs that multiply bf16 or don't, and a CPU with these flags."""
    patch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    patch.setattr(torch.cuda, "device_count", lambda: gpus)
    patch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: gpu_bf16 or including_emulation)
    patch.setattr(cpu, "features", lambda: cpu.named(flags.split()))


@pytest.mark.parametrize(
    ("hardware", "device", "dtype", "reasons"),
    [
        ({}, CPU, torch.float32, ("no GPU is there", "this CPU has no bf16 instructions")),
        ({"flags": HASWELL}, CPU, torch.float32, ("no GPU is there", "this CPU has no bf16 instructions")),
        ({"flags": SKYLAKE}, CPU, torch.float32, ("no GPU is there", "this CPU has no bf16 instructions")),
        ({"flags": ICE_LAKE}, CPU, torch.float32, ("no GPU is there", "this CPU has no bf16 instructions")),
        ({"flags": ALDER_LAKE}, CPU, torch.float32, ("no GPU is there", "this CPU has no bf16 instructions")),
        ({"flags": ZEN4}, CPU, torch.bfloat16, ("no GPU is there", "this CPU has bf16 instructions (AVX-512 BF16)")),
        ({"flags": SAPPHIRE_RAPIDS}, CPU, torch.bfloat16, ("no GPU is there", "this CPU has bf16 instructions (AMX)")),
        ({"flags": NEOVERSE}, CPU, torch.float32, ("no GPU is there", "this CPU has no bf16 instructions")),
        ({"flags": GRAVITON3}, CPU, torch.float32, ("no GPU is there", "bf16 has not been measured on this kind of")),
        ({"gpus": 1, "gpu_bf16": True}, CUDA, torch.bfloat16, ("a GPU is there", "this GPU has bf16 tensor cores")),
        ({"gpus": 1, "flags": ZEN4}, CUDA, torch.float32, ("a GPU is there", "this GPU has no bf16 tensor cores")),
    ],
    ids=[
        "unknown",
        "AVX2",
        "AVX-512",
        "VNNI",
        "AVX-VNNI",
        "AVX-512 BF16",
        "AMX",
        "arm64",
        "arm64 with bf16",
        "new GPU",
        "old GPU",
    ],
)
def test_the_best_of_the_machine_is_chosen(
    hardware: dict[str, Any],
    device: torch.device,
    dtype: torch.dtype,
    reasons: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Emulated bf16 does not count: it is far slower than fp32."""
    pretend(monkeypatch, **hardware)
    machine = choose()
    assert (machine.device, machine.dtype) == (device, dtype)
    assert machine.why["device"] == reasons[0]
    assert machine.why["dtype"].startswith(reasons[1])


def test_what_is_asked_for_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, gpus=2, gpu_bf16=True)
    for device in ("cpu", "cuda", "cuda:1", torch.device("cuda", 1)):
        for dtype in ("float32", "bfloat16", torch.float32):
            machine = choose(device, dtype)
            assert machine.device == torch.device(device)
            assert machine.dtype == (getattr(torch, dtype) if isinstance(dtype, str) else dtype)
            assert machine.why == {"device": "asked for", "dtype": "asked for"}


def test_an_asked_device_decides_the_format(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, gpus=1, gpu_bf16=True)
    assert choose("cpu").dtype == torch.float32
    assert choose("cuda").dtype == torch.bfloat16
    assert choose(dtype="float32").device == CUDA


@pytest.mark.parametrize(
    ("device", "dtype", "answer"),
    [
        ("tpu", None, r"device 'tpu' is unknown; allowed: cpu, cuda"),
        ("", None, r"device '' is unknown; allowed: cpu, cuda"),
        ("mps", None, r"device 'mps' is not supported; allowed: cpu, cuda"),
        ("meta", None, r"device 'meta' is not supported; allowed: cpu, cuda"),
        ("cuda:1", None, r"device 'cuda:1' is not on this machine, which has 1 GPUs"),
        (None, "float16", r"dtype 'float16' is not supported; allowed: float32, bfloat16"),
        (None, "int8", r"dtype 'int8' is not supported"),
        (None, torch.float64, r"dtype torch.float64 is not supported"),
    ],
)
def test_what_is_not_there_is_refused(device: Any, dtype: Any, answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And never replaced by something else."""
    pretend(monkeypatch, gpus=1)
    with pytest.raises(StylemuseError, match=f"^{answer}") as error:
        choose(device, dtype)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (HASWELL, {"AVX2"}),
        (SKYLAKE, {"AVX2", "AVX-512"}),
        (ICE_LAKE, {"AVX2", "AVX-512", "VNNI"}),
        (ALDER_LAKE, {"AVX2", "VNNI"}),
        (SAPPHIRE_RAPIDS, {"AVX2", "AVX-512", "VNNI", "AVX-512 BF16", "AMX"}),
        (GRAVITON3, {"NEON", "dot products", "BF16"}),
        ("AVX2 AVX512BW AVX512VNNI AVX512BF16", {"AVX2", "AVX-512", "VNNI", "AVX-512 BF16"}),  # as numpy writes them
    ],
)
def test_flags_are_named(flags: str, names: set[str]) -> None:
    assert cpu.named(flags.split()) == names


def test_the_system_tells_what_torch_sees(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = {
        name: getattr(torch.cpu, check)()
        for name, check in (
            ("AVX2", "_is_avx2_supported"),
            ("AVX-512", "_is_avx512_supported"),
            ("AVX-512 BF16", "_is_avx512_bf16_supported"),
        )
    }
    if platform.machine() not in ("x86_64", "AMD64"):
        assert cpu.features().isdisjoint(seen)
        return
    assert {name: name in cpu.features() for name in seen} == seen
    told = cpu.features()
    monkeypatch.setattr(cpu, "_INFO", tmp_path / "cpuinfo")
    cpu.features.cache_clear()
    assert cpu.features() - {"VNNI", "AMX"} == told - {"VNNI", "AMX"}, "numpy's answer, where there is no such file"
    (tmp_path / "cpuinfo").write_text("processor\t: 0\n")
    cpu.features.cache_clear()
    assert cpu.features() == frozenset()
    monkeypatch.undo()
    cpu.features.cache_clear()
