"""The networks in torch, as the decoding loop and the pipeline use them: the reference, or with Triton kernels.

A `Context` is one row's step-constant part: what a prompt, a size and an adapter slot leave for the loop. What one
holds never depends on what was made beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..adapters.bank import Bank
from ..core import AESTHETIC_SCORE, Sizes
from ..decoding.buckets import KEPT
from ..decoding.captured import Captured, Function, capture
from ..kernels.dispatch import REFERENCE, STEP, Kernels
from ..kernels.quantization import NAMES
from ..kernels.rows import BASE, RowAdapters, RowSlots
from ..models.amused import Amused
from ..models.conditioning import Layout, SideBySide
from ..models.layers import Conditioning, Linear
from ..models.memory import row_bytes
from ..models.networks import Networks
from ..models.text import TextOutput
from ..models.vq import VQ, channels_last
from .machine import Machine

_POSITIONS = 64
"""On a CPU, positions are read out in multiples of this, from 512 on in eighths of a power of two. Their number differs
at nearly every step, and oneDNN compiles a bf16 product for every shape and keeps the last 1024, each with 0.7 MB."""


_TOGETHER = 8
"""Contexts made in one pass, at most. On a CPU a product's order of sums hangs on the number of its rows where they are
few, and a context has one vector for many tokens of text: vectors come in this number always, with zeros if need be."""

_TEXT = ".kv"
"""How the places end where a style changes keys and values of the text, all that it changes of a context."""


@dataclass(frozen=True, eq=False)
class Context:
    """What stays the same over the steps for one row: its conditioning (1, T), grid, adapter slot and scale."""

    packed: Tensor
    layout: Layout
    grid: tuple[int, int]
    slot: int
    scale: float

    @property
    def conditioning(self) -> Conditioning:
        """Tensors (1, ...) by block name."""
        return self.layout.views(self.packed)

    @property
    def bytes(self) -> int:
        """The memory its numbers take."""
        return self.packed.nbytes


class _Stacked(NamedTuple):
    """Contexts as one forward pass takes them; ``order`` of its rows, and the way ``back``, if it is not their own."""

    contexts: tuple[Context, ...]
    order: Tensor | None
    back: Tensor | None
    conditioning: Conditioning
    adapters: RowAdapters | None


class TorchNetwork:
    """Text, transformer and VQ on one device. Every method is a function of its arguments and of the bank."""

    def __init__(
        self,
        networks: Networks,
        machine: Machine,
        bank: Bank,
        kernels: Kernels = REFERENCE,
        quantization: torch.dtype | None = None,
    ) -> None:
        self.device, self.dtype, self.bank, self.kernels = machine.device, machine.dtype, bank, kernels
        self.quantization = quantization
        self._quantized: tuple[Linear, ...] = ()
        if quantization is not None:
            # Before anything is rounded to the dtype, and so that no weight is on the device twice.
            self._quantized = networks.transformer.quantize(quantization, machine.device)
        self.transformer = networks.transformer.to(machine.device, machine.dtype).rest(kernels)
        self.vq = channels_last(networks.vq.to(machine.device, machine.dtype))
        # On a GPU in the step's format, which takes what it makes anyway; on a CPU fp32 costs little.
        self.text_encoder = networks.text.to(machine.device, None if machine.device.type == "cpu" else machine.dtype)
        self.tokenizer = networks.tokenizer
        self._stacked: _Stacked | None = None
        self._layouts: dict[int, Layout] = {}
        side_by_side = SideBySide(self.transformer) if "linear" in kernels.triton else None
        self._encode, self._draw = self._captured(self.text_encoder), self._captured(partial(_drawn, self.vq))
        self._condition = self._captured(
            partial(_conditioned, self.transformer, side_by_side, self.bank, self._layouts)
        )

    def _captured(self, function: Function) -> Captured:
        """One launch where launches are slow to call; the reference reads slots on the host, so it is called."""
        if self.device.type == "cpu" or "linear" not in self.kernels.triton:
            return Captured(function, None)
        return Captured(function, partial(capture, device=self.device))

    @property
    def name(self) -> str:
        """The backend's."""
        return self.kernels.name

    @property
    def mask_id(self) -> int:
        """The token of a masked position."""
        return self.transformer.config.mask_id

    @property
    def sizes(self) -> Sizes:
        """What pictures the model draws."""
        config, factor = self.transformer.config, self.vq.config.factor
        return Sizes(config.sample_size, factor, factor * (2 if config.downsample else 1))

    def explain(self) -> dict[str, str]:
        """What computes, and with how many threads."""
        facts = {"threads": f"{torch.get_num_threads()}: torch's own choice", "kernels": self.kernels.explain()}
        if self.quantization is not None:
            facts["quantization"] = self._explain_quantization(self.quantization)
        return facts

    def _explain_quantization(self, number: torch.dtype) -> str:
        """What is in 8 bits, what that saves, and what it loses."""
        small = [linear.quantized for linear in self._quantized if linear.quantized is not None]
        now, count = sum(each.nbytes for each in small) / 1e6, sum(each.values.numel() for each in small)
        return (
            f"{NAMES[number]}: asked for; weights and activations of {len(small)} projections of the transformer "
            f"layers, {count * self.dtype.itemsize / 1e6:.1f} MB in {now:.1f}; adapters stay in "
            f"{str(self.dtype).removeprefix('torch.')}; stylemuse bench quantization measures what is lost"
        )

    def row_bytes(self, ahead: int) -> int:
        """The peak memory of one row; its context is there once more stacked, or with buckets for each that is kept."""
        length = self.text_encoder.config.max_position_embeddings
        stacked = KEPT if STEP in self.kernels.triton else 1
        return row_bytes(self.transformer.config, length, self.dtype, 1 + ahead + stacked)

    @property
    def text_length(self) -> int:
        """Ids that every prompt is padded or cut to."""
        return self.tokenizer.length

    def prompt_tokens(self, prompt: str) -> int:
        """How many tokens a prompt is, its start and end included; the encoder reads `text_length` of them."""
        return self.tokenizer.count(prompt)

    @torch.no_grad()
    def text(self, prompt: str) -> TextOutput:
        """One prompt -> features (1, L, D) and pooled vector (1, P)."""
        return TextOutput(*self._encode(self.tokenizer([prompt]).to(self.device)))

    @torch.no_grad()
    def context(self, text: TextOutput, grid: tuple[int, int], slot: int = BASE, scale: float = 1.0) -> Context:
        """The step-constant part of one row. grid is (h, w) in tokens; slot -1 is the base."""
        return self.contexts([(text, grid, slot, scale)])[0]

    @torch.no_grad()
    def contexts(self, rows: Sequence[tuple[TextOutput, tuple[int, int], int, float]]) -> list[Context]:
        """The step-constant parts of rows of (text, grid, slot, scale), each as it would be alone."""
        parts = [rows[first : first + _TOGETHER] for first in range(0, len(rows), _TOGETHER)]
        return [context for part in parts for context in self._together(part)]

    def _together(self, rows: Sequence[tuple[TextOutput, tuple[int, int], int, float]]) -> list[Context]:
        # A power of two of texts: oneDNN compiles a product for every number of rows, and keeps it.
        filler = [rows[0]] * ((1 << (len(rows) - 1).bit_length()) - len(rows))
        texts, grids, slots, scales = zip(*rows, *filler, strict=True)
        factor, extra = self.vq.config.factor, _TOGETHER - len(texts)
        micro = [[width * factor, height * factor, 0.0, 0.0, AESTHETIC_SCORE] for height, width in grids]
        penultimate = torch.cat([text.penultimate for text in texts])
        (made,) = self._condition(
            penultimate,
            F.pad(torch.cat([text.pooled for text in texts]), (0, 0, 0, extra)),
            F.pad(torch.tensor(micro, device=self.device), (0, 0, 0, extra)),
            *self._styles(list(zip(slots, scales, strict=True))),
        )
        layout = self._layouts[penultimate.shape[1]]
        return [Context(_own(made, row), layout, grid, slot, scale) for row, (_, grid, slot, scale) in enumerate(rows)]

    def _styles(self, rows: Sequence[tuple[int, float]]) -> tuple[Tensor, ...]:
        """Slots and scales of rows (slot, scale); nothing where no style changes keys or values of the text."""
        touched = self.bank.touched(slot for slot, _ in rows if slot != BASE)
        return self._slots(rows) if any(name.endswith(_TEXT) for name in touched) else ()

    @torch.no_grad()
    def features(self, tokens: Tensor, contexts: Sequence[Context]) -> Tensor:
        """(R, N) tokens, one context per row -> (R, N, C)."""
        key, given = tuple(contexts), self._stacked
        if given is None or given.contexts != key:
            given = self._stacked = self._stack(key)
        rows = tokens.view(len(key), *key[0].grid)
        if given.order is None:
            return self.transformer.features(rows, given.conditioning, given.adapters)
        return self.transformer.features(rows[given.order], given.conditioning, given.adapters)[given.back]

    def _stack(self, contexts: tuple[Context, ...]) -> _Stacked:
        """Rows by slot, the base's first: what styles of one rank add is then few products, and few shapes of them."""
        order = sorted(range(len(contexts)), key=lambda row: contexts[row].slot)
        rows = [contexts[row] for row in order]
        conditioning = rows[0].layout.views(torch.cat([row.packed for row in rows]))
        adapters = self._adapters([(row.slot, row.scale) for row in rows])
        if order == list(range(len(order))):
            return _Stacked(contexts, None, None, conditioning, adapters)
        index = torch.tensor(order, device=self.device)
        return _Stacked(contexts, index, index.argsort(), conditioning, adapters)

    def array(self, values: NDArray[Any]) -> Tensor:
        """The values as a tensor on the network's device."""
        return torch.from_numpy(values).to(self.device)

    def readout(self, features: Tensor) -> Tensor:
        """(M, C) -> (M, D) fp32."""
        return _padded(self.transformer.readout, features)

    def logits(self, hidden: Tensor) -> Tensor:
        """(M, D) fp32 -> (M, K) fp32."""
        return _padded(self.transformer.logits, hidden)

    @torch.no_grad()
    def pixels(self, tokens: Tensor) -> list[Image.Image]:
        """(B, h, w) codes -> B pictures, one at a time: bf16 convolutions round otherwise in another batch."""
        drawn = [self._draw(part)[0] for part in tokens.to(self.device).split(1)]
        # One way to the host: a copy waits for what was launched before it.
        return [Image.fromarray(array) for array in torch.cat(drawn).cpu().numpy()]

    @torch.no_grad()
    def codes(self, picture: Image.Image, grid: tuple[int, int]) -> Tensor:
        """A picture, resized to the grid -> codes (h, w)."""
        height, width = (side * self.vq.config.factor for side in grid)
        resized = picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
        pixels = np.asarray(resized, dtype=np.float32) / np.float32(255)
        batch = torch.from_numpy(pixels).permute(2, 0, 1)[None].to(self.device, self.dtype)
        return self.vq.encode(batch.contiguous(memory_format=torch.channels_last))[0]

    def _adapters(self, rows: Sequence[tuple[int, float]]) -> RowAdapters | None:
        """None where every row is base: then nothing of an adapter is computed, or looked at."""
        if all(slot == BASE for slot, _ in rows):
            return None
        touched = self.bank.touched(slot for slot, _ in rows if slot != BASE)
        return RowAdapters(RowSlots(*self._slots(rows)), touched)

    def _slots(self, rows: Sequence[tuple[int, float]]) -> tuple[Tensor, Tensor]:
        slots = torch.tensor([slot for slot, _ in rows], device=self.device)
        return slots, torch.tensor([scale for _, scale in rows], dtype=torch.float32, device=self.device)


def _conditioned(
    transformer: Amused,
    side_by_side: SideBySide | None,
    bank: Bank,
    layouts: dict[int, Layout],
    text: Tensor,
    pooled: Tensor,
    micro: Tensor,
    *styles: Tensor,
) -> tuple[Tensor]:
    """`Amused.condition` of rows, packed; ``styles`` are their slots and scales. Layouts are left by length of text."""
    # All places: where a style has nothing its rank is 0, and no other launch is made for it.
    adapters = RowAdapters(RowSlots(*styles), bank.sites) if styles else None
    if side_by_side is not None:
        packed, layout = side_by_side.condition(text, pooled, micro, adapters)
    else:
        made = transformer.condition(text, pooled, micro, adapters)
        layout = Layout.of(made)
        packed = layout.pack({name: value[: len(text)] for name, value in made.items()})
    layouts[text.shape[1]] = layout
    return (packed,)


def _drawn(vq: VQ, codes: Tensor) -> tuple[Tensor]:
    """(B, h, w) codes -> (B, H, W, 3) bytes."""
    drawn = vq.decode(codes).float().permute(0, 2, 3, 1)
    return ((drawn * 255).round().to(torch.uint8),)


def _own(values: Tensor, row: int) -> Tensor:
    """One row (1, ...); a copy, for a view would keep its neighbours' memory."""
    return values if len(values) == 1 else values[row : row + 1].clone()


def _padded(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """run(x), a function of single rows, with as many rows more as make few shapes."""
    multiple = max(_POSITIONS, 1 << len(x).bit_length() >> 4)
    extra = -len(x) % multiple if x.device.type == "cpu" else 0
    return run(F.pad(x, (0, 0, 0, extra)))[: len(x)] if extra else run(x)
