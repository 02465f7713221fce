"""The cost card: its parameters are the network's, its FLOP those that torch counts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from stylemuse.bench.step import cost
from stylemuse.models.amused import Amused, AmusedConfig

ODD = AmusedConfig(
    hidden_size=24, cond_embed_dim=10, micro_cond_encode_dim=4, micro_cond_embed_dim=20, encoder_hidden_size=14,
    vocab_size=31, codebook_size=30, in_channels=12, block_out_channels=16, num_res_blocks=2, block_num_heads=2,
    num_hidden_layers=3, num_attention_heads=4, intermediate_size=20, sample_size=6,
)  # fmt: skip
CONFIGS = [ODD, replace(ODD, downsample=True, upsample=True), replace(ODD, block_out_channels=24, in_channels=24)]


@pytest.mark.parametrize("config", CONFIGS, ids=["whole", "halved", "one width"])
def test_every_parameter_is_in_one_part(config: AmusedConfig) -> None:
    network = Amused(config)
    assert sum(cost.total(config, (6, 6), 5).values()) == sum(value.numel() for value in network.parameters())


@pytest.mark.parametrize("size", ["amused-256", "amused-512"])
def test_published_sizes(size: str) -> None:
    """603,537,664 and 608,257,792 parameters; at 256 pixels a row is 203 GFLOP, and a step reads 380 M of them."""
    halved = size == "amused-512"
    config, grid = AmusedConfig(downsample=halved, upsample=halved), (32, 32) if halved else (16, 16)
    assert sum(cost.total(config, grid, 77).values()) == (608_257_792 if halved else 603_537_664)
    made = cost.card(config, grid, 77, pictures=1, branches=1, masked=grid[0] * grid[1])
    if not halved:
        assert made.flop == 202_810_589_184
        assert made.parameters == 379_812_352
        assert made.constant_parameters == 216_794_112


@torch.no_grad()
@pytest.mark.parametrize("config", CONFIGS, ids=["whole", "halved", "one width"])
def test_flop_are_those_torch_counts(config: AmusedConfig) -> None:
    network, rows, text = Amused(config).rest(), 3, 5
    condition = torch.randn(rows, text, 14), torch.randn(rows, 10), torch.ones(rows, 5)
    with FlopCounterMode(display=False) as request:
        conditioning = network.condition(*condition)
    tokens, masked = torch.zeros(rows, 6, 6, dtype=torch.int64), 7
    # The counter knows no fused attention of the CPU.
    with FlopCounterMode(display=False) as step, sdpa_kernel(SDPBackend.MATH):
        features = network.features(tokens, conditioning)
        hidden = network.readout(features[:, :masked].flatten(0, 1))
        network.logits(hidden[:masked])  # the branches of one picture, combined
    made = cost.card(config, (6, 6), text, pictures=1, branches=rows, masked=masked)
    assert step.get_total_flops() == made.flop
    once = sum(part.flop for part in cost.parts(config, (6, 6), text) if part.when == "request")
    assert request.get_total_flops() == rows * once


def test_adapters_cost_what_their_rank_says() -> None:
    card = cost.card(ODD, (6, 6), 5, pictures=2, branches=3, masked=9, rank=4, adapted=1)
    layers = ODD.num_hidden_layers * (3 + 1) * (24 + 24)  # q, k, v of self-attention and q of the text's
    blocks = 2 * ODD.num_res_blocks * 2 * (16 + 16)
    assert card.adapter_flop == 2 * 2 * 36 * 4 * (layers + blocks)
    assert card.rows == 6


def test_the_floor_is_the_slower_of_both() -> None:
    card = cost.card(ODD, (6, 6), 5, pictures=1, branches=1, masked=36, width=2)
    by_memory = card.floor(1e15, 1e6)
    assert by_memory["floor"] == by_memory["memory"] == card.bytes / 1e6
    assert card.floor(1e6, 1e15)["floor"] == card.flop / 1e6
