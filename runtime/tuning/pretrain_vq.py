"""First stage of pretraining: the VQ tokenizer on the world's pictures.

loss = |x - r| + 2 |x - r|^2 + edges |grad x - grad r| + 0.25 |z - e|^2

The first half passes without quantization. Then the codebook is spread over the latents, far apart rather than by
density: more than half of a pictogram is flat paper, and codes that are doubles of each other would be noise which the
transformer has to learn. From there the codes follow their latents by moving averages (van den Oord 2017, A.1).
Every look is seen, the held-out ones too: a real tokenizer knows all textures.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from .. import weights
from ..machine import choose
from ..models.vq import VQ, ResnetBlock, VQConfig, channels_last
from .looks import Look
from .pictograms import Array
from .training import Average, batches, finite, load, report, save, warm_hold_decay
from .world import World

CONFIG = VQConfig(
    block_out_channels=(24, 48, 96),
    layers_per_block=1,
    latent_channels=32,
    num_vq_embeddings=384,
    norm_num_groups=8,
    vq_embed_dim=8,
)
PICTURE = 64
_BATCH = 8
_RATE = 1e-3
_CROP = 32  # pixels; most of the training sees crops, for four times the steps
_WHOLE = 0.2  # the last part, on whole pictures, so that the group norms see what they will see in use
_CODE_DECAY = 0.99
_DEAD = 0.02  # uses per batch under which a code is moved
_CONTINUOUS = 0.5  # the part before quantization and the loss on edges start; earlier, edges slow the colours down
_EDGES = 0.3
_SPREAD_OVER = 192  # pictures whose latents the codebook is spread over


class CodebookAverages:
    """Running counts and sums per code; the codebook is their quotient."""

    def __init__(self, model: VQ, generator: torch.Generator, *, started: bool) -> None:
        self.table = model.quantize.embedding.weight
        self.generator = generator
        self.counts = torch.ones(self.table.shape[0], device=self.table.device)
        self.sums = self.table.detach().clone()
        self.started = started

    @torch.no_grad()
    def start(self, latent: Tensor) -> None:
        """Put the codes on latents (M, D) far from each other: k-means++ with the fourth power of the distance."""
        chosen = [latent[0]]
        distance = (latent - latent[0]).square().sum(1)
        while len(chosen) < len(self.counts):
            place = torch.multinomial(distance.double().square().cpu(), 1, generator=self.generator)
            chosen.append(latent[int(place)])
            distance = torch.minimum(distance, (latent - chosen[-1]).square().sum(1))
        self.table.copy_(torch.stack(chosen))
        self.sums, self.counts, self.started = self.table.detach().clone(), torch.ones_like(self.counts), True

    @torch.no_grad()
    def update(self, latent: Tensor, ids: Tensor) -> None:
        """Latents (M, D) and the codes (M,) they were given."""
        self.counts.mul_(_CODE_DECAY).add_(torch.bincount(ids, minlength=len(self.counts)), alpha=1 - _CODE_DECAY)
        self.sums.mul_(_CODE_DECAY).index_add_(0, ids, latent, alpha=1 - _CODE_DECAY)
        dead = (self.counts < _DEAD).nonzero()[:1, 0]
        if len(dead):
            # One at a time, onto the latent that is served worst, so that no doubles arise.
            worst = (latent - self.table[ids]).square().sum(1).argmax()
            self.sums[dead], self.counts[dead] = latent[worst], 1.0
        self.table.copy_(self.sums / self.counts[:, None])


def train(folder: Path, samples: int, *, start: Path | None = None, seed: int = 0) -> VQ:
    """Train until ``samples`` pictures were seen, resuming from ``folder/vq.pt``; returns the averaged model."""
    torch.manual_seed(seed)
    model = VQ(CONFIG)
    _initialize(model)
    if start is not None:
        weights.load_into(model, weights.read(start / "vqvae"), weights.VQ)
    device = choose().device
    channels_last(model.to(device)).quantize.embedding.weight.requires_grad_(False)
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=_RATE, betas=(0.9, 0.98), weight_decay=1e-4)
    average = Average(model, 0.998)
    codes = CodebookAverages(model, torch.Generator().manual_seed(seed), started=start is not None)
    done = 0
    path = folder / "vq.pt"
    if state := load(path):
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average.restore(state["average"])
        codes.counts, codes.sums = state["counts"].to(device), state["sums"].to(device)
        done = state["done"]
        codes.started = bool(state["started"])
    numbers = np.random.default_rng([seed, 1, done])
    stream = batches(World(PICTURE).samples(numbers, held_out=True), _BATCH)
    started, step = time.monotonic(), 0
    while done < samples:
        for group in optimizer.param_groups:
            group["lr"] = _RATE * warm_hold_decay(done, samples, warm=100 * _BATCH)
        x = torch.from_numpy(np.stack([picture for _, _, picture in next(stream)])).permute(0, 3, 1, 2).to(device)
        if done < (1 - _WHOLE) * samples:
            x = _cropped(x, numbers)
        quantized = codes.started or done >= _CONTINUOUS * samples
        if quantized and not codes.started:
            codes.start(_latents(model, World(PICTURE).samples(numbers, held_out=True)))
        loss, error = _loss(model, codes if quantized else None, x)
        optimizer.zero_grad(set_to_none=True)
        finite(loss).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        average.update(model)
        done, step = done + _BATCH, step + 1
        if step % 50 == 0:
            used = int((codes.counts > _DEAD).sum())
            report(
                stage="vq",
                done=done,
                loss=float(loss.detach()),
                error=error,
                codes=used,
                seconds=time.monotonic() - started,
            )
        if step % 400 == 0 or done >= samples:
            parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "average": average.state()}
            save(path, parts | {"counts": codes.counts, "sums": codes.sums, "started": codes.started, "done": done})
    model.load_state_dict(average.values, strict=True)
    return model.cpu().eval()


def _initialize(model: VQ) -> None:
    """Residual blocks start as the identity and the layers between them keep the variance: colours get through."""
    for module in model.modules():
        if isinstance(module, ResnetBlock):
            nn.init.zeros_(module.conv2.weight)
    for layer in (model.encoder.conv_in, model.encoder.conv_out, model.quant_conv):
        nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
    for layer in (model.post_quant_conv, model.decoder.conv_in, model.decoder.conv_out):
        nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")


@torch.no_grad()
def _latents(model: VQ, source: Iterator[tuple[str, Look, Array]]) -> Tensor:
    """Latents (M, D) of a few hundred pictures."""
    made = []
    for batch in islice(batches(source, _BATCH), _SPREAD_OVER // _BATCH):
        x = torch.from_numpy(np.stack([picture for _, _, picture in batch])).permute(0, 3, 1, 2)
        x = x.to(model.quantize.embedding.weight.device)
        made.append(model.latent(x).permute(0, 2, 3, 1).flatten(0, 2))
    return torch.cat(made)


def _cropped(x: Tensor, numbers: np.random.Generator) -> Tensor:
    """One window at a random place for the whole batch, on token borders."""
    top, left = (CONFIG.factor * numbers.integers((PICTURE - _CROP) // CONFIG.factor + 1, size=2)).tolist()
    return x[:, :, top : top + _CROP, left : left + _CROP]


def _loss(model: VQ, codes: CodebookAverages | None, x: Tensor) -> tuple[Tensor, float]:
    """The loss, and the mean absolute error of the drawn pictures; without ``codes`` nothing is quantized."""
    latent = model.latent(x)
    commit = latent.new_zeros(())
    chosen = latent
    if codes is not None:
        flat = latent.detach().permute(0, 2, 3, 1).reshape(-1, latent.shape[1])
        ids = model.quantize.nearest(latent.detach())
        chosen = model.quantize.look_up(ids)
        commit = (latent - chosen).square().mean()
        codes.update(flat, ids.flatten())
    difference = model.render(latent + (chosen - latent).detach()) - x
    absolute = difference.abs().mean()
    loss = absolute + 2 * difference.square().mean() + 0.25 * commit
    if codes is not None:
        loss = loss + _EDGES * (difference.diff(dim=2).abs().mean() + difference.diff(dim=3).abs().mean())
    return loss, float(absolute.detach())
