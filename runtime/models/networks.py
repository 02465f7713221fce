"""The networks of one model, together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .amused import Amused
from .text import ClipText
from .tokenizer import ClipTokenizer
from .vq import VQ


@dataclass(frozen=True)
class Networks:
    """What a model's folder holds, as fp32 networks on the CPU, ready to run."""

    transformer: Amused
    vq: VQ
    text: ClipText
    tokenizer: ClipTokenizer
    extra: Mapping[str, Any]
