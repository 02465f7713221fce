"""The VQ tokenizer of aMUSEd: picture <-> grid of codes.

encode:  picture (B, 3, H, W) in 0..1 -> encoder -> quant_conv -> nearest code -> ids (B, h, w), h = H / factor
decode:  ids -> codebook -> post_quant_conv -> decoder -> picture, clipped to 0..1

A convolutional auto-encoder with group norm and no attention (diffusers ``VQModel`` with ``DownEncoderBlock2D`` /
``UpDecoderBlock2D``); parameter names are those of its checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import StylemuseError
from ..kernels.convolution import convolve
from .layers import fresh

_EPSILON = 1e-6


@dataclass(frozen=True)
class VQConfig:
    """Sizes of the tokenizer, as in ``vqvae/config.json``. The spatial factor is 2 ** (levels - 1)."""

    block_out_channels: tuple[int, ...] = (128, 256, 256, 512, 768)
    layers_per_block: int = 2
    latent_channels: int = 64
    num_vq_embeddings: int = 8192
    norm_num_groups: int = 32
    vq_embed_dim: int | None = None
    in_channels: int = 3
    out_channels: int = 3

    @property
    def factor(self) -> int:
        """Pixels per token along one side."""
        return 1 << (len(self.block_out_channels) - 1)

    @property
    def embed_dim(self) -> int:
        """Width of a code; the latent's unless the file says otherwise."""
        return self.vq_embed_dim or self.latent_channels

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> VQConfig:
        """From a diffusers config; anything this class does not compute is an error that names it."""
        _only(config, "act_fn", ("silu",))
        _only(config, "norm_type", ("group",))
        _only(config, "lookup_from_codebook", (True,))
        _only(config, "mid_block_add_attention", (False,))
        for name, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            for block in config.get(name, ()):
                if block != kind:
                    raise StylemuseError(f"vqvae config: {name} has {block!r}; supported: {kind!r}")
        fields = {name: config[name] for name in cls.__dataclass_fields__ if name in config}
        fields["block_out_channels"] = tuple(fields.get("block_out_channels", cls.block_out_channels))
        return cls(**fields)


class Conv(nn.Conv2d):
    """torch's, whose fp32 is fp32 on a GPU too (`kernels.convolution`); square, and with zeros around."""

    def forward(self, x: Tensor) -> Tensor:
        stride, padding = self.stride[0], int(self.padding[0])
        return convolve(x, self.weight, self.bias, stride=stride, padding=padding)


class GroupNorm(nn.GroupNorm):
    """torch's, with sums that do not depend on the number of threads.

    On a CPU, torch splits the sums of a channels-last picture among the threads; those of a contiguous one it doesn't.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            # Autocast would widen the picture to fp32 and back; the sums are fp32 inside anyway.
            with torch.autocast(x.device.type, enabled=False):
                return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)
        return super().forward(x.contiguous()).contiguous(memory_format=torch.channels_last)


class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 shortcut where the width changes."""

    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(groups, inputs, eps=_EPSILON)
        self.conv1 = Conv(inputs, outputs, 3, padding=1)
        self.norm2 = GroupNorm(groups, outputs, eps=_EPSILON)
        self.conv2 = Conv(outputs, outputs, 3, padding=1)
        self.conv_shortcut = Conv(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample(nn.Module):
    """Halve the grid: one column and row of zeros at the far side, then a 3x3 convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the grid by repetition, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The residual blocks of one resolution, then the change of resolution, if there is one."""

    def __init__(self, inputs: int, outputs: int, layers: int, groups: int, resample: str | None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(inputs if index == 0 else outputs, outputs, groups) for index in range(layers)
        )
        if resample == "down":
            self.downsamplers = nn.ModuleList([Downsample(outputs)])
        elif resample == "up":
            self.upsamplers = nn.ModuleList([Upsample(outputs)])

    def forward(self, x: Tensor) -> Tensor:
        for module in self.children():
            for block in module.children():
                x = block(x)
        return x


class Encoder(nn.Module):
    """Picture (B, 3, H, W) -> latent (B, latent, h, w)."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = Conv(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Level(
                widths[max(i - 1, 0)],
                widths[i],
                config.layers_per_block,
                groups,
                "down" if i + 1 < len(widths) else None,
            )
            for i in range(len(widths))
        )
        self.mid_block = Level(widths[-1], widths[-1], 2, groups, None)
        self.conv_norm_out = GroupNorm(groups, widths[-1], eps=_EPSILON)
        self.conv_out = Conv(widths[-1], config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """Latent (B, latent, h, w) -> picture (B, 3, H, W), not clipped."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = Conv(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = Level(widths[0], widths[0], 2, groups, None)
        self.up_blocks = nn.ModuleList(
            Level(
                widths[max(i - 1, 0)],
                widths[i],
                config.layers_per_block + 1,
                groups,
                "up" if i + 1 < len(widths) else None,
            )
            for i in range(len(widths))
        )
        self.conv_norm_out = GroupNorm(groups, widths[-1], eps=_EPSILON)
        self.conv_out = Conv(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Codebook(nn.Module):
    """The table of codes and the search for the nearest one."""

    def __init__(self, codes: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codes, width, _weight=fresh(codes, width, std=1.0))

    def nearest(self, latent: Tensor) -> Tensor:
        """Latent (B, D, h, w) -> ids (B, h, w) of the nearest codes; |z - e|^2 without the constant |z|^2, in fp32."""
        flat = latent.permute(0, 2, 3, 1).float()
        table = self.embedding.weight.float()
        distance = torch.addmm(table.square().sum(1), flat.reshape(-1, flat.shape[-1]), table.t(), alpha=-2.0)
        return distance.argmin(1).view(flat.shape[:-1])

    def look_up(self, ids: Tensor) -> Tensor:
        """Ids (B, h, w) -> codes (B, D, h, w)."""
        return self.embedding(ids).permute(0, 3, 1, 2)


class VQ(nn.Module):
    """Tokenizer of pictures; see the module's text."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv = Conv(config.latent_channels, config.embed_dim, 1)
        self.quantize = Codebook(config.num_vq_embeddings, config.embed_dim)
        self.post_quant_conv = Conv(config.embed_dim, config.latent_channels, 1)
        self.decoder = Decoder(config)

    def latent(self, pictures: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in 0..1 -> continuous latents (B, D, h, w), before the codebook."""
        return self.quant_conv(self.encoder(pictures))

    def encode(self, pictures: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in 0..1 -> ids (B, h, w) int64."""
        return self.quantize.nearest(self.latent(pictures))

    def render(self, codes: Tensor) -> Tensor:
        """Codes (B, D, h, w) -> pictures (B, 3, H, W), not clipped (training needs the gradient outside 0..1)."""
        return self.decoder(self.post_quant_conv(codes))

    def decode(self, ids: Tensor) -> Tensor:
        """Ids (B, h, w) -> pictures (B, 3, H, W) in 0..1."""
        return self.render(self.quantize.look_up(ids)).clamp(0.0, 1.0)


def channels_last(model: VQ) -> VQ:
    """The same model with its weights laid out for channels-last pictures, which convolutions are fastest on."""
    for parameter in model.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return model


def _only(config: Mapping[str, Any], name: str, allowed: tuple[Any, ...]) -> None:
    if name in config and config[name] not in allowed:
        raise StylemuseError(f"vqvae config: {name} = {config[name]!r}; supported: {', '.join(map(repr, allowed))}")
