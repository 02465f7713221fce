"""A style merged into the weights draws what the style draws as an adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import stylemuse as sm
from stylemuse.export.merged import write_merged


@pytest.fixture
def pipe(tiny_model: Path) -> sm.Pipeline:
    return sm.load(str(tiny_model), dtype="float32")


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_merged_folder_computes_what_the_adapter_does(pipe: sm.Pipeline, tmp_path: Path, strength: float) -> None:
    network, slot = pipe.network, pipe.adapters.bank.slot("ink")
    alone = sm.load(str(write_merged(pipe, "ink", tmp_path / "merged", strength=strength)), dtype="float32")
    tokens = torch.randint(0, network.mask_id + 1, (1, 64), generator=torch.Generator().manual_seed(0))
    text = network.text("a fox in ink style")
    adapted = network.features(tokens, [network.context(text, (8, 8), slot, strength)])
    folded = alone.network.features(tokens, [alone.network.context(text, (8, 8))])
    base = network.features(tokens, [network.context(text, (8, 8))])
    assert (adapted - base).abs().max() > 100 * (adapted - folded).abs().max()
    assert (adapted - folded).abs().max() <= 1e-5 * adapted.abs().max()
    assert alone.adapters.names == ()


def test_a_folder_with_content_is_refused(pipe: sm.Pipeline, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("")
    with pytest.raises(sm.StylemuseError, match="not empty"):
        write_merged(pipe, "ink", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_unknown_style_leaves_nothing(pipe: sm.Pipeline, tmp_path: Path) -> None:
    with pytest.raises(sm.StylemuseError, match="allowed are ink, neon"):
        write_merged(pipe, "oil", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
