"""adapters/files.py: tensors are read as safetensors reads them, and leave nothing behind."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from stylemuse.adapters.files import NUMBERS, open_tensors

SHAPES: tuple[tuple[int, ...], ...] = ((), (1,), (0, 3), (5,), (300, 7), (2, 3, 401))


def _written(folder: Path) -> Path:
    path, random = folder / "numbers.safetensors", torch.Generator().manual_seed(0)
    tensors = {
        f"{kind} {shape}": (torch.randn(shape, generator=random) * 100).to(dtype)
        for kind, dtype in NUMBERS.items()
        for shape in SHAPES
    }
    save_file(tensors, path, {"made": "here"})
    return path


def test_tensors_and_metadata_are_those_of_safetensors(tmp_path: Path) -> None:
    path = _written(tmp_path)
    expected = load_file(path)
    with open_tensors(path) as file:
        assert file.metadata == {"made": "here"}
        assert file.names == tuple(sorted(expected))
        for key, tensor in expected.items():
            found = file.read(key)
            assert found.dtype == tensor.dtype
            assert found.shape == tensor.shape == file.shape(key)
            assert torch.equal(found, tensor)


def test_reading_a_thousand_tensors_leaves_nothing_behind(tmp_path: Path) -> None:
    path = _written(tmp_path)

    def left(times: int) -> int:
        for _ in range(times):
            with open_tensors(path) as file:
                for key in file.names:
                    file.read(key)
        gc.collect()
        return sys.getallocatedblocks()

    before = left(3)
    assert left(30) - before < 100
