"""Muon: the numbers of torch's own, one matrix at a time."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stylemuse.pretraining.muon import Muon, orthogonal

SHAPES = [(6, 10), (10, 6), (6, 10), (7, 7), (1, 5), (6, 10)]


def _parameters(seed: int) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def test_steps_are_those_of_torch() -> None:
    ours, theirs = _parameters(0), _parameters(0)
    muon = Muon(ours, rate=1e-2, dtype=torch.bfloat16)
    peer = torch.optim.Muon(theirs, lr=1e-2, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for step in range(5):
        for mine, other, gradient in zip(ours, theirs, _parameters(step + 1), strict=True):
            mine.grad, other.grad = gradient.detach(), gradient.detach().clone()
        for group in peer.param_groups:
            group["lr"] = 1e-2 * (step + 1) / 5
        muon.step((step + 1) / 5)
        peer.step()
        for mine, other in zip(ours, theirs, strict=True):
            # The two may choose other matrix kernels: bf16 rounds at 2^-8, times the largest step, 1e-2 * 0.2 * 10^.5.
            assert (mine - other).abs().max() <= 2**-8 * 6.4e-3


@pytest.mark.parametrize("shape", [(2, 9, 5), (1, 5, 9), (3, 8, 8)])
def test_singular_values_come_near_one(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    made = orthogonal(matrices, torch.float32)
    values = torch.linalg.svdvals(made)
    assert values.min() > 0.6
    assert values.max() < 1.3
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    turned = (left.mT @ made @ right.mT).diagonal(dim1=1, dim2=2)
    assert turned.min() > 0.6, "the singular vectors are kept"


def test_momentum_is_restored() -> None:
    ours, other = _parameters(0), _parameters(0)
    first, second = Muon(ours, rate=1e-2), Muon(other, rate=1e-2)
    for parameter in ours:
        parameter.grad = torch.ones_like(parameter)
    first.step()
    second.load_state_dict(first.state_dict())
    for mine, theirs in zip(ours, other, strict=True):
        theirs.data.copy_(mine)
        mine.grad, theirs.grad = torch.full_like(mine, 0.5), torch.full_like(mine, 0.5)
    first.step()
    second.step()
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(ours, other, strict=True))
