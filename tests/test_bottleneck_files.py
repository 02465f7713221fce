"""adapters/bottleneck.py: StyleDrop-PyTorch's adapters, and bad ones refused with one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from stylemuse.adapters import bottleneck
from stylemuse.core import StylemuseError

WIDTH, LANES, LAYERS = 6, 3, 4
NECKS = {f"{side}_blocks.{index}.attn": WIDTH for side in ("in", "out") for index in range(LAYERS // 2)}


def styledrop(shared: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = 1 if shared else LAYERS
    tensors = {f"{name}.weight": torch.randn(rows, WIDTH * LANES, generator=generator) for name in ("WD", "WU")}
    if shared:
        tensors["DD.weight"] = torch.randn(LAYERS, LANES, generator=generator)
        tensors["DU.weight"] = torch.randn(LAYERS, WIDTH, generator=generator)
    return tensors


@pytest.mark.parametrize("shared", [False, True])
def test_styledrop_pytorch_adapters(tmp_path: Path, shared: bool) -> None:
    """Against the public code's own reshaping: every layer's matrices, then the layer's row."""
    file = tmp_path / "adapter.safetensors"
    tensors = styledrop(shared)
    save_file(tensors, file)
    adapter = bottleneck.read(file, name="neon", sites=NECKS)
    assert adapter.kind == "bottleneck"
    down = tensors["WD.weight"].reshape(-1, WIDTH, LANES).expand(LAYERS, -1, -1)
    up = tensors["WU.weight"].reshape(-1, LANES, WIDTH).expand(LAYERS, -1, -1)
    if shared:
        down = down + tensors["DD.weight"].reshape(LAYERS, 1, LANES)
        up = up + tensors["DU.weight"].reshape(LAYERS, 1, WIDTH)
    rows = {"in_blocks.0.attn": 0, "in_blocks.1.attn": 1, "out_blocks.0.attn": 2, "out_blocks.1.attn": 2}
    assert bottleneck.published_rows(LAYERS) == rows
    for site, row in rows.items():
        assert torch.equal(adapter.tensors[site][0], down[row])
        assert torch.equal(adapter.tensors[site][1], up[row])
    custom = bottleneck.read(file, name="neon", sites=NECKS, rows={"in_blocks.0.attn": 3})
    assert torch.equal(custom.tensors["in_blocks.0.attn"][1], up[3])


@pytest.mark.parametrize(
    ("sites", "change", "words"),
    [
        ({"transformer_layers.0.attn2": WIDTH}, {}, "another model; this one has transformer_layers.0.attn2"),
        (dict.fromkeys(NECKS, 5), {}, "rows of 18 do not fit a width of 5"),
        (dict.fromkeys(NECKS, 9), {}, "made for another model"),
        (NECKS, {"WX.weight": torch.ones(1, 1)}, "a StyleDrop adapter has"),
        (NECKS, {"WU.weight": torch.ones(4, 17)}, "made for another model"),
        (NECKS, {"WU.weight": torch.ones(5, 18)}, "another number of layers"),
        (NECKS, {"WU.weight": torch.ones(18)}, "must be a matrix"),
        (NECKS, {"DD.weight": torch.full((4, 3), torch.nan)}, "NaN or infinity"),
    ],
)
def test_bottlenecks_of_other_models_are_refused(
    tmp_path: Path, sites: dict[str, int], change: dict[str, Tensor], words: str
) -> None:
    shared = "DD.weight" in change or 9 in sites.values()
    save_file(styledrop(shared) | change, tmp_path / "a.safetensors")
    with pytest.raises(StylemuseError, match=words):
        bottleneck.read(tmp_path / "a.safetensors", name="neon", sites=sites)


def test_styledrop_pickles_are_refused(tmp_path: Path) -> None:
    torch.save(styledrop(False), tmp_path / "adapter.pth")
    with pytest.raises(StylemuseError, match="is a pickle"):
        bottleneck.read(tmp_path / "adapter.pth", name="neon", sites=NECKS)
