"""A few operations on the tensors that canvases hold: torch's, or numpy's where a backend does without torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def stack(arrays: Sequence[Any]) -> Any:
    """Along a new first axis."""
    if isinstance(arrays[0], np.ndarray):
        return np.stack(arrays)
    import torch

    return torch.stack(list(arrays))


def concatenate(arrays: Sequence[Any]) -> Any:
    """Along the first axis."""
    if isinstance(arrays[0], np.ndarray):
        return np.concatenate(arrays)
    import torch

    return torch.cat(list(arrays))


def masked(tokens: Any, unknown: Any, mask_id: int) -> Any:
    """The tokens, with the mask's where they are unknown."""
    if isinstance(tokens, np.ndarray):
        return np.where(unknown, mask_id, tokens)
    return tokens.masked_fill(unknown, mask_id)


def numpy(array: Any) -> NDArray[Any]:
    """The numbers as an array of numpy's, on the host."""
    return array if isinstance(array, np.ndarray) else array.cpu().numpy()
