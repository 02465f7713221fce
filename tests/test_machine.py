"""What is computed on: taken as asked or refused, else chosen by what the machine has, with the reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stylemuse import StylemuseError
from stylemuse.machine import choose, cpu_has_bf16

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def pretend(patch: pytest.MonkeyPatch, *, gpus: int = 0, gpu_bf16: bool = False, cpu_bf16: bool = False) -> None:
    """Let torch see so many GPUs, and GPUs and a CPU that multiply bf16 or don't."""
    patch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    patch.setattr(torch.cuda, "device_count", lambda: gpus)
    patch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: gpu_bf16 or including_emulation)
    patch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: cpu_bf16, raising=False)
    patch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: cpu_bf16, raising=False)


@pytest.mark.parametrize(
    ("hardware", "device", "dtype", "reasons"),
    [
        ({}, CPU, torch.float32, ("no GPU is there", "this CPU has no bf16 instructions")),
        ({"cpu_bf16": True}, CPU, torch.bfloat16, ("no GPU is there", "this CPU has bf16 instructions")),
        ({"gpus": 1, "gpu_bf16": True}, CUDA, torch.bfloat16, ("a GPU is there", "this GPU has bf16 tensor cores")),
        ({"gpus": 1, "cpu_bf16": True}, CUDA, torch.float32, ("a GPU is there", "this GPU has no bf16 tensor cores")),
    ],
    ids=["old CPU", "new CPU", "new GPU", "old GPU"],
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


def test_torch_tells_whether_the_cpu_has_bf16() -> None:
    """The names are private ones of torch; here one of them at least must exist, or bf16 would never be chosen."""
    assert isinstance(cpu_has_bf16(), bool)
    assert any(hasattr(torch.cpu, name) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
