"""Second stage of pretraining: the masked transformer and its text encoder, together.

Codes are masked at a rate cos(pi u / 2), u uniform, and told by cross-entropy (MaskGIT, arXiv 2202.04200, section 3.2);
text is dropped from one picture in ten. The pictures' codes lie in a pool on the device, of which some are drawn anew
all the time: drawing and tokenizing a picture costs as much as training on it. In the loop nothing waits for the
device.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..backend.machine import choose
from ..models.amused import Amused, AmusedConfig
from ..models.layers import Linear
from ..models.text import ClipText, ClipTextConfig
from ..models.tokenizer import ClipTokenizer
from ..models.vq import VQ
from ..tuning.training import (
    Average,
    Clock,
    State,
    finite,
    load,
    load_weights,
    mask_at_random,
    report,
    save,
    save_weights,
    warm_hold_decay,
)
from . import pretrain_vq
from .captions import Captions
from .muon import Muon
from .world import Scenes, World

NAME = "transformer"
TEXT_LENGTH = 20
# The network has no position embeddings: a position is known by the zeros at the border that its convolutions have
# reached. On the 8 x 8 working grid it takes four of them, before the layers that mix all positions. The cross-entropy
# alone never makes them tell (see `Painter.place`).
CONFIG = AmusedConfig(
    hidden_size=256,
    cond_embed_dim=64,
    micro_cond_encode_dim=16,
    micro_cond_embed_dim=80,
    encoder_hidden_size=128,
    vocab_size=pretrain_vq.CONFIG.num_vq_embeddings + 1,
    codebook_size=pretrain_vq.CONFIG.num_vq_embeddings,
    in_channels=128,
    block_out_channels=128,
    num_res_blocks=4,
    downsample=True,
    upsample=True,
    block_num_heads=4,
    num_hidden_layers=6,
    num_attention_heads=4,
    intermediate_size=768,
    sample_size=16,
)
_RATE = 2e-3  # of AdamW: embeddings, convolutions, vectors
_MATRIX_RATE = 4e-3  # of Muon: all other matrices
_SILENT = 0.1  # share of pictures without text
_PLAIN = 0.2  # share of pictures that a subject's name alone may ask for
_PLACE = 0.2  # weight of the loss on places
_READ = 0.65  # share of a batch's positions that is read out; 2 / pi are masked
_POOL = 1 << 17  # tokenized pictures at hand on a GPU
_USES = 8  # times a tokenized picture is trained on, each time masked and captioned anew
_KEEP, _REPORT = 60.0, 5.0  # seconds


class Painter(nn.Module):
    """Text encoder and transformer as one module: captions and masked codes in, logits of positions out.

    ``place`` is there for training only: it names each place of the working grid from what enters the layers. Without
    it, 92 k samples left the layers with no idea where a token is; with it, 6 k samples do.
    """

    def __init__(self, vocabulary_size: int, end: int, config: AmusedConfig = CONFIG) -> None:
        super().__init__()
        self.text = ClipText(
            ClipTextConfig(
                vocab_size=vocabulary_size,
                hidden_size=config.encoder_hidden_size,
                intermediate_size=2 * config.encoder_hidden_size,
                num_hidden_layers=3,
                num_attention_heads=4,
                projection_dim=config.cond_embed_dim,
                max_position_embeddings=TEXT_LENGTH,
                eos_token_id=end,
            )
        )
        # Words must outweigh what the untrained layers add to them, or all captions look alike for long.
        nn.init.normal_(self.text.token.weight, std=0.3)
        self.transformer = Amused(config)
        depth = (2 * config.num_hidden_layers) ** -0.5
        for module in self.transformer.modules():
            if isinstance(module, Linear):
                last = module.name.endswith(("to_out", "ff.down", "channelwise_linear_2"))
                nn.init.normal_(module.weight, std=module.weight.shape[1] ** -0.5 * (depth if last else 1.0))
        self.place = nn.Linear(config.hidden_size, (config.sample_size // 2) ** 2)
        self.draw = self._draw

    def compile_layers(self) -> None:
        """Let torch compile what is static in shape."""
        self.draw = torch.compile(self._draw, dynamic=False)

    def forward(self, ids: Tensor, tokens: Tensor, masked: Tensor, micro: Tensor) -> tuple[Tensor, Tensor]:
        """ids (R, L), tokens (R, h, w), masked (R, h, w) bool, micro (R, 5) -> features (R, N, C), and logits
        (R, P, P) of each working position's place."""
        text = self.text(ids)
        given = tokens.masked_fill(masked, self.transformer.config.mask_id)
        return self.draw(given, text.penultimate, text.pooled, micro)

    def _draw(self, tokens: Tensor, text: Tensor, pooled: Tensor, micro: Tensor) -> tuple[Tensor, Tensor]:
        conditioning = self.transformer.condition(text, pooled, micro)
        entered = self.transformer.enter(tokens, conditioning)
        places = self.place(F.layer_norm(entered, entered.shape[-1:]))
        return self.transformer.leave(entered, self.transformer.working_grid(tokens), conditioning), places

    def losses(self, ids: Tensor, tokens: Tensor, masked: Tensor, at: Tensor, micro: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy at the flat positions ``at`` (M,), where it is not -1, and of the places."""
        features, places = self(ids, tokens, masked, micro)
        there = at >= 0
        chosen = at.clamp(min=0)
        logits = self.transformer.logits(self.transformer.readout(features.flatten(0, 1)[chosen]))
        each = F.cross_entropy(logits.float(), tokens.flatten()[chosen], reduction="none")
        loss = (each * there).sum() / there.sum()
        named = torch.arange(places.shape[1], device=places.device).repeat(len(places))
        return loss, F.cross_entropy(places.float().flatten(0, 1), named)


def read_out(masked: Tensor) -> Tensor:
    """(M,) flat positions that are masked, -1 beyond them; M is a fixed share of all: nobody waits for their number."""
    return torch.nonzero_static(masked.flatten(), size=int(_READ * masked.numel()), fill_value=-1)[:, 0]


class Step:
    """A step of training: forward, backward and both optimizers. On a GPU it is captured as one graph.

    It is thousands of short launches, which a host makes slower than the device does them.
    """

    def __init__(self, model: Painter, batch: int, device: torch.device, dtype: torch.dtype) -> None:
        self.model, self._device, self._dtype = model, device, dtype
        embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        matrices = [value for value in model.parameters() if value.ndim == 2 and id(value) not in embeddings]
        chosen = {id(value) for value in matrices}
        others = [value for value in model.parameters() if id(value) not in chosen]
        on_gpu = device.type == "cuda"
        self.muon = Muon(matrices, rate=_MATRIX_RATE, dtype=dtype)
        self.adam = torch.optim.AdamW(
            others, lr=torch.tensor(_RATE, device=device) if on_gpu else _RATE, betas=(0.9, 0.98), weight_decay=0.0,
            fused=True, capturable=on_gpu,
        )  # fmt: skip
        self.factor = torch.ones((), device=device)
        self._micro = micro_conditions(batch).to(device)
        # In bf16 the fused attention's backward takes five times as long as its matrix products on a CPU.
        fused = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        self._attention = fused if on_gpu else [SDPBackend.MATH]
        self._graph: torch.cuda.CUDAGraph | None = None
        self._given: tuple[Tensor, ...] = ()
        self._losses = torch.zeros(2, device=device)

    def __call__(self, ids: Tensor, tokens: Tensor, masked: Tensor, factor: float) -> Tensor:
        """One step at so many times the rates -> (loss, loss of the places), on the device."""
        self.factor.fill_(factor)
        for group in self.adam.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(_RATE * factor)
            else:
                group["lr"] = _RATE * factor
        given = (ids, tokens, masked, read_out(masked))
        if self._graph is None:
            return self._run(*given)
        for place, value in zip(self._given, given, strict=True):
            place.copy_(value)
        self._graph.replay()
        return self._losses

    def capture(self, ids: Tensor, tokens: Tensor, masked: Tensor) -> None:
        """From here on a step is one launch. No step may have been made before: gradients remember their stream."""
        self._given = tuple(value.clone() for value in (ids, tokens, masked, read_out(masked)))
        self.factor.fill_(0.01)
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):  # libraries set themselves up at their first calls
                self._run(*self._given)
        torch.cuda.current_stream().wait_stream(aside)
        self.model.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            losses = self._run(*self._given)
        self._graph, self._losses = graph, losses

    def restore(self, state: State) -> None:
        """From a checkpoint of any device. How Adam is computed stays as it is here: a rate that came from a file lies
        on the host, and a graph would keep the number that it had when it was captured."""
        own = [{key: group[key] for key in ("lr", "capturable", "fused")} for group in self.adam.param_groups]
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])
        for group, kept in zip(self.adam.param_groups, own, strict=True):
            group.update(kept)

    def _run(self, ids: Tensor, tokens: Tensor, masked: Tensor, at: Tensor) -> Tensor:
        capturing = self._device.type == "cuda"
        with (
            torch.autocast(
                self._device.type, self._dtype, enabled=self._dtype != torch.float32, cache_enabled=not capturing
            ),
            sdpa_kernel(self._attention),
        ):
            loss, place = self.model.losses(ids, tokens, masked, at, self._micro)
        self.model.zero_grad(set_to_none=True)
        (loss + _PLACE * place).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.muon.step(self.factor)
        self.adam.step()
        return torch.stack([loss.detach(), place.detach()])


class Pool:
    """Tokenized pictures on the device; some are drawn anew before every batch, in turn."""

    def __init__(self, world: World, tokenizer: VQ, size: int, batch: int, chance: torch.Generator) -> None:
        self._world, self._tokenizer, self._chance, self._batch = world, tokenizer, chance, batch
        self._dtype = choose().dtype
        drawn = [self._fresh(batch) for _ in range(max(1, size // batch))]
        self._codes = torch.cat([codes for codes, _ in drawn])
        self._scenes = Scenes(*(torch.cat(parts) for parts in zip(*(scenes for _, scenes in drawn), strict=True)))
        self._next = 0

    @torch.no_grad()
    def _fresh(self, count: int) -> tuple[Tensor, Scenes]:
        scenes = self._world.sample(count, self._chance, plain=_PLAIN)
        pictures = self._world.draw(scenes).contiguous(memory_format=torch.channels_last)
        with torch.autocast(pictures.device.type, self._dtype, enabled=self._dtype != torch.float32):
            latent = self._tokenizer.latent(pictures)
        return self._tokenizer.quantize.nearest(latent.float()).short(), scenes

    def batches(self) -> Iterator[tuple[Tensor, Scenes]]:
        """Endless (codes (B, h, w) int64, scenes)."""
        turn = 0
        while True:
            # A whole batch anew every so many: few large launches rather than many small ones.
            if turn % _USES == _USES - 1:
                codes, scenes = self._fresh(self._batch)
                place = slice(self._next, self._next + self._batch)
                self._codes[place] = codes
                for kept, new in zip(self._scenes, scenes, strict=True):
                    kept[place] = new
                self._next = (self._next + self._batch) % len(self._codes)
            turn += 1
            at = torch.randint(len(self._codes), (self._batch,), generator=self._chance, device=self._codes.device)
            yield self._codes[at].long(), Scenes(*(field[at] for field in self._scenes))


def micro_conditions(rows: int) -> Tensor:
    """(R, 5): width, height, crop x, crop y, aesthetic score, as the pipeline gives them."""
    return torch.tensor([[pretrain_vq.PICTURE, pretrain_vq.PICTURE, 0.0, 0.0, 6.0]]).repeat(rows, 1)


def train(
    run: Path,
    minutes: float,
    text: ClipTokenizer,
    *,
    batch: int,
    rate: float = 1.0,
    pool: int | None = None,
    compiled: bool = False,
    resumable: bool = True,
    seed: int = 0,
) -> Painter:
    """Train for ``minutes`` in all, resuming from the folder ``run``, which has the tokenizer; the averaged model."""
    torch.manual_seed(seed)
    machine = choose()
    device, dtype = machine.device, machine.dtype
    tokenizer = pretrain_vq.read(run).to(device)
    model = Painter(text.vocab_size, text.end).to(device)
    step, average = Step(model, batch, device, dtype), Average(model, 0.998)
    done, before = 0, 0.0
    if state := load(run / "transformer.pt"):
        model.load_state_dict(state["model"])
        step.restore(state)
        average.restore(state["average"])
        done, before = int(state["done"]), float(state["seconds"])
    elif (run / f"{NAME}-1.safetensors").exists():
        model.load_state_dict(load_weights(run, NAME))
        average = Average(model, 0.998)
    if compiled:
        model.compile_layers()
    clock = Clock(minutes, before)
    chance = torch.Generator(device).manual_seed(seed + done)
    world, captions = World(pretrain_vq.PICTURE, device), Captions(text, device)
    size = pool if pool is not None else _POOL if device.type == "cuda" else 2048
    stream = Pool(world, tokenizer, size, batch, chance).batches()
    losses, steps, since, taken = torch.zeros(2, device=device), 0, done, 0
    told, kept = clock.seconds, clock.seconds
    report(stage=NAME, pool=size, filled=clock.seconds)

    def keep() -> None:
        facts = {"samples": done, "seconds": clock.seconds}
        save_weights(run, NAME, average.values, torch.float16, facts)
        if resumable:
            parts = {"model": model.state_dict(), "muon": step.muon.state_dict(), "adam": step.adam.state_dict()}
            save(run / "transformer.pt", parts | {"average": average.state(), "done": done} | facts)

    model.train()
    while clock.share < 1:
        tokens, scenes = next(stream)
        ids = captions.ids(scenes, chance, silent=_SILENT)
        masked = mask_at_random(tuple(tokens.shape), chance, stratified=True)
        if taken == 0 and device.type == "cuda":
            try:
                step.capture(ids, tokens, masked)
                report(stage=NAME, captured=clock.seconds)
            except RuntimeError as error:  # what a driver or a library can't capture: the same steps, launched singly
                report(stage=NAME, captured="no: " + str(error).splitlines()[0])
        losses += step(ids, tokens, masked, rate * warm_hold_decay(clock.share, 1.0, warm=0.01, decay=0.35))
        average.update(model)
        done, steps, taken = done + batch, steps + 1, taken + 1
        if clock.seconds - told > _REPORT:
            finite(losses.sum())
            told_loss, told_place = (losses / steps).tolist()
            speed = (done - since) / (clock.seconds - told)
            report(stage=NAME, done=done, loss=told_loss, place=told_place, speed=speed, seconds=clock.seconds)
            losses.zero_()
            told, steps, since = clock.seconds, 0, done
        if clock.seconds - kept > _KEEP:
            keep()
            kept = clock.seconds
    keep()
    return read(run, text)


def read(run: Path, text: ClipTokenizer) -> Painter:
    """The averaged model that `train` left."""
    model = Painter(text.vocab_size, text.end)
    model.load_state_dict(load_weights(run, NAME))
    return model.eval()
