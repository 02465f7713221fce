"""Convolutions are torch's, and fp32 ones on a GPU are fp32, whatever the process's setting for TF32."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from interpreter import DEVICE
from torch import Tensor

from stylemuse.kernels.convolution import convolve, exact

FORMS = {
    "3 x 3": ((20, 12, 3, 3), {"padding": 1}),
    "depthwise": ((12, 1, 3, 3), {"padding": 1, "groups": 12}),
    "halving": ((20, 12, 2, 2), {"stride": 2}),
    "doubling": ((12, 20, 2, 2), {"stride": 2, "transposed": True}),
}


def given(shape: tuple[int, ...], bias: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    x, kernel, shift = (torch.randn(*each, generator=generator).to(DEVICE) for each in ((2, 12, 6, 10), shape, (20,)))
    return x, kernel, shift if bias else None


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_it_is_torchs(form: str) -> None:
    shape, how = FORMS[form]
    x, kernel, bias = given(shape, form != "depthwise")
    public = {name: value for name, value in how.items() if name != "transposed"}
    function = F.conv_transpose2d if how.get("transposed") else F.conv2d
    expected = function(x.double(), kernel.double(), None if bias is None else bias.double(), **public)
    numbers = {"stride": 1, "padding": 0, "groups": 1, "transposed": False} | how
    for found in (convolve(x, kernel, bias, **how), exact(x, kernel, bias, **numbers)):
        assert (found.double() - expected).abs().max() <= 2e-6 * expected.abs().max()


def test_it_can_be_trained() -> None:
    x, kernel, _ = given((20, 12, 3, 3), False)
    kernel.requires_grad_()
    convolve(x, kernel, padding=1).square().sum().backward()
    assert kernel.grad is not None
    assert kernel.grad.abs().min() > 0
