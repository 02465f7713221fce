"""The embedded model's recipe: ``python -m stylemuse.tuning.pretrain --run RUN --out MODEL``.

1. a VQ tokenizer on the world's pictures (`pretrain_vq`);
2. the masked transformer and its text encoder together: codes masked at a rate cos(pi u / 2), u uniform, cross-entropy
   on the masked ones (MaskGIT, arXiv 2202.04200, section 3.2), text dropped from one picture in ten;
3. the folder MODEL in diffusers layout, fp16.

Resumable at any point, seeded, in parts: checkpoints lie in RUN, and ``--samples`` may change from part to part. Where
RUN has no checkpoint, ``--start`` names a model folder of the same sizes to go on from; ``--tokenizer`` one whose VQ
tokenizer is taken as it is. ``--compile`` takes a C++ compiler and a minute, and doubles the speed in bf16.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import weights
from ..folder import write_model
from ..machine import choose
from ..models.amused import Amused, AmusedConfig
from ..models.layers import Linear
from ..models.text import ClipText, ClipTextConfig
from ..models.tokenizer import ClipTokenizer, build_word_tokenizer
from ..models.vq import VQ, channels_last
from . import pretrain_vq
from .looks import Look, random_caption, vocabulary
from .muon import Muon
from .training import Average, finite, load, mask_at_random, report, save, warm_hold_decay
from .world import World

TEXT_LENGTH = 20
# The network has no position embeddings: a position is known by the zeros at the border that its convolutions have
# reached. On the 8 x 8 working grid it takes four of them, before the layers that mix all positions. The cross-entropy
# alone never makes them tell (see `Painter.place`).
TRANSFORMER = AmusedConfig(
    hidden_size=192,
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
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=512,
    sample_size=16,
)
_BATCH = 32
_RATE = 2e-3  # of AdamW: embeddings, convolutions, vectors
_MATRIX_RATE = 4e-3  # of Muon: all other matrices
_WARM, _DECAY = 100 * _BATCH, 0.4  # samples of the rate's rise; share of the run in which it falls
_TEXT_DROPOUT = 0.1
_REPORT = 100
_PLACE = 0.2  # weight of the loss on places
_USES = 8  # times a tokenized picture is trained on, each time masked and captioned anew
_POOL = 8192  # tokenized pictures at hand, once so many were made


class Painter(nn.Module):
    """Text encoder and transformer as one module: captions and masked codes in, logits of the masked positions out.

    ``place`` is there for training only: it names each place of the working grid from what enters the layers. Without
    it, 92 k samples left the layers with no idea where a token is; with it, 6 k samples do.
    """

    def __init__(self, vocabulary_size: int, end: int) -> None:
        super().__init__()
        self.text = ClipText(
            ClipTextConfig(
                vocab_size=vocabulary_size,
                hidden_size=TRANSFORMER.encoder_hidden_size,
                intermediate_size=256,
                num_hidden_layers=3,
                num_attention_heads=4,
                projection_dim=TRANSFORMER.cond_embed_dim,
                max_position_embeddings=TEXT_LENGTH,
                eos_token_id=end,
            )
        )
        # Words must outweigh what the untrained layers add to them, or all captions look alike for long.
        nn.init.normal_(self.text.token.weight, std=0.3)
        self.transformer = Amused(TRANSFORMER)
        depth = (2 * TRANSFORMER.num_hidden_layers) ** -0.5
        for module in self.transformer.modules():
            if isinstance(module, Linear):
                last = module.name.endswith(("to_out", "ff.down", "channelwise_linear_2"))
                nn.init.normal_(module.weight, std=module.weight.shape[1] ** -0.5 * (depth if last else 1.0))

        self.place = nn.Linear(TRANSFORMER.hidden_size, (TRANSFORMER.sample_size // 2) ** 2)
        self.draw = self._draw

    def compile_layers(self) -> None:
        """Let torch compile what is static in shape; the head sees another number of positions each time."""
        self.draw = torch.compile(self._draw, dynamic=False)

    def forward(self, ids: Tensor, tokens: Tensor, masked: Tensor, micro: Tensor) -> tuple[Tensor, Tensor]:
        """ids (R, L), tokens (R, h, w), masked (R, h, w) bool -> logits (M, K) of the masked positions in order, and
        logits (R, P, P) of each working position's place."""
        text = self.text(ids)
        given = tokens.masked_fill(masked, TRANSFORMER.mask_id)
        features, places = self.draw(given, text.penultimate, text.pooled, micro)
        return self.transformer.logits(self.transformer.readout(features[masked.flatten(1)])), places

    def _draw(self, tokens: Tensor, text: Tensor, pooled: Tensor, micro: Tensor) -> tuple[Tensor, Tensor]:
        conditioning = self.transformer.condition(text, pooled, micro)
        entered = self.transformer.enter(tokens, conditioning)
        places = self.place(F.layer_norm(entered, entered.shape[-1:]))
        return self.transformer.leave(entered, self.transformer.working_grid(tokens), conditioning), places


Item = tuple[str, Look, Tensor]
"""Subject, look and codes (h, w) of a picture."""


class Pool:
    """Tokenized pictures, each used a few times; fresh ones join, and at `_POOL` of them take others' places."""

    def __init__(self, tokenizer: VQ, generator: np.random.Generator) -> None:
        self.tokenizer, self.generator = tokenizer, generator
        self.source = World(pretrain_vq.PICTURE).samples(generator)
        self.items: list[Item] = []

    def _fresh(self, count: int) -> list[Item]:
        drawn = [next(self.source) for _ in range(count)]
        pictures = torch.from_numpy(np.stack([picture for _, _, picture in drawn])).permute(0, 3, 1, 2)
        pictures = pictures.to(self.tokenizer.quantize.embedding.weight.device)
        with torch.no_grad():
            codes = self.tokenizer.encode(pictures.contiguous(memory_format=torch.channels_last)).cpu()
        return [(subject, look, grid) for (subject, look, _), grid in zip(drawn, codes, strict=True)]

    def batches(self) -> Iterator[list[Item]]:
        """Endless batches."""
        self.items.extend(self._fresh(_BATCH * _USES))
        while True:
            for item in self._fresh(_BATCH // _USES):
                if len(self.items) < _POOL:
                    self.items.append(item)
                else:
                    self.items[int(self.generator.integers(_POOL))] = item
            chosen = self.generator.choice(len(self.items), size=_BATCH, replace=False)
            yield [self.items[index] for index in chosen]


def micro_conditions(rows: int) -> Tensor:
    """(R, 5): width, height, crop x, crop y, aesthetic score, as the pipeline gives them."""
    return torch.tensor([[pretrain_vq.PICTURE, pretrain_vq.PICTURE, 0.0, 0.0, 6.0]]).repeat(rows, 1)


def train(
    run: Path,
    tokenizer: VQ,
    text: ClipTokenizer,
    samples: int,
    *,
    start: Path | None = None,
    compiled: bool = False,
    seed: int = 0,
) -> Painter:
    """Train until ``samples`` were seen, resuming from ``run/transformer.pt``; returns the averaged model."""
    torch.manual_seed(seed)
    machine = choose()
    device, dtype = machine.device, machine.dtype
    model = Painter(text.vocab_size, text.end).to(device)
    if start is not None:
        weights.load_into(model.text, weights.read(start / "text_encoder"), weights.CLIP_TEXT)
        weights.load_into(model.transformer, weights.read(start / "transformer"), weights.AMUSED)
    if compiled:
        model.compile_layers()
    muon, adam = _optimizers(model, dtype)
    average = Average(model, 0.9985)
    path, done = run / "transformer.pt", 0
    if state := load(path):
        model.load_state_dict(state["model"])
        muon.load_state_dict(state["muon"])
        adam.load_state_dict(state["adam"])
        average.restore(state["average"])
        done = state["done"]
    numbers = np.random.default_rng([seed, 2, done])
    masks = torch.Generator().manual_seed(seed + done)
    stream, micro = Pool(tokenizer.to(device), numbers).batches(), micro_conditions(_BATCH).to(device)
    began, step, losses = time.monotonic(), 0, torch.zeros(2, device=device)
    model.train()
    while done < samples:
        factor = warm_hold_decay(done, samples, warm=_WARM, decay=_DECAY)
        for group in adam.param_groups:
            group["lr"] = _RATE * factor
        batch = next(stream)
        dropped = numbers.random(_BATCH) < _TEXT_DROPOUT
        captions = [
            "" if drop else random_caption(subject, look, numbers)
            for drop, (subject, look, _) in zip(dropped, batch, strict=True)
        ]
        tokens = torch.stack([grid for _, _, grid in batch]).to(device)
        masked = mask_at_random(tuple(tokens.shape), masks).to(device)
        # In bf16 the fused attention's backward takes five times as long as its matrix products.
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32), sdpa_kernel(SDPBackend.MATH):
            logits, named = model(text(captions).to(device), tokens, masked, micro)
        loss = F.cross_entropy(logits.float(), tokens[masked])
        place = F.cross_entropy(named.float().flatten(0, 1), torch.arange(named.shape[1], device=device).repeat(_BATCH))
        model.zero_grad(set_to_none=True)
        (finite(loss) + _PLACE * place).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        muon.step(factor)
        adam.step()
        average.update(model)
        done, step = done + _BATCH, step + 1
        losses += torch.stack([loss.detach(), place.detach()]) / _REPORT
        if step % _REPORT == 0:
            seconds = time.monotonic() - began
            report(stage="transformer", done=done, loss=float(losses[0]), place=float(losses[1]), seconds=seconds)
            losses.zero_()
        if step % 400 == 0 or done >= samples:
            parts = {"model": model.state_dict(), "muon": muon.state_dict(), "adam": adam.state_dict()}
            save(path, parts | {"average": average.state(), "done": done})
    model.load_state_dict(average.values)
    tokenizer.cpu()
    return model.cpu().eval()


def _optimizers(model: Painter, dtype: torch.dtype) -> tuple[Muon, torch.optim.AdamW]:
    """Muon for the matrices of linear layers, AdamW for everything else."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    matrices = [value for value in model.parameters() if value.ndim == 2 and id(value) not in embeddings]
    chosen = {id(value) for value in matrices}
    others = [value for value in model.parameters() if id(value) not in chosen]
    adam = torch.optim.AdamW(others, lr=_RATE, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    return Muon(matrices, rate=_MATRIX_RATE, dtype=dtype), adam


def main() -> None:
    """The command; see the module's text."""
    parser = argparse.ArgumentParser(prog="python -m stylemuse.tuning.pretrain", description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of checkpoints")
    parser.add_argument("--out", type=Path, required=True, help="model folder to write")
    parser.add_argument("--start", type=Path, help="model folder to go on from")
    parser.add_argument("--tokenizer", type=Path, help="model folder whose VQ tokenizer is taken as it is")
    parser.add_argument("--compile", action="store_true", help="let torch compile the transformer")
    parser.add_argument("--vq-samples", type=int, default=40_000)
    parser.add_argument("--samples", type=int, default=160_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    text = build_word_tokenizer(vocabulary(), options.out / "tokenizer", TEXT_LENGTH)
    if options.tokenizer is not None:
        tokenizer = VQ(pretrain_vq.CONFIG)
        weights.load_into(channels_last(tokenizer), weights.read(options.tokenizer / "vqvae"), weights.VQ)
    else:
        tokenizer = pretrain_vq.train(options.run, options.vq_samples, start=options.start, seed=options.seed)
    painter = train(
        options.run,
        tokenizer.eval(),
        text,
        options.samples,
        start=options.start,
        compiled=options.compile,
        seed=options.seed,
    )
    write_model(options.out, painter.transformer, tokenizer, painter.text)


if __name__ == "__main__":
    main()
