"""The judge: a small convnet that names a picture's subject and look, and measures how far apart two styles are.

It is trained on the world's own pictures, held-out looks too, with a generator's small flaws put on them (`flaws`).
How often it is right, and how well its distance ignores the subject, is measured by `examine`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..core import StylemuseError
from .flaws import flawed
from .looks import COLOURS, EXTRAS, RENDERINGS, SUBJECTS, Look
from .pictograms import Array
from .training import finite, load, report, save, warm_hold_decay
from .world import World

PICTURE = 64
HEADS: Mapping[str, tuple[str, ...]] = {
    "subject": tuple(SUBJECTS),
    "rendering": RENDERINGS,
    "ink": ("none", *COLOURS),
    "paper": tuple(COLOURS),
    "extra": EXTRAS,
}
"""What each head tells apart. A style is all but the subject."""

STYLE = tuple(head for head in HEADS if head != "subject")
SAMPLES = 60_000
_BATCH = 64
_USES = 3  # times a drawn picture is trained on, each time with other flaws
_POOL = 4096  # drawn pictures at hand
_KEEP = 200  # steps between saved states
_RATE = 3e-3
_STATISTICS = 2 * (32 + 64 + 128 + 128)  # means and deviations of the channels that tell the look


@dataclass(frozen=True)
class Opinion:
    """What the judge sees in B pictures.

    Attributes:
        logits: by head, (B, number of names).
        statistics: (B, C) means and deviations of a middle layer's channels over the picture.
    """

    logits: Mapping[str, Tensor]
    statistics: Tensor

    def names(self, head: str = "subject") -> list[str]:
        """The likeliest name per picture."""
        return [HEADS[head][index] for index in self.logits[head].argmax(dim=1).tolist()]

    def take(self, rows: Tensor) -> Opinion:
        """The opinion of these rows (B',), which may repeat."""
        return Opinion({head: logits[rows] for head, logits in self.logits.items()}, self.statistics[rows])

    def distance(self, other: Opinion) -> Tensor:
        """(B,) style distances, row by row; see `style_distance`."""
        named = [
            (self.logits[head].softmax(dim=1) - other.logits[head].softmax(dim=1)).abs().sum(dim=1) / 2
            for head in STYLE
        ]
        one, two = self.statistics, other.statistics
        apart = (one - two).norm(dim=1) / (one.norm(dim=1) + two.norm(dim=1)).clamp(min=1e-12)
        return (torch.stack(named).mean(dim=0) + apart) / 2


class Judge(nn.Module):
    """(B, 3, 64, 64) in 0..1 -> `Opinion`; about half a million parameters.

    The subject is read from the last layer. The look is read from channel statistics of every stage: fine texture
    (halftone, grid, pixels) is gone in the last one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Sequential(_layer(3, 32, 5, stride=2))
        self.middle = nn.Sequential(_layer(32, 64, stride=2), _layer(64, 64))
        self.last = nn.Sequential(_layer(64, 128, stride=2), _layer(128, 128), _layer(128, 128))
        self.shape = nn.Sequential(nn.Flatten(), nn.Dropout(0.1), nn.Linear(128 * 16, len(SUBJECTS)))
        self.texture = _layer(64, 128, 1)
        self.hidden = nn.Sequential(nn.BatchNorm1d(_STATISTICS), nn.Linear(_STATISTICS, 192), nn.ReLU())
        self.looks = nn.ModuleDict({head: nn.Linear(192, len(HEADS[head])) for head in STYLE})
        for parameter in self.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)

    def forward(self, pictures: Tensor) -> Opinion:
        fine = self.fine((pictures.contiguous(memory_format=torch.channels_last) - 0.5) * 4)
        middle = self.middle(fine)
        last = self.last(middle)
        statistics = _statistics(middle)
        others = [_statistics(layer) for layer in (fine, self.texture(middle), last)]
        hidden = self.hidden(torch.cat([statistics, *others], dim=1))
        logits = {"subject": self.shape(F.max_pool2d(last, 2))}
        return Opinion(logits | {head: layer(hidden) for head, layer in self.looks.items()}, statistics)

    @torch.no_grad()
    def opinion(self, pictures: Tensor) -> Opinion:
        """`forward` in pieces of 64, without gradients."""
        parts = [self(part) for part in pictures.split(64)]
        logits = {head: torch.cat([part.logits[head] for part in parts]) for head in HEADS}
        return Opinion(logits, torch.cat([part.statistics for part in parts]))


def style_distance(judge: Judge, a: Tensor, b: Tensor) -> Tensor:
    """How far apart the styles of pictures a and b (B, 3, 64, 64) are, whatever they show: (B,) in 0..1.

        d = (mean over rendering, ink, paper, extra of TV(p_a, p_b)  +  |s_a - s_b| / (|s_a| + |s_b|)) / 2

    p are a head's probabilities and TV their total variation: the least chance that one name drawn from each differs;
    where both leave it in the dark to the same degree, they don't differ. That part alone
    saturates: two styles with no name in common are all at 1, however they look. s, means and deviations of a middle
    layer's channels (what style transfer matches: Huang and Belongie, arXiv 1703.06868), orders those, and near misses.
    Both parts are 0 for equal pictures and symmetric. `examine.separation` tells how well d ignores the subject.
    """
    return judge.opinion(a).distance(judge.opinion(b))


def to_tensor(pictures: Sequence[Image.Image] | Sequence[Array]) -> Tensor:
    """Pictures (PIL, or fp32 (64, 64, 3) in 0..1) -> (B, 3, 64, 64); PIL ones of another size are resized."""
    arrays: list[Array] = []
    for picture in pictures:
        if isinstance(picture, Image.Image):
            small = picture.convert("RGB").resize((PICTURE, PICTURE), Image.Resampling.LANCZOS)
            arrays.append(np.asarray(small, dtype=np.float32) / 255)
        else:
            arrays.append(picture)
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def train_judge(path: Path, samples: int = SAMPLES, seed: int = 0) -> Judge:
    """The judge in ``path``; where there is none, or one made with other samples or seed, it is trained there.

    That takes about 6 minutes on one core. Interrupted, it goes on from ``path`` with the ending ".partial.pt".
    """
    made_with = {"samples": str(samples), "seed": str(seed)}
    if path.exists() and _made_with(path) == made_with:
        return load_judge(path)
    partial = path.with_suffix(".partial.pt")
    with torch.random.fork_rng(devices=[]):
        judge = _trained(partial, samples, seed, made_with)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".partial")
    save_file({name: value.contiguous() for name, value in judge.state_dict().items()}, fresh, metadata=made_with)
    os.replace(fresh, path)
    partial.unlink(missing_ok=True)
    return judge


def _trained(partial: Path, samples: int, seed: int, made_with: Mapping[str, str]) -> Judge:
    torch.manual_seed(seed)
    judge, done = Judge().train(), 0
    optimizer = torch.optim.AdamW(judge.parameters(), lr=_RATE, weight_decay=0.02)
    if (state := load(partial)) and state["made_with"] == made_with:
        judge.load_state_dict(state["judge"])
        optimizer.load_state_dict(state["optimizer"])
        done = state["done"]
    chance = torch.Generator().manual_seed(seed + done)
    stream, began, step = _batches(np.random.default_rng([seed, 0, done])), time.monotonic(), 0
    while done < samples:
        for group in optimizer.param_groups:
            group["lr"] = _RATE * warm_hold_decay(done, samples, warm=50 * _BATCH, decay=0.6)
        pictures, labels = next(stream)
        opinion = judge(flawed(pictures, chance))
        losses = {head: F.cross_entropy(opinion.logits[head], labels[head], label_smoothing=0.02) for head in HEADS}
        optimizer.zero_grad(set_to_none=True)
        finite(torch.stack(list(losses.values())).sum()).backward()
        optimizer.step()
        done, step = done + _BATCH, step + 1
        if step % 50 == 0:
            shown = {head: float(loss.detach()) for head, loss in losses.items()}
            report(stage="judge", done=done, seconds=time.monotonic() - began, **shown)
        if step % _KEEP == 0 and done < samples:
            parts = {"judge": judge.state_dict(), "optimizer": optimizer.state_dict()}
            save(partial, parts | {"made_with": dict(made_with), "done": done})
    return judge.eval()


def load_judge(path: Path) -> Judge:
    """The judge in a file that `train_judge` wrote."""
    judge = Judge()
    try:
        with safe_open(path, framework="pt") as file:
            judge.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except Exception as error:  # safetensors' and torch's errors share no base
        raise StylemuseError(f"{path} is not a judge of this release: {str(error).splitlines()[0]}") from None
    return judge.eval()


def _made_with(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: value for name, value in (file.metadata() or {}).items() if name in ("samples", "seed")}
    except Exception as error:  # safetensors' errors share no base
        raise StylemuseError(f"{path} is not a safetensors file: {str(error).splitlines()[0]}") from None


def labels_of(subject: str, look: Look) -> dict[str, str]:
    """The right name of each head."""
    names = (subject, look.rendering, look.ink or "none", look.paper, look.extra)
    return dict(zip(HEADS, names, strict=True))


def _batches(numbers: np.random.Generator) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Endless (pictures (B, 3, 64, 64), by head the index of the right name (B,)), from a pool always renewed."""
    source = World(PICTURE).samples(numbers, held_out=True)
    pictures, answers = (
        torch.zeros(_POOL, 3, PICTURE, PICTURE, dtype=torch.uint8),
        torch.zeros(_POOL, len(HEADS), dtype=torch.int64),
    )

    def draw(places: Sequence[int]) -> None:
        drawn = [next(source) for _ in places]
        pictures[list(places)] = (to_tensor([picture for _, _, picture in drawn]) * 255).round().to(torch.uint8)
        named = [labels_of(subject, look) for subject, look, _ in drawn]
        answers[list(places)] = torch.tensor([[HEADS[head].index(label[head]) for head in HEADS] for label in named])

    draw(range(_POOL))
    while True:
        draw(numbers.choice(_POOL, size=_BATCH // _USES, replace=False).tolist())
        chosen = torch.from_numpy(numbers.choice(_POOL, size=_BATCH, replace=False))
        yield pictures[chosen].float() / 255, dict(zip(HEADS, answers[chosen].unbind(dim=1), strict=True))


def _layer(inputs: int, outputs: int, kernel: int = 3, *, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def _statistics(features: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, 2 C): each channel's mean and standard deviation over the picture."""
    variance, mean = torch.var_mean(features, dim=(2, 3), correction=0)
    # The root of a channel at rest has a gradient of 1 / (2 sqrt(c)): a small c lets those few drown all others.
    return torch.cat([mean, (variance + 0.01).sqrt()], dim=1)
