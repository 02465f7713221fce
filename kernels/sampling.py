"""The sampling operations of masked decoding: draw a token per masked position, score it, choose what is masked again.

With logits l of one position and standard Gumbel noise g, g' (independent, counter-based, see ``philox``):

    token       c = argmax_v (l_v + tau * g_v)          Gumbel-max: categorical(softmax(l / tau)); tau = 0 is greedy
    score       s = l_c - log sum_v exp(l_v)            log-probability at temperature 1 (MaskGIT, aMUSEd), or
                s = l_c                                 the raw logit (StyleDrop-PyTorch)
    confidence  s + tau_c * g'                          known tokens: +inf
    masked      the n least confident positions, exactly n, ties by lowest index

Randomness: the key is the picture's 64-bit seed, the counter (stream, step, position, code // 4), the word code % 4.
Stream 0 is the token draw, stream 1 the confidence draw (code 0). Rows of different pictures mix freely in one call:
every row has its own seed, step, position and temperature, and its result doesn't depend on the rows beside it.

Everything is fp32: in fp16 the guard of a known token's confidence rounds to zero and known tokens get masked again.

Source: Chang et al., "MaskGIT", CVPR 2022, section 3.2; StyleDrop, arXiv 2306.00983; Philox as in ``philox``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stylemuse.kernels.philox import gumbel, philox4x32_words, split_seed, uniform

TOKEN_STREAM, CONFIDENCE_STREAM = 0, 1

# Logits handled at a time, so that Philox's int64 temporaries (a quarter as many, 8 bytes each) stay in the L2 cache.
# draw() for 256 x 8192 on one EPYC core with 512 KiB of L2, for 2^15 .. 2^21: 69, 49, 39, 34, 33, 42, 48 ms.
CHUNK = 2**18


def token_gumbel(codes: int, seeds: Tensor, steps: Tensor, positions: Tensor) -> Tensor:
    """Noise g of the token draw: (M, codes) fp32 for seeds, steps, positions (M,) int64."""
    blocks = torch.arange((codes + 3) // 4, device=seeds.device)
    low, high = split_seed(seeds[:, None])
    stream = torch.full_like(low, TOKEN_STREAM)
    words = philox4x32_words(stream, steps[:, None], positions[:, None], blocks, low, high)
    u = torch.empty(len(seeds), len(blocks), 4, device=seeds.device)
    for lane, word in enumerate(words):
        u[..., lane] = uniform(word)
    return gumbel(u.flatten(1))[:, :codes]


def position_gumbel(seeds: Tensor, steps: Tensor, positions: Tensor) -> Tensor:
    """Noise g' of the confidence draw: (M,) fp32 for seeds, steps, positions (M,) int64."""
    low, high = split_seed(seeds)
    stream, code = torch.full_like(seeds, CONFIDENCE_STREAM), torch.zeros_like(seeds)
    return gumbel(uniform(philox4x32_words(stream, steps, positions, code, low, high)[0]))


def draw(
    logits: Tensor, seeds: Tensor, steps: Tensor, positions: Tensor, token_temperature: Tensor, raw_logit: Tensor
) -> tuple[Tensor, Tensor]:
    """Draw one token per row and score it.

    Args:
        logits: (M, V) fp32.
        seeds, steps, positions: (M,) int64; the row's picture, its decoding step and its place in the grid.
        token_temperature: (M,) fp32, tau; 0 is greedy.
        raw_logit: (M,) bool; True scores by the raw logit, False by the log-probability.

    Returns:
        tokens (M,) int64 and scores (M,) fp32.
    """
    assert logits.dtype == torch.float32, "sampling is fp32"
    rows, codes = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    scores = torch.empty(rows, device=logits.device)
    chunk = max(1, CHUNK // codes)
    for start in range(0, rows, chunk):
        part = slice(start, start + chunk)
        noise = token_gumbel(codes, seeds[part], steps[part], positions[part])
        tokens[part] = noise.mul_(token_temperature[part, None]).add_(logits[part]).argmax(-1)
        scores[part] = _score(logits[part], tokens[part], raw_logit[part])
    return tokens, scores


def _score(logits: Tensor, tokens: Tensor, raw_logit: Tensor) -> Tensor:
    # log_softmax, not logsumexp: it sums each row in one fixed order; a plain sum may split by the number of rows.
    chosen = tokens[:, None]
    log_probability = logits.log_softmax(-1).gather(1, chosen)
    return torch.where(raw_logit[:, None], logits.gather(1, chosen), log_probability)[:, 0]


def confidence(scores: Tensor, seeds: Tensor, steps: Tensor, positions: Tensor, choice_temperature: Tensor) -> Tensor:
    """scores + choice_temperature * g', all (M,); an infinite score stays infinite."""
    return scores + choice_temperature * position_gumbel(seeds, steps, positions)


def remask(confidences: Tensor, masked: Tensor) -> Tensor:
    """The positions to mask again: the least confident ones of each grid.

    Args:
        confidences: (..., N) fp32; +inf at known tokens.
        masked: (...,) int64; how many to mask, at most the number of finite confidences.

    Returns:
        (..., N) bool, exactly ``masked`` of them True; ties go to the lowest index.
    """
    order = confidences.argsort(dim=-1, stable=True)
    least = torch.arange(confidences.shape[-1], device=confidences.device) < masked[..., None]
    return torch.zeros_like(order, dtype=torch.bool).scatter(-1, order, least.expand_as(order))
