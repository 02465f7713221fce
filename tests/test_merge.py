"""adapters/merge.py: the merged weight is what the low-rank pair computes, and the input stays pristine."""

from __future__ import annotations

import pytest
import torch

from stylemuse.adapters.canonical import Adapter
from stylemuse.adapters.merge import merged
from stylemuse.core import StylemuseError


def adapter(site: str = "layer.to_q", inputs: int = 5, outputs: int = 7) -> Adapter:
    return Adapter("ink", "lora", {site: (torch.randn(2, inputs), torch.randn(outputs, 2))})


def test_merged_weight_computes_what_the_pair_does() -> None:
    torch.manual_seed(0)
    weights = {"layer.to_q.weight": torch.randn(7, 5), "layer.norm.weight": torch.randn(5)}
    pristine = {name: tensor.clone() for name, tensor in weights.items()}
    ink = adapter()
    result = merged(weights, ink, 0.7)
    x = torch.randn(3, 5)
    down, up = ink.tensors["layer.to_q"]
    expected = x @ weights["layer.to_q.weight"].T + 0.7 * (x @ down.T) @ up.T
    torch.testing.assert_close(x @ result["layer.to_q.weight"].T, expected)
    assert all(torch.equal(weights[name], pristine[name]) for name in weights)
    assert result["layer.norm.weight"] is weights["layer.norm.weight"]


def test_zero_scale_is_base_and_half_weights_merge_in_fp32() -> None:
    weights = {"layer.to_q.weight": torch.randn(7, 5).bfloat16()}
    result = merged(weights, adapter(), 0.0)["layer.to_q.weight"]
    assert result.dtype == torch.float32
    assert torch.equal(result, weights["layer.to_q.weight"].float())


def test_bottlenecks_and_other_models_are_refused() -> None:
    weights = {"layer.to_q.weight": torch.randn(7, 5)}
    neck = Adapter("neon", "bottleneck", {"layer": (torch.randn(5, 2), torch.randn(2, 5))})
    with pytest.raises(StylemuseError, match="not linear"):
        merged(weights, neck, 1.0)
    with pytest.raises(StylemuseError, match=r"there is no other\.weight"):
        merged(weights, adapter("other"), 1.0)
    with pytest.raises(StylemuseError, match="belongs to another model"):
        merged(weights, adapter(inputs=6), 1.0)
