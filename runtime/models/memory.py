"""What a row of a forward pass takes at its peak, from the sizes of the network.

Per row of N tokens, in bytes of the network's format b unless said otherwise, with width D, conv width C, K codes:

    streams   4 N max(C, D)                          the residual stream, its norm and what is added to them
    widest    max(3 N 4C, 4 N inner)                 ConvNeXt and its norm; the gated MLP; or, where more, the
              N (2 C b + 12 C + K (4 + b)) / b       head: features, hidden states in fp32, logits in fp32 and b
    context   contexts x its tensors                 the row's own, and those that are kept beside it
"""

from __future__ import annotations

import torch

from .amused import AmusedConfig


def row_bytes(config: AmusedConfig, text_length: int, dtype: torch.dtype, contexts: int) -> int:
    """The peak memory of one row of the model's own picture size, with so many contexts."""
    tokens, width, conv, b = config.sample_size**2, config.hidden_size, config.block_out_channels, dtype.itemsize
    working = tokens // 4 if config.downsample else tokens
    streams = 4 * tokens * max(conv, width) * b
    channels = config.in_channels
    head = tokens * (2 * conv * b + 12 * channels + config.codebook_size * (4 + b))
    widest = max(12 * working * conv * b, 4 * working * config.intermediate_size * b, head)
    keys = 2 * text_length * (config.num_hidden_layers * width + 4 * config.num_res_blocks * conv)
    scales = 2 * (3 * config.num_hidden_layers * width + 2 * config.num_res_blocks * conv)
    return streams + widest + contexts * (keys + scales) * b
