"""One decoding step as graph nodes around the network: rows, weighted sum, head, draw, score, re-masking.

The mirror of ``decoding.loop`` and ``kernels.sampling``: tokens in, tokens out. Only masked positions are read out,
scored and drawn. The noise is made here from seed, step and position, by the very function of ``kernels.philox``.

The codes of the head are kept in the order of Philox's words (all codes with code % 4 = 0, then 1, 2, 3), so that the
four words of each counter are whole blocks of columns and nothing has to be interleaved.
"""

from __future__ import annotations

import numpy as np

from ...kernels.philox import LARGEST_UNIFORM, WORD, philox4x32_words
from ...kernels.sampling import CONFIDENCE_STREAM, TOKEN_STREAM
from ..run.spec import Array
from .graph import Graph, Value

LANES = 4
"""Random words per counter."""


def word_order(codes: int) -> Array:
    """The codes in the order their noise is made: by code % 4, then ascending."""
    return np.concatenate([np.arange(lane, codes, LANES) for lane in range(LANES)])


class Places:
    """The masked positions of all pictures, M of them, and what their noise hangs on.

    `index` (M, 2) is (picture, position), `owner` and `position` its columns, (M,).
    """

    def __init__(self, graph: Graph, masked: Value, seeds: Value, steps: Value) -> None:
        found = graph.op("NonZero", masked, dtype=np.int64)
        self.index = found.transpose(1, 0)
        self.owner, self.position = (part.reshape(-1) for part in found.split(2, axis=0))
        key = self.per_place(seeds).cast(np.uint64)
        self._low, self._high = key & WORD, key >> 32
        self._step, self._position = self.per_place(steps).cast(np.uint64), self.position.cast(np.uint64)

    def per_place(self, values: Value) -> Value:
        """A value per picture -> a value per masked position."""
        return values.take(self.owner)

    def token_gumbel(self, codes: int) -> Value:
        """Noise of the token draw, (M, codes) fp32, in the order of `word_order`."""
        graph = self.position.graph
        blocks = graph.constant(np.arange(-(-codes // LANES)), np.uint64)
        column = (value.unsqueeze(1) for value in (self._step, self._position, self._low, self._high))
        step, position, low, high = column
        words = philox4x32_words(graph.constant(TOKEN_STREAM, np.uint64), step, position, blocks, low, high)
        lanes = []
        for lane, word in enumerate(words):
            count = len(range(lane, codes, LANES))
            lanes.append(word if count == -(-codes // LANES) else word.first(count, 1))
        return gumbel(graph.op("Concat", *(uniform(lane) for lane in lanes), axis=1))

    def position_gumbel(self) -> Value:
        """Noise of the confidence, (M,) fp32."""
        graph = self.position.graph
        stream, code = (graph.constant(number, np.uint64) for number in (CONFIDENCE_STREAM, 0))
        words = philox4x32_words(stream, self._step, self._position, code, self._low, self._high)
        return gumbel(uniform(words[0]))


def uniform(words: Value) -> Value:
    """Words, uint64 below 2^32, to fp32 strictly between 0 and 1, as ``kernels.philox.uniform``."""
    u = ((words >> 8).cast(np.float32) + 0.5) * 2.0**-24
    return u.graph.op("Min", u, u.graph.constant(LARGEST_UNIFORM, np.float32))


def gumbel(u: Value) -> Value:
    """-log(-log u)."""
    for _ in range(2):
        u = u.graph.op("Neg", u.graph.op("Log", u))
    return u


def guided(features: Value, places: Places, branches: Value, tokens: int | Value) -> Value:
    """Features (R, N, C) of the rows -> those of every branch at every masked position, (M, K, C)."""
    flat = features.reshape(-1, features.size(2))
    rows = branches.take(places.owner) * tokens + places.position.unsqueeze(1)
    return flat.take(rows)


def draw(
    logits: Value, places: Places, order: Array, token_temperature: Value, raw_logit: Value
) -> tuple[Value, Value]:
    """Logits (M, V) in the order of the words -> the codes drawn, (M,) int64, and their scores, (M,) fp32."""
    graph = logits.graph
    noise = places.token_gumbel(len(order)) * places.per_place(token_temperature).unsqueeze(1)
    chosen = graph.op("ArgMax", logits + noise, dtype=np.int64, axis=1, keepdims=1)
    likely = graph.op("LogSoftmax", logits, axis=1)
    scores = (graph.op("GatherElements", each, chosen, axis=1).reshape(-1) for each in (logits, likely))
    code = graph.weight("mlm_layer.codes", order.astype(np.int64)).take(chosen.reshape(-1))
    return code, graph.op("Where", places.per_place(raw_logit), *scores, dtype=np.float32)


def remask(scores: Value, places: Places, tokens: Value, masked: Value, choice_temperature: Value) -> Value:
    """Which positions (B, N) are masked again: the `masked` (B,) least confident of those that were drawn."""
    graph = tokens.graph
    confidence = scores + places.per_place(choice_temperature) * places.position_gumbel()
    shape = graph.op("Shape", tokens, dtype=np.int64)
    known = graph.op("Expand", graph.constant(np.inf, np.float32), shape)
    confidences = graph.op("ScatterND", known, places.index, confidence)
    # Sorted and stable: among equals the lower index comes first.
    _, order = graph.ops("TopK", confidences, tokens.size(1), outputs=2, dtype=np.int64, largest=0, sorted=1)
    ranks = graph.op("Range", graph.constant(0, np.int64), tokens.size(1).reshape(), graph.constant(1, np.int64))
    again = graph.op("Expand", ranks.less(masked.unsqueeze(1)), shape)
    nothing = graph.op("Expand", graph.constant(False, np.bool_), shape)
    return graph.op("ScatterElements", nothing, order, again, axis=1)
