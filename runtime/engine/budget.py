"""How many rows a forward pass may have: what a row takes at its peak, from the sizes of the network.

Per row of N tokens, in bytes of the network's format b unless said otherwise, with width D, conv width C, K codes:

    streams   4 N max(C, D)                          the residual stream, its norm and what is added to them
    widest    max(3 N 4C, 4 N inner)                 ConvNeXt and its norm; the gated MLP; or, where more, the
              N (2 C b + 12 C + K (4 + b)) / b       head: features, hidden states in fp32, logits in fp32 and b
    context   (2 + AHEAD) x its tensors              one of the running row, one stacked, those prepared ahead; with
                                                     buckets one for each that is kept, in place of the one stacked

The draw's noise is made a chunk at a time and takes the same for any number of rows.
"""

from __future__ import annotations

import torch

from ..core import StylemuseError
from ..decoding.buckets import KEPT
from ..kernels.dispatch import STEP
from ..kernels.sampling import CHUNK
from ..models.amused import AmusedConfig
from ..network import TorchNetwork
from .batcher import AHEAD

NOISE_BYTES = 32 * CHUNK
"""Philox's words of a chunk in int64 and what is made of them."""


def row_bytes(config: AmusedConfig, text_length: int, dtype: torch.dtype, stacked: int = 1) -> int:
    """The peak memory of one row of the model's own picture size; ``stacked`` contexts beside its own and the next."""
    tokens, width, conv, b = config.sample_size**2, config.hidden_size, config.block_out_channels, dtype.itemsize
    working = tokens // 4 if config.downsample else tokens
    streams = 4 * tokens * max(conv, width) * b
    channels = config.in_channels
    head = tokens * (2 * conv * b + 12 * channels + config.codebook_size * (4 + b))
    widest = max(12 * working * conv * b, 4 * working * config.intermediate_size * b, head)
    keys = 2 * text_length * (config.num_hidden_layers * width + 4 * config.num_res_blocks * conv)
    scales = 2 * (3 * config.num_hidden_layers * width + 2 * config.num_res_blocks * conv)
    return streams + widest + (1 + AHEAD + stacked) * (keys + scales) * b


def rows_within(memory: int, network: TorchNetwork) -> int:
    """Rows that fit; at least one branch must, or the budget is refused."""
    if network.name == "onnx":
        raise StylemuseError("memory is a budget for networks in torch; give max_rows for backend 'onnx'")
    config, text = network.transformer.config, network.text_encoder.config.max_position_embeddings
    each = row_bytes(config, text, network.dtype, KEPT if STEP in network.kernels.triton else 1)
    if memory < NOISE_BYTES + each:
        raise StylemuseError(f"memory = {memory:,} bytes is not enough: one row takes {NOISE_BYTES + each:,}")
    return (memory - NOISE_BYTES) // each
