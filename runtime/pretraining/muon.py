"""Muon: momentum whose update is made orthogonal, for matrices; `torch.optim.Muon` with equal shapes in one product.

    M <- lerp(M, G, 1 - mu),  U = orthogonal(lerp(G, M, mu)),  W <- (1 - rate decay) W - rate 0.2 sqrt(max(m, n)) U

A small network has hundreds of small matrices: one at a time, their orthogonalization takes a third of a training step
on a CPU. Source: Jordan et al. 2024 (kellerjordan.github.io/posts/muon); the rate's factor: arXiv 2502.16982, Eq. 4.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

_QUINTIC = (3.4445, -4.7750, 2.0315)
_ROUNDS = 5
_EPSILON = 1e-7


def orthogonal(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """(G, m, n) -> nearly orthogonal matrices of the same singular vectors, by Newton-Schulz rounds in ``dtype``."""
    x = matrices.to(dtype)
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=_EPSILON)
    first, second, third = _QUINTIC
    for _ in range(_ROUNDS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=second, alpha=third), x, beta=first)
    return x.mT if tall else x


class Muon:
    """For parameters of two dimensions.

    Args:
        rate: learning rate; with the factor above its scale is AdamW's.
        dtype: of the orthogonalization, say bf16 where the machine has the instructions.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        rate: float,
        momentum: float = 0.95,
        decay: float = 0.01,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.rate, self.momentum, self.decay, self.dtype = rate, momentum, decay, dtype
        self._alike: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for parameter in parameters:
            assert parameter.ndim == 2, "Muon is for matrices"
            self._alike.setdefault(tuple(parameter.shape), []).append(parameter)
        self._moments = {
            shape: torch.zeros(len(group), *shape, device=group[0].device) for shape, group in self._alike.items()
        }

    @torch.no_grad()
    def step(self, factor: float | Tensor = 1.0) -> None:
        """Move all parameters by their gradients, which must be there; ``factor`` multiplies the rate."""
        for shape, group in self._alike.items():
            gradients = torch.stack([parameter.grad for parameter in group if parameter.grad is not None])
            moments = self._moments[shape].lerp_(gradients, 1 - self.momentum)
            updates = orthogonal(gradients.lerp(moments, self.momentum), self.dtype).float()
            rate = self.rate * factor
            for parameter, update in zip(group, updates, strict=True):
                parameter.mul_(1 - rate * self.decay).sub_(update * (rate * 0.2 * max(shape) ** 0.5))

    def state_dict(self) -> dict[str, Any]:
        """The momentum, by shape in words."""
        return {" ".join(map(str, shape)): moments for shape, moments in self._moments.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a saved `state_dict` of the same parameters."""
        assert state.keys() == self.state_dict().keys(), "momentum of other parameters"
        for shape, moments in self._moments.items():
            moments.copy_(state[" ".join(map(str, shape))])
