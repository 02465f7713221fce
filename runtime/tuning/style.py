"""A style from one picture: a LoRA on the attention projections, tuned on that picture alone.

    loss = - mean over masked positions of log p(code | the other codes, prompt),  the share masked cos(pi u / 2)

The picture is shown as it is and mirrored, each time masked anew. It is not moved: by less than a token, that turns
every texture which is bound to the grid of tokens into others. The base stays as it is. Recipe: diffusers
``train_amused.py`` (LoRA on to_q, to_k, to_v), StyleDrop 3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..adapters.canonical import Adapter
from ..backend.network import TorchNetwork
from ..core import AESTHETIC_SCORE, StylemuseError
from ..kernels.rows import LowRank, RowAdapters, RowSlots, Site
from ..loading.assembly import in_torch
from ..pipeline import Pipeline
from ..requests.pictures import upright
from .training import finite, mask_at_random

PROJECTIONS = ("to_q", "to_k", "to_v")


@dataclass(frozen=True)
class Recipe:
    """How a style is tuned; the defaults suit the embedded model, `AMUSED` the published ones.

    Attributes:
        rank, rate, steps, batch: of the LoRA, of Adam, and maskings of the picture per step.
    """

    rank: int = 4
    rate: float = 2e-3
    steps: int = 120
    batch: int = 8

    def __post_init__(self) -> None:
        for name in ("rank", "steps", "batch"):
            if getattr(self, name) < 1:
                raise StylemuseError(f"{name} = {getattr(self, name)} is not allowed: at least 1")
        if not 0 < self.rate < 1:
            raise StylemuseError(f"rate = {self.rate} is not allowed: between 0 and 1")


AMUSED = Recipe(rank=16, rate=4e-4, steps=1500, batch=4)
"""For amused-256 (diffusers' single-image recipe: rank 16, 4e-4, 1500 to 2000 steps)."""


def descriptor_of(prompt: str) -> str:
    """ "a cat in watercolor painting style" -> "in watercolor painting style": the words that will call the style."""
    head, found, tail = prompt.rpartition(" in ")
    if not found or not head.strip() or not tail.strip():
        raise StylemuseError(
            f"prompt {prompt!r} does not say the style; write 'CONTENT in STYLE', for example 'a cat in ink style', "
            "or give the descriptor"
        )
    return f"in {tail.strip()}"


def tune(
    pipe: Pipeline,
    picture: Image.Image,
    prompt: str,
    *,
    name: str,
    descriptor: str | None = None,
    recipe: Recipe | None = None,
    recommended: Mapping[str, str | int | float] | None = None,
    seed: int = 0,
    on_step: Callable[[int, int, float], None] | None = None,
) -> Adapter:
    """Tune a style and return it as a canonical adapter.

    Args:
        pipe: loaded with ``device="cpu", dtype="float32"``.
        picture: resized to the model's own size.
        prompt: what the picture shows and in which style, "CONTENT in STYLE".
        descriptor: the words appended to prompts; None takes them from ``prompt``.
        recommended: guidance and steps to store with it.
        on_step: called with (steps done, of how many, loss).
    """
    model = in_torch(pipe)
    network = model.network
    if network.device.type != "cpu" or network.dtype != torch.float32:
        given = f"{network.device} in {str(network.dtype).removeprefix('torch.')}"
        raise StylemuseError(f'tuning on {given} is not supported; load the model with device="cpu", dtype="float32"')
    if network.quantization is not None:
        raise StylemuseError("tuning a quantized model is not supported; load it without quantization")
    recipe, words = recipe or Recipe(), descriptor_of(prompt) if descriptor is None else descriptor
    config = network.transformer.config
    sites = {site: place for site, place in config.sites().items() if site.endswith(PROJECTIONS)}
    generator = torch.Generator().manual_seed(seed)
    stacks = _fresh(sites, recipe.rank, generator)
    trained = [side for pair in stacks.values() for side in (pair.down, pair.up)]
    optimizer = torch.optim.Adam(trained, lr=recipe.rate, betas=(0.9, 0.98))
    views = _views(network, upright(picture))
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate * min(1.0, (step + 1) / 10, 2 * (recipe.steps - step) / recipe.steps)
        chosen = views[torch.randint(len(views), (recipe.batch,), generator=generator)]
        masked = mask_at_random(tuple(chosen.shape), generator)
        loss = F.cross_entropy(_logits(network, prompt, stacks, chosen, masked), chosen[masked])
        optimizer.zero_grad(set_to_none=True)
        finite(loss).backward()
        optimizer.step()
        if on_step is not None:
            on_step(step + 1, recipe.steps, float(loss.detach()))
    return Adapter(
        name=name,
        kind="lora",
        tensors={site: _pair(stacks[place.group], place) for site, place in sites.items()},
        base_model=pipe.name,
        base_sha256=model.adapters.base_sha256(),
        descriptor=words,
        caption=prompt,
        recommended=recommended or {},
    )


def _fresh(sites: Mapping[str, Site], rank: int, generator: torch.Generator) -> dict[str, LowRank]:
    """One trainable pair per projection, stacked as the network takes them: down random, up zero."""
    stacks: dict[str, LowRank] = {}
    for site in sites.values():
        if site.group not in stacks:
            down = torch.randn(1, site.parts, site.inputs, rank, generator=generator) * site.inputs**-0.5
            up = torch.zeros(1, site.parts, rank, site.outputs)
            stacks[site.group] = LowRank(down.requires_grad_(), up.requires_grad_(), torch.tensor([rank]))
    return stacks


def _views(network: TorchNetwork, picture: Image.Image) -> Tensor:
    """Codes (2, h, w) of the picture and of its mirror image, at the model's own size."""
    side = network.transformer.config.sample_size
    views = (picture, picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    return torch.stack([network.codes(view, (side, side)) for view in views])


def _logits(
    network: TorchNetwork, prompt: str, stacks: Mapping[str, LowRank], tokens: Tensor, masked: Tensor
) -> Tensor:
    """(M, K) logits of the masked positions, differentiable in the stacks."""
    rows = len(tokens)
    text = network.text(prompt)
    pixels = float(tokens.shape[1] * network.vq.config.factor)
    micro = torch.tensor([[pixels, pixels, 0.0, 0.0, AESTHETIC_SCORE]])
    # The prompt is the same in every row: its keys and values are made once and shared.
    one = RowAdapters(RowSlots(torch.zeros(1, dtype=torch.int64), torch.ones(1)), stacks)
    shared = network.transformer.condition(text.penultimate, text.pooled, micro, one)
    conditioning = {name: value.expand(rows, *value.shape[1:]) for name, value in shared.items()}
    adapters = RowAdapters(RowSlots(torch.zeros(rows, dtype=torch.int64), torch.ones(rows)), stacks)
    hidden = network.transformer.features(tokens.masked_fill(masked, network.mask_id), conditioning, adapters)
    return network.logits(network.readout(hidden[masked.flatten(1)]))


def _pair(stack: LowRank, place: Site) -> tuple[Tensor, Tensor]:
    """A site's pair in canonical form: down (r, in), up (out, r)."""
    down, up = stack.down[0, place.part].detach(), stack.up[0, place.part].detach()
    return down.T.contiguous(), up.T.contiguous()
