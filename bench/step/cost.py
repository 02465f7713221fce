"""The cost card: what a decoding step takes on paper, and the least time that machine rates allow for it.

    floor = max(FLOP / (FLOP per second), bytes / (bytes per second))

A multiply and an add are two FLOP. A *row* is one branch of one picture: N tokens, of which the layers see n (a quarter
of them where the network halves its grid). Bytes are the weights, read once a step however many rows share them;
activations stay in caches on small batches and are left out, so the floor is a floor. What depends on the prompt alone
(`request`) is not in a step. Peer of the FLOP: torch's ``FlopCounterMode`` on the running network.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stylemuse.models.amused import AmusedConfig


@dataclass(frozen=True)
class Part:
    """A layer or a group of them. ``flop`` is per row in a step, per prompt in a request."""

    name: str
    when: str  # "step", "request" or "load"
    flop: int
    parameters: int


@dataclass(frozen=True)
class Card:
    """What a step costs on paper: of `rows` rows at ``masked`` masked positions in each picture."""

    rows: int
    pictures: int
    flop: int
    adapter_flop: int
    parameters: int
    constant_parameters: int
    bytes: int

    def floor(self, flop_rate: float, byte_rate: float) -> dict[str, float]:
        """Seconds: of the arithmetic, of the memory, and the larger of both."""
        compute, memory = (self.flop + self.adapter_flop) / flop_rate, self.bytes / byte_rate
        return {"compute": compute, "memory": memory, "floor": max(compute, memory)}

    def to_dict(self) -> dict[str, Any]:
        """For a document."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def parts(config: AmusedConfig, grid: tuple[int, int], text: int) -> list[Part]:
    """Every parameter of the transformer but the head's in one part; ``text`` is a prompt's length in tokens."""
    c, d, inner, embedded = config.block_out_channels, config.hidden_size, config.intermediate_size, config.in_channels
    n = _working(config, grid)
    stages, layers, resamples = 2 * config.num_res_blocks, config.num_hidden_layers, config.downsample + config.upsample
    condition = config.micro_cond_embed_dim + config.cond_embed_dim
    scales = stages * 2 * c * d + layers * 6 * d * d
    keys = stages * ((c * d if c != d else 0) + 4 * c * c) + layers * 2 * d * d
    text_in = config.encoder_hidden_size * d

    def linear(name: str, weights: int, vectors: int, mixing: int = 0) -> Part:
        """Matrices applied at n positions, vectors beside them, and FLOP of products without weights."""
        return Part(name, "step", 2 * n * weights + mixing, weights + vectors)

    return [
        Part("embedding", "load", 0, config.vocab_size * embedded + embedded * (1 + c)),
        linear("resample", resamples * 4 * c * c, resamples * c),
        linear("conv blocks", stages * (9 * c + 8 * c * c), stages * 9 * c),
        linear("text blocks", stages * 4 * c * c, stages * 2 * c, stages * 2 * 4 * n * text * c),
        linear("in and out", 2 * c * d, c + d),
        linear("self-attention", layers * 4 * d * d, layers * d, layers * 4 * n * n * d),
        linear("text attention", layers * 2 * d * d, layers * d, layers * 4 * n * text * d),
        linear("MLP", layers * 3 * d * inner, layers * d),
        Part("text projection", "request", 2 * text * text_in, text_in + d),
        Part("condition", "request", 2 * (condition * d + d * d), condition * d + d * d),
        Part("scales and shifts", "request", 2 * scales, scales),
        Part("keys and values", "request", 2 * text * keys, keys),
    ]


def head(config: AmusedConfig) -> tuple[int, int, int]:
    """(FLOP of a masked position in every branch, FLOP of a masked position once, parameters)."""
    each, once = config.block_out_channels * config.in_channels, config.in_channels * config.codebook_size
    return 2 * each, 2 * once, each + config.in_channels + once


def card(
    config: AmusedConfig,
    grid: tuple[int, int],
    text: int,
    *,
    pictures: int,
    branches: int,
    masked: int,
    rank: int = 0,
    adapted: int = 0,
    width: int = 4,
) -> Card:
    """The card of one step.

    Args:
        pictures, branches: rows are their product.
        masked: masked positions of a picture.
        rank, adapted: of the adapters on the attention projections, and how many of a picture's branches have one.
        width: bytes of a weight.
    """
    made, rows = parts(config, grid, text), pictures * branches
    step = [part for part in made if part.when == "step"]
    each, once, head_parameters = head(config)
    # Keys and values of the text are made once a request, with their adapter.
    sites = [
        site
        for name, site in config.sites().items()
        if name.endswith("to_q") or (name.endswith(("to_k", "to_v")) and site.parts == 3)
    ]
    widths = sum(site.inputs + site.outputs for site in sites)
    parameters = sum(part.parameters for part in step) + head_parameters
    looked_up = min(config.vocab_size, rows * grid[0] * grid[1]) * config.block_out_channels
    return Card(
        rows=rows,
        pictures=pictures,
        flop=rows * sum(part.flop for part in step) + pictures * masked * (branches * each + once),
        adapter_flop=pictures * adapted * 2 * _working(config, grid) * rank * widths,
        parameters=parameters,
        constant_parameters=sum(part.parameters for part in made if part.when == "request"),
        bytes=width * (parameters + looked_up),
    )


def total(config: AmusedConfig, grid: tuple[int, int], text: int) -> Mapping[str, int]:
    """Parameters by part, the head's among them; together they are the network's."""
    return {part.name: part.parameters for part in parts(config, grid, text)} | {"head": head(config)[2]}


def _working(config: AmusedConfig, grid: tuple[int, int]) -> int:
    """Positions that the layers see."""
    return grid[0] * grid[1] // (4 if config.downsample else 1)
