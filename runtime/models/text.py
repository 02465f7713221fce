"""CLIP's text tower: token ids -> the features and the pooled vector that condition the image transformer.

Law, for ids (R, L), width D, P = projection width:

    x_0 = token[ids] + position[:L]
    x_{i+1} = y + mlp(norm2(y)),  y = x_i + attention(norm1(x_i))        causal, pre-norm
    penultimate = x_{layers - 1}                                         the input of the last layer, not normalized
    pooled = norm(x_layers)[end of text] projection^T

Source: Radford et al. 2021 (CLIP); numbers agree with transformers' CLIPTextModelWithProjection (modeling_clip.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core import StylemuseError


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x), the approximation OpenAI trained CLIP with."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "quick_gelu": quick_gelu}

# Configurations written before transformers 4.32 carry this wrong number; it stands for "pool at the highest id".
LEGACY_END = 2


@dataclass(frozen=True)
class ClipTextConfig:
    """Sizes of the text tower, under the names of transformers' ``text_encoder/config.json``.

    Attributes:
        eos_token_id: the id to pool at (its first place in a row), or 2 for the place of the highest id.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    projection_dim: int
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = LEGACY_END

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and (not isinstance(value, int) or value < 1):
                raise StylemuseError(f"text encoder: {field.name} is {value!r}; a positive integer is needed")
        if self.hidden_size % self.num_attention_heads:
            raise StylemuseError(
                f"text encoder: hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.hidden_act not in ACTIVATIONS:
            raise StylemuseError(
                f"text encoder: hidden_act {self.hidden_act!r} is not supported; allowed: {', '.join(ACTIVATIONS)}"
            )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> ClipTextConfig:
        """Reads the content of a ``config.json``; entries that do not change the result are passed over.

        Raises StylemuseError for another kind of model, a missing size or an impossible one.
        """
        kind = config.get("model_type", "clip_text_model")
        if kind != "clip_text_model":
            raise StylemuseError(f"text encoder: model_type {kind!r} is not supported; allowed: clip_text_model")
        known = {field.name: config[field.name] for field in fields(cls) if field.name in config}
        try:
            return cls(**known)
        except TypeError as error:
            missing = str(error).partition(": ")[2]
            raise StylemuseError(f"text encoder: config.json does not give {missing}") from error

    def to_dict(self) -> dict[str, Any]:
        """The content of a ``config.json`` that transformers reads too."""
        kind = {"architectures": ["CLIPTextModelWithProjection"], "model_type": "clip_text_model"}
        # Not used, but transformers' own default lies outside a small vocabulary, which it warns of.
        return {**kind, "bos_token_id": None, **asdict(self)}


class TextOutput(NamedTuple):
    """What a prompt becomes.

    Attributes:
        penultimate: (R, L, D), the hidden states before the last layer.
        pooled: (R, P), the projected state at the end of the text.
    """

    penultimate: Tensor
    pooled: Tensor


class CausalAttention(nn.Module):
    """Causal self-attention with q, k and v in one projection: (R, L, D) -> (R, L, D)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        projected: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return projected


class TextLayer(nn.Module):
    """One pre-norm transformer layer: attention, then a two-layer perceptron, each added to its input."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attention = CausalAttention(width, config.num_attention_heads)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.widen = nn.Linear(width, config.intermediate_size)
        self.narrow = nn.Linear(config.intermediate_size, width)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        added: Tensor = self.narrow(self.activation(self.widen(self.norm2(x))))
        return x + added


class ClipText(nn.Module):
    """CLIP's text tower with its projection; fresh weights follow CLIP's initialization, so it trains from scratch."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.config = config
        self.token = _table(config.vocab_size, config.hidden_size)
        self.position = _table(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(TextLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)
        if not self.norm.weight.is_meta:
            self._initialize()

    def forward(self, ids: Tensor) -> TextOutput:
        """Runs the tower.

        Args:
            ids: (R, L) int64 with 1 <= L <= max_position_embeddings; each row holds the end token, as ClipTokenizer
                writes it.

        Raises StylemuseError when L is too long.
        """
        length = ids.shape[1]
        if length > self.config.max_position_embeddings:
            raise StylemuseError(
                f"text encoder: {length} tokens given; at most {self.config.max_position_embeddings} are allowed"
            )
        x = self.token(ids) + self.position.weight[:length]
        penultimate = x
        for layer in self.layers:
            penultimate, x = x, layer(x)
        end = self._end(ids)
        # Normalization acts on each position alone, so only the pooled one has to be normalized.
        pooled = self.projection(self.norm(x[torch.arange(len(ids), device=ids.device), end]))
        return TextOutput(penultimate, pooled)

    def _end(self, ids: Tensor) -> Tensor:
        """(R,) place of the end of the text: the first of equals, for padding may repeat the end token."""
        if self.config.eos_token_id == LEGACY_END:
            return ids.int().argmax(dim=-1)
        return (ids == self.config.eos_token_id).int().argmax(dim=-1)

    def _initialize(self) -> None:
        """CLIP's initialization: the residual branches shrink with depth (Radford et al. 2021, section 2.4)."""
        width = self.config.hidden_size
        residual = (2 * len(self.layers)) ** -0.5
        nn.init.normal_(self.token.weight, std=0.02)
        nn.init.normal_(self.position.weight, std=0.01)
        nn.init.normal_(self.projection.weight, std=width**-0.5)
        for name, module in self.layers.named_modules():
            if isinstance(module, nn.Linear):
                std = (2 * width) ** -0.5 if name.endswith("widen") else width**-0.5
                nn.init.normal_(module.weight, std=std * residual if name.endswith(("out", "narrow")) else std)
                nn.init.zeros_(module.bias)


def _table(rows: int, width: int) -> nn.Embedding:
    # With a weight given, nn.Embedding draws none, which on the meta device would import torch's compiler.
    return nn.Embedding(rows, width, _weight=torch.empty(rows, width))
