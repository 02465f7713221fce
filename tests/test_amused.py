"""The transformer against diffusers UVit2DModel, and the exactness of everything computed once or left out."""

from __future__ import annotations

import pytest
import torch
from peers import text_inputs, transformers

from stylemuse.core import StylemuseError
from stylemuse.models.amused import AmusedConfig

VARIANTS = {
    "plain": ({}, (5, 7)),
    "equal widths": ({"hidden_size": 36, "num_attention_heads": 6}, (1, 3)),
    "halved": ({"downsample": True, "upsample": True}, (6, 10)),
    "no conv blocks": ({"num_res_blocks": 0}, (4, 4)),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("length", [1, 7, 77])
@torch.no_grad()
def test_logits_are_diffusers(variant: str, length: int) -> None:
    changes, grid = VARIANTS[variant]
    peer, ours = transformers(**changes)
    inputs = text_inputs(ours.config, 3, length)
    tokens = torch.randint(0, ours.config.vocab_size, (3, *grid), generator=torch.Generator().manual_seed(1))
    expected = peer(tokens, inputs["text"], inputs["pooled"], inputs["micro"])
    features = ours.features(tokens, ours.condition(**inputs))
    logits = ours.logits(ours.readout(features.flatten(0, 1))).view(3, *grid, -1).permute(0, 3, 1, 2)
    assert expected.std() > 0.1
    assert (logits - expected).abs().max() <= 1e-4


@torch.no_grad()
def test_embedding_table_is_exact() -> None:
    _, ours = transformers()
    tokens = torch.arange(ours.config.vocab_size)[None]
    with_table = ours.embed(tokens)
    ours.embed.train()
    assert torch.equal(ours.embed(tokens), with_table)


@torch.no_grad()
def test_head_commutes_with_the_weighted_sum() -> None:
    _, ours = transformers()
    hidden = ours.readout(torch.randn(3, 11, 36, generator=torch.Generator().manual_seed(0)))
    weights = torch.tensor([3.0, 3.0, -5.0])
    apart = torch.einsum("b,bmk->mk", weights, ours.logits(hidden.flatten(0, 1)).view(3, 11, -1))
    together = ours.logits(torch.einsum("b,bmd->md", weights, hidden))
    assert (apart - together).abs().max() <= 2e-5 * apart.abs().max()


@torch.no_grad()
def test_readout_of_chosen_positions_is_that_of_all() -> None:
    _, ours = transformers()
    features = torch.randn(35, 36, generator=torch.Generator().manual_seed(0))
    chosen = torch.tensor([0, 3, 34])
    assert (ours.readout(features)[chosen] - ours.readout(features[chosen])).abs().max() <= 1e-6


def test_sites_cover_the_checkpoint() -> None:
    peer, ours = transformers()
    linear = {name: module for name, module in peer.named_modules() if isinstance(module, torch.nn.Linear)}
    sites = ours.config.sites()
    assert set(sites) < set(linear)
    assert {name for name in linear if name.endswith(("to_q", "to_k", "to_v", "to_out.0"))} <= set(sites)
    groups = {name for name, _ in ours.named_modules()}
    for name, site in sites.items():
        assert (site.inputs, site.outputs) == (linear[name].in_features, linear[name].out_features)
        assert site.group in groups


def test_full_size_parameter_counts() -> None:
    from stylemuse.models.amused import Amused

    with torch.device("meta"):
        small = Amused(AmusedConfig())
        large = Amused(AmusedConfig(downsample=True, upsample=True, sample_size=32))
    assert sum(p.numel() for p in small.parameters()) == 603_537_664
    assert sum(p.numel() for p in large.parameters()) == 608_257_792
    lora = [site for name, site in AmusedConfig().sites().items() if name.endswith(("to_q", "to_k", "to_v"))]
    assert len(lora) == 168
    assert sum(16 * (site.inputs + site.outputs) for site in lora) == 5_210_112


@pytest.mark.parametrize("changes", [{"use_bias": True}, {"ln_elementwise_affine": False}, {"downsample": True}])
def test_unsupported_configs_are_named(changes: dict[str, bool]) -> None:
    with pytest.raises(StylemuseError, match=next(iter(changes))):
        AmusedConfig.from_dict(changes)
