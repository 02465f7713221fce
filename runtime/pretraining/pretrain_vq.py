"""First stage of pretraining: the VQ tokenizer on the world's pictures.

    loss = |x - r| + 2 |x - r|^2 + edges |grad x - grad r| + 0.25 |z - e|^2

The first part passes without quantization. Then the codebook is spread over the latents, far apart rather than by
density: more than half of a pictogram is flat paper, and codes that are doubles of each other would be noise which the
transformer has to learn. From there the codes follow their latents by moving averages (van den Oord 2017, A.1), and a
code that nobody uses is put onto a latent of the batch. Every look and every hand is seen, the held-out ones too: a
real tokenizer knows all textures. In the loop nothing waits for the device.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ..backend.machine import choose
from ..models.vq import VQ, ResnetBlock, VQConfig, channels_last
from ..tuning.training import (
    Average,
    Clock,
    State,
    finite,
    load,
    load_weights,
    report,
    save,
    save_weights,
    warm_hold_decay,
)
from .world import World

CONFIG = VQConfig(
    block_out_channels=(32, 48, 96, 128),
    layers_per_block=1,
    latent_channels=64,
    num_vq_embeddings=4096,
    norm_num_groups=8,
    vq_embed_dim=16,
)
PICTURE = 128
NAME = "tokenizer"
RATE = 1e-3
_CODE_DECAY = 0.99
_DEAD = 0.02  # uses per batch under which a code is moved
_CONTINUOUS = 0.2  # the part before quantization and the loss on edges start; earlier, edges slow the colours down
_EDGES = 1.0
_SPREAD_OVER = 256  # pictures whose latents the codebook is spread over
_KEEP = 60.0  # seconds between checkpoints
_REPORT = 5.0


class CodebookAverages:
    """Running counts and sums per code; the codebook is their quotient."""

    def __init__(self, model: VQ, generator: torch.Generator, *, started: bool = False) -> None:
        self.table = model.quantize.embedding.weight
        self.generator = generator
        self.counts = torch.ones(self.table.shape[0], device=self.table.device)
        self.sums = self.table.detach().clone()
        self.started = started

    @torch.no_grad()
    def start(self, latent: Tensor) -> None:
        """Put the codes on latents (M, D) far from each other: k-means++ with the fourth power of the distance."""
        if latent.device.type == "cpu":
            latent = latent[torch.randperm(len(latent), generator=self.generator)[: 4 * len(self.counts)]]
        chosen = [latent[0]]
        distance = (latent - latent[0]).square().sum(1)
        while len(chosen) < len(self.counts):
            # The largest of w / e with e exponential is a draw by weight w; `multinomial` would wait for the device.
            noise = torch.empty_like(distance).exponential_(generator=self.generator)
            chosen.append(latent[(distance.square() / noise).argmax()])
            distance = torch.minimum(distance, (latent - chosen[-1]).square().sum(1))
        self.table.copy_(torch.stack(chosen))
        self.sums, self.counts, self.started = self.table.detach().clone(), torch.ones_like(self.counts), True

    @torch.no_grad()
    def update(self, latent: Tensor, ids: Tensor) -> None:
        """Latents (M, D) and the codes (M,) they were given."""
        used = torch.zeros_like(self.counts).index_add_(0, ids, torch.ones_like(ids, dtype=torch.float32))
        self.counts.mul_(_CODE_DECAY).add_(used, alpha=1 - _CODE_DECAY)
        self.sums.mul_(_CODE_DECAY).index_add_(0, ids, latent, alpha=1 - _CODE_DECAY)
        # A dead code goes where latents are served badly: drawn by their distance, each its own.
        error = (latent - self.table[ids]).square().sum(1)
        noise = torch.empty_like(error).exponential_(generator=self.generator)
        count = min(16, len(error))
        worst = latent[(error / noise).topk(count).indices]
        idle = self.counts.topk(count, largest=False)
        dead = idle.values < _DEAD
        self.sums[idle.indices] = torch.where(dead[:, None], worst, self.sums[idle.indices])
        self.counts[idle.indices] = torch.where(dead, 1.0, idle.values)
        self.table.copy_(self.sums / self.counts[:, None])


def train(run: Path, minutes: float, *, batch: int, rate: float = RATE, resumable: bool = True, seed: int = 0) -> VQ:
    """Train for ``minutes`` in all, resuming from the folder ``run``; returns the averaged model."""
    torch.manual_seed(seed)
    machine = choose()
    device = machine.device
    model = VQ(CONFIG)
    _initialize(model)
    channels_last(model.to(device)).quantize.embedding.weight.requires_grad_(False)
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.98), weight_decay=1e-4, fused=True)
    average = Average(model, 0.998)
    chance = torch.Generator(device).manual_seed(seed)
    codes = CodebookAverages(model, chance)
    done, before = 0, 0.0
    if state := load(run / "tokenizer.pt"):
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average.restore(state["average"])
        codes.counts, codes.sums = state["counts"].to(device), state["sums"].to(device)
        codes.started, done, before = bool(state["started"]), int(state["done"]), float(state["seconds"])
        chance.manual_seed(seed + done)
    elif (run / f"{NAME}-1.safetensors").exists():
        model.load_state_dict(load_weights(run, NAME))
        average = Average(model, 0.998)
        codes = CodebookAverages(model, chance, started=True)
    world, clock = World(PICTURE, device), Clock(minutes, before)
    losses, steps, since = torch.zeros(3, device=device), 0, done
    told, kept = clock.seconds, clock.seconds

    def keep() -> None:
        facts = {"samples": done, "seconds": clock.seconds}
        save_weights(run, NAME, average.values, torch.float32, facts)
        if resumable:
            parts: State = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "average": average.state(),
            }
            parts |= {"counts": codes.counts, "sums": codes.sums, "started": codes.started}
            save(run / "tokenizer.pt", parts | facts | {"done": done})

    with torch.backends.cudnn.flags(enabled=True, benchmark=True):
        while clock.share < 1:
            for group in optimizer.param_groups:
                group["lr"] = rate * warm_hold_decay(clock.share, 1.0, warm=0.02, decay=0.3)
            x = _pictures(world, chance, batch)
            if not codes.started and clock.share >= _CONTINUOUS:
                codes.start(_latents(model, world, chance, machine.dtype))
            loss = _loss(model, codes if codes.started else None, x, machine.dtype, losses)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            average.update(model)
            done, steps = done + batch, steps + 1
            if clock.seconds - told > _REPORT:
                finite(losses.sum())
                total, error, commit = (losses / steps).tolist()
                speed, used = (done - since) / (clock.seconds - told), int((codes.counts > _DEAD).sum())
                report(stage=NAME, done=done, loss=total, error=error, commit=commit, codes=used, speed=speed,
                       seconds=clock.seconds)  # fmt: skip
                losses.zero_()
                told, steps, since = clock.seconds, 0, done
            if clock.seconds - kept > _KEEP:
                keep()
                kept = clock.seconds
    keep()
    return read(run)


def read(run: Path) -> VQ:
    """The averaged model that `train` left."""
    model = VQ(CONFIG)
    model.load_state_dict(load_weights(run, NAME))
    return channels_last(model).eval()


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
def _pictures(world: World, chance: torch.Generator, count: int) -> Tensor:
    """(B, 3, s, s), channels last."""
    pictures = world.draw(world.sample(count, chance, held_out=True))
    return pictures.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def _latents(model: VQ, world: World, chance: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Latents (M, D) of a few hundred pictures."""
    made = []
    for _ in range(_SPREAD_OVER // 32):
        pictures = _pictures(world, chance, 32)
        with torch.autocast(world.device.type, dtype, enabled=dtype != torch.float32):
            latent = model.latent(pictures)
        made.append(latent.float().permute(0, 2, 3, 1).flatten(0, 2))
    return torch.cat(made)


def _loss(model: VQ, codes: CodebookAverages | None, x: Tensor, dtype: torch.dtype, losses: Tensor) -> Tensor:
    """The loss; without ``codes`` nothing is quantized. Adds (loss, mean absolute error, commitment) to ``losses``."""
    with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
        latent = model.latent(x).float()
        commit = latent.new_zeros(())
        chosen = latent
        if codes is not None:
            flat = latent.detach().permute(0, 2, 3, 1).reshape(-1, latent.shape[1])
            with torch.autocast(x.device.type, enabled=False):
                ids = model.quantize.nearest(latent.detach())
            chosen = model.quantize.look_up(ids)
            commit = (latent - chosen).square().mean()
            codes.update(flat, ids.flatten())
        drawn = model.render(latent + (chosen - latent).detach()).float()
    difference = drawn - x
    absolute = difference.abs().mean()
    loss = absolute + 2 * difference.square().mean() + 0.25 * commit
    if codes is not None:
        loss = loss + _EDGES * (difference.diff(dim=2).abs().mean() + difference.diff(dim=3).abs().mean())
    losses += torch.stack([loss.detach(), absolute.detach(), commit.detach()])
    return loss
