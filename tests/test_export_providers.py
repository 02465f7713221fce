"""Where the graphs run: chosen by what is there, refused by name where it is not, and told."""

from __future__ import annotations

import pytest

import stylemuse as sm
from stylemuse.export.run import ort

CPU, CUDA, TENSORRT = (f"{name}ExecutionProvider" for name in ("CPU", "CUDA", "Tensorrt"))


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    providers, gpu = request.param
    monkeypatch.setattr(ort.onnxruntime, "get_available_providers", lambda: providers)
    monkeypatch.setattr(ort, "_sees_gpu", lambda: gpu)


ALL, NO_GPU = ([TENSORRT, CUDA, CPU], True), ([TENSORRT, CUDA, CPU], False)
NO_CUDA, NO_TENSORRT = ([CPU], True), ([CUDA, CPU], True)


@pytest.mark.parametrize(
    ("there", "device", "inputs", "names"),
    [
        (ALL, None, "cuda", (CUDA, CPU)),
        (ALL, "cuda", "cuda", (CUDA, CPU)),
        (ALL, "tensorrt", "cuda", (TENSORRT, CUDA, CPU)),
        (ALL, "cpu", "cpu", (CPU,)),
        (NO_GPU, None, "cpu", (CPU,)),
        (NO_CUDA, None, "cpu", (CPU,)),
        (NO_TENSORRT, None, "cuda", (CUDA, CPU)),
    ],
    indirect=["there"],
)
def test_choice(there: None, device: str | None, inputs: str, names: tuple[str, ...]) -> None:
    chosen = ort.choose_provider(device)
    assert (chosen.device, chosen.names) == (inputs, names)
    assert (chosen.why == "asked for") is (device is not None)


@pytest.mark.parametrize(
    ("there", "device", "words"),
    [
        (NO_GPU, "cuda", f"sees no GPU, or is without {CUDA}"),
        (NO_CUDA, "cuda", CUDA),
        (NO_TENSORRT, "tensorrt", TENSORRT),
        (ALL, "mps", "allowed: cpu, cuda, tensorrt"),
    ],
    indirect=["there"],
)
def test_what_is_not_there_is_refused(there: None, device: str, words: str) -> None:
    with pytest.raises(sm.StylemuseError, match=words):
        ort.choose_provider(device)
