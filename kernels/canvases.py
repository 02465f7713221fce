"""A batch of pictures being decoded, as tensors at fixed addresses: what the sampling kernels read and write.

B pictures of N positions, up to K branches each, T steps, R rows of the network. A picture's numbers are read at its
own step, so pictures at different steps, of different schedules, guidance and numbers of branches share a batch;
shorter schedules fill only the front of theirs. A picture without masked positions is finished, or an empty place:
nothing of it is read or written.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Schedules:
    """The numbers of every step of every picture.

    Attributes:
        masked_after: (B, T) int32, positions still masked after the step.
        token_temperature, choice_temperature: (B, T) fp32, what multiplies the noise of token and confidence.
        weights: (B, T, K) fp32 of the branches; a branch of weight 0 is not read.
        raw_logit: (B,) bool, True scores by the raw logit, False by the log-probability.
    """

    masked_after: Tensor
    token_temperature: Tensor
    choice_temperature: Tensor
    weights: Tensor
    raw_logit: Tensor


@dataclass(frozen=True)
class Canvases:
    """Where every picture stands; a decoding step changes all but seeds and rows.

    Attributes:
        seeds: (B,) int64.
        rows: (B, K) int32, the network's row of each branch, below 0 where there is none.
        steps: (B,) int32, steps done.
        counts: (B,) int32, positions masked now.
        places: (B, N) int32, the masked positions, ascending; what comes after the first ``counts`` is never read.
        tokens: (B, N) int64 codes; at masked positions the last draw, a preview that the network never sees.
        inputs: (R, N) int64, what the network sees in each row: the tokens, masked ones replaced by the mask token.
    """

    seeds: Tensor
    rows: Tensor
    steps: Tensor
    counts: Tensor
    places: Tensor
    tokens: Tensor
    inputs: Tensor
