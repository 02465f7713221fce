"""A row's conditioning in one piece of memory, and made by few launches.

`Layout` says where the blocks' tensors lie in it, so that it is kept, copied and seated as one. `SideBySide` makes it
where launches cost: all scales and shifts come from one vector, so the 72 matrices of amused-256 are one product when
they lie side by side in memory, and so are the keys and values that the transformer layers take of the text.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import cast

import torch
from torch import Tensor, nn

from ..kernels.linear import linear
from ..kernels.rows import RowAdapters
from .amused import Amused
from .layers import Conditioning, Mapper, TransformerLayer


@dataclass(frozen=True)
class Layout:
    """Where the tensors of the blocks lie in a row's numbers: name and shape of each, one after the other."""

    shapes: tuple[tuple[str, tuple[int, ...]], ...]

    @classmethod
    def of(cls, conditioning: Conditioning) -> Layout:
        """That of tensors (R, ...) by block name, in their order."""
        return cls(tuple((name, tuple(value.shape[1:])) for name, value in conditioning.items()))

    def pack(self, conditioning: Conditioning) -> Tensor:
        """Tensors (R, ...), all of one number format -> (R, T)."""
        return torch.cat([conditioning[name].flatten(1) for name, _ in self.shapes], dim=1)

    def views(self, packed: Tensor) -> Conditioning:
        """(R, T) -> the tensors (R, ...) in it, by block name; their rows are T numbers apart."""
        return dict(self._views(packed))

    def _views(self, packed: Tensor) -> Iterator[tuple[str, Tensor]]:
        first = 0
        for name, shape in self.shapes:
            size = math.prod(shape)
            yield name, packed[:, first : first + size].unflatten(1, shape)
            first += size


class Stack:
    """Weights (out, in) of several layers that read the same, side by side in memory.

    They stay the layers' parameters, each a slice from here on, and nothing is there twice. A parameter that is given
    other memory (by ``to``, say) leaves the stack, which is of no use then: see `whole`.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = tuple(parameters)
        self.weight = torch.cat([each.detach() for each in self._parameters])
        for each, part in zip(
            self._parameters, self.weight.split([len(each) for each in self._parameters]), strict=True
        ):
            each.data = part

    @property
    def whole(self) -> bool:
        """Whether it still holds what the layers have."""
        starts = accumulate((each.nbytes for each in self._parameters), initial=self.weight.data_ptr())
        return all(
            each.data_ptr() == start and each.dtype == self.weight.dtype
            for each, start in zip(self._parameters, starts, strict=False)
        )


class SideBySide:
    """`Amused.condition`, packed, with few launches; a result has the same bits (`product.choices`).

    A transformer whose weights are final and lie where they stay: see `Stack`.
    """

    def __init__(self, network: Amused) -> None:
        self.network = network
        self._layers = cast("Sequence[TransformerLayer]", tuple(network.transformer_layers))
        self._stages = tuple(pair for stage in (network.down_block, network.up_block) for pair in stage.pairs())
        norms = [norm.linear for layer in self._layers for norm in (layer.norm1, layer.norm2, layer.norm3)]
        # Two runs of one width each.
        self._mappers = tuple(run for run in (norms, [block.cond_embeds_mapper for block, _ in self._stages]) if run)
        self._scales = Stack([mapper.weight for run in self._mappers for mapper in run]) if self._mappers else None
        self._keys_values = Stack([layer.attn2.kv.weight for layer in self._layers]) if self._layers else None

    def condition(
        self, text: Tensor, pooled: Tensor, micro: Tensor, adapters: RowAdapters | None = None
    ) -> tuple[Tensor, Layout]:
        """Arguments as `Amused.condition` has them; pooled and micro may have more rows, which are left out."""
        rows = len(text)
        text, activated = self.network.prepare(text, pooled, micro)
        made: Conditioning = {}
        pieces = [self._modulations(activated, made)[:rows], self._of_layers(text, made, adapters)]
        rest: Conditioning = {}
        for _, attention in self._stages:
            attention.condition(text, rest, adapters)
        pieces += [value.flatten(1) for value in rest.values()]
        return torch.cat(pieces, dim=1), Layout.of(made | rest)

    def _modulations(self, activated: Tensor, into: Conditioning) -> Tensor:
        """All scales and shifts, (R, all of them)."""
        if self._scales is None:
            return activated[:, :0]
        if not self._scales.whole:
            return self._one_by_one(activated, into)
        packed = linear(activated[:, None], self._scales.weight, kernels=self.network.embed.kernels)[:, 0]
        first = 0
        for run in self._mappers:
            width = run[0].weight.shape[0]
            pairs = packed[:, first : first + len(run) * width].unflatten(1, (len(run), 2, width // 2))
            pairs[:, :, 0] += 1
            into |= dict(zip((mapper.name for mapper in run), pairs.unbind(1), strict=True))
            first += len(run) * width
        return packed

    def _one_by_one(self, activated: Tensor, into: Conditioning) -> Tensor:
        made: Conditioning = {}
        for mapper in self._every_mapper():
            mapper.condition(activated, made)
        into |= made
        return Layout.of(made).pack(made)

    def _every_mapper(self) -> Iterator[Mapper]:
        return (mapper for run in self._mappers for mapper in run)

    def _of_layers(self, text: Tensor, into: Conditioning, adapters: RowAdapters | None) -> Tensor:
        """Keys and values of the transformer layers, (R, all of them)."""
        if self._keys_values is None:
            return text[:, 0, :0]
        if adapters is not None or not self._keys_values.whole:
            # A pair goes into the tiles of its own weight. The base's rows have the same bits in either way.
            made: Conditioning = {}
            for layer in self._layers:
                layer.attn2.condition(text, made, adapters)
            into |= made
            return Layout.of(made).pack(made)
        heads, count = self._layers[0].attn2.heads, len(self._layers)
        fused = linear(text, self._keys_values.weight, kernels=self.network.embed.kernels)
        parted = fused.unflatten(2, (count, 2, heads, -1)).permute(0, 2, 3, 4, 1, 5).contiguous()
        into |= dict(zip((layer.attn2.name for layer in self._layers), parted.unbind(1), strict=True))
        return parted.flatten(1)
