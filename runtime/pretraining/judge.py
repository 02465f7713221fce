"""The judge: a small convnet that names a picture's subject and look, and measures how far apart two styles are.

It is trained on the world's own pictures, held-out looks and hand too (`judge_training`). How often it is right, and
how well its distance ignores the subject, is measured by `examine`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn

from ..core import StylemuseError
from .attributes import COLOURS, EXTRAS, HANDS, RENDERINGS, SUBJECTS, Look

PICTURE = 128
HEADS: Mapping[str, tuple[str, ...]] = {
    "subject": tuple(SUBJECTS),
    "hand": tuple(HANDS),
    "rendering": RENDERINGS,
    "ink": ("none", *COLOURS),
    "paper": tuple(COLOURS),
    "extra": EXTRAS,
}
"""What each head tells apart."""

STYLE = ("rendering", "ink", "paper", "extra")
"""What the style distance compares. A hand is a set of shapes, which no channel statistics see: it has a name only."""
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
    """(B, 3, 128, 128) in 0..1 -> `Opinion`; about 0.9 million parameters.

    Two by two pixels are one place of the first layer, so that nothing fine is averaged away.
    Subject and hand are read from the last layer. The look is read from channel statistics of every stage: fine texture
    (halftone, grid, pixels) is gone in the last one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Sequential(_layer(12, 32, 5, stride=2))
        self.middle = nn.Sequential(_layer(32, 64, stride=2), _layer(64, 64))
        self.last = nn.Sequential(_layer(64, 128, stride=2), _layer(128, 128), _layer(128, 128))
        self.shape = nn.Sequential(nn.Flatten(), nn.Dropout(0.1))
        self.shapes = nn.ModuleDict({head: nn.Linear(128 * 16, len(HEADS[head])) for head in ("subject", "hand")})
        self.texture = _layer(64, 128, 1)
        self.hidden = nn.Sequential(nn.BatchNorm1d(_STATISTICS), nn.Linear(_STATISTICS, 192), nn.ReLU())
        self.looks = nn.ModuleDict({head: nn.Linear(192, len(HEADS[head])) for head in STYLE})
        for parameter in self.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)

    def forward(self, pictures: Tensor) -> Opinion:
        fine = self.fine((F.pixel_unshuffle(pictures, 2).contiguous(memory_format=torch.channels_last) - 0.5) * 4)
        middle = self.middle(fine)
        last = self.last(middle)
        statistics = _statistics(middle)
        others = [_statistics(layer) for layer in (fine, self.texture(middle), last)]
        hidden = self.hidden(torch.cat([statistics, *others], dim=1))
        shape = self.shape(F.max_pool2d(last, 2))
        logits = {head: layer(shape) for head, layer in self.shapes.items()}
        return Opinion(logits | {head: layer(hidden) for head, layer in self.looks.items()}, statistics)

    @torch.no_grad()
    def opinion(self, pictures: Tensor) -> Opinion:
        """`forward` in pieces of 64, without gradients."""
        parts = [self(part) for part in pictures.split(64)]
        logits = {head: torch.cat([part.logits[head] for part in parts]) for head in HEADS}
        return Opinion(logits, torch.cat([part.statistics for part in parts]))


def style_distance(judge: Judge, a: Tensor, b: Tensor) -> Tensor:
    """How far apart the styles of pictures a and b (B, 3, 128, 128) are, whatever they show: (B,) in 0..1.

        d = (mean over rendering, ink, paper, extra of TV(p_a, p_b)  +  |s_a - s_b| / (|s_a| + |s_b|)) / 2

    p are a head's probabilities and TV their total variation: the least chance that one name drawn from each differs;
    where both leave it in the dark to the same degree, they don't differ. That part alone
    saturates: two styles with no name in common are all at 1, however they look. s, means and deviations of a middle
    layer's channels (what style transfer matches: Huang and Belongie, arXiv 1703.06868), orders those, and near misses.
    Both parts are 0 for equal pictures and symmetric. `examine.separation` tells how well d ignores the subject.
    """
    return judge.opinion(a).distance(judge.opinion(b))


def to_tensor(pictures: Sequence[Image.Image]) -> Tensor:
    """Pictures -> (B, 3, 128, 128) in 0..1; those of another size are resized."""
    side = (PICTURE, PICTURE)
    sized = [picture.convert("RGB").resize(side, Image.Resampling.LANCZOS) for picture in pictures]
    pixels = np.stack([np.asarray(picture, dtype=np.float32) for picture in sized])
    return torch.from_numpy(pixels / 255).permute(0, 3, 1, 2).contiguous()


def load_judge(path: Path) -> Judge:
    """The judge in a file that `judge_training.train_judge` wrote."""
    judge = Judge()
    try:
        with safe_open(path, framework="pt") as file:
            judge.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except Exception as error:  # safetensors' and torch's errors share no base
        raise StylemuseError(f"{path} is not a judge of this release: {str(error).splitlines()[0]}") from None
    return judge.eval()


def labels_of(subject: str, look: Look) -> dict[str, str]:
    """The right name of each head."""
    names = (subject, look.hand, look.rendering, look.ink or "none", look.paper, look.extra)
    return dict(zip(HEADS, names, strict=True))


def _layer(inputs: int, outputs: int, kernel: int = 3, *, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def _statistics(features: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, 2 C): each channel's mean and standard deviation over the picture."""
    variance, mean = torch.var_mean(features, dim=(2, 3), correction=0)
    # The root of a channel at rest has a gradient of 1 / (2 sqrt(c)): a small c lets those few drown all others.
    return torch.cat([mean, (variance + 0.01).sqrt()], dim=1)
