"""Which implementation an operation runs with, and why; and Triton, imported so that kernel files load without it.

Every operation has its reference in plain torch, the definition, which runs anywhere and has gradients, and a Triton
kernel, which runs on a GPU, or on a CPU under Triton's interpreter (to see that it is right, never for speed). A
network carries one `Kernels` and hands it to every operation, so that two networks of one process may differ.

An operation's Triton side is registered with ``torch.library`` under ``stylemuse::``, with a fake implementation, so
that ``torch.compile`` and ``torch.export`` see one opaque node. Source: the operator registration of PyTorch,
``torch.library.Library``. `torch.library.custom_op` would import torch's compiler at the first call, 1.2 s.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

__all__ = [
    "INTERPRETED",
    "OPERATIONS",
    "REFERENCE",
    "STEP",
    "UNSPECIALIZED",
    "Kernels",
    "constant",
    "forward_only",
    "jit",
    "obstacle",
    "operator",
    "tl",
    "triton_kernels",
]

OPERATIONS = ("linear", "quantized_linear", "attention", "bottleneck", "norm", "response_norm", "depthwise_norm")
"""The operations of a network that have a Triton kernel."""

STEP = "decoding_step"
"""What follows the network in a step, where the loop runs on fixed buffers; it has Triton kernels too."""


def _wanted() -> bool:
    """Importing Triton takes 0.2 s: spent where it can run, and where somebody has imported it, say to compile."""
    return bool(
        "triton" in sys.modules or os.environ.get("TRITON_INTERPRET") or torch.version.cuda or torch.version.hip
    )


if TYPE_CHECKING:
    import triton
    from triton import language as tl
else:
    triton = tl = None
    if _wanted():
        try:
            import triton
            from triton import language as tl
        except ImportError:
            pass

INTERPRETED = bool(triton is not None and triton.knobs.runtime.interpret)
"""Whether kernels were made for Triton's interpreter: decided by TRITON_INTERPRET when this file is loaded."""


UNSPECIALIZED = ("tokens", "keys", "count", "total")
"""Arguments that Triton compiles no special cases for: what is masked changes from step to step, texts in length, and
rows from batch to batch."""


def jit(function: Callable[..., Any]) -> Any:
    """``triton.jit``, or the function itself where Triton is missing; then nobody calls it."""
    if triton is None:
        return function
    given = [name for name in UNSPECIALIZED if name in inspect.signature(function).parameters]
    return triton.jit(function, do_not_specialize=given)


def constant(value: Any) -> Any:
    """A global that kernels may read."""
    return value if tl is None else tl.constexpr(value)


@dataclass(frozen=True)
class Kernels:
    """The operations that run in Triton, and why; all others run in plain torch."""

    name: str
    triton: frozenset[str]
    why: str

    def explain(self) -> str:
        """One line for a person."""
        if not self.triton:
            return f"plain torch: {self.why}"
        names = ", ".join(name for name in OPERATIONS if name in self.triton)
        return f"Triton for {names}: {self.why}; plain torch for the rest"


REFERENCE = Kernels("reference", frozenset(), "the definition")


def obstacle(device: torch.device) -> str | None:
    """What keeps Triton from running on a device, as a sentence that says what is needed; None where nothing does."""
    on_cpu = device.type == "cpu"
    if on_cpu and not os.environ.get("TRITON_INTERPRET"):
        return "on a CPU Triton only runs interpreted, for tests; it needs TRITON_INTERPRET=1 in the environment"
    if find_spec("triton") is None:
        return "the package triton is not installed"
    if on_cpu and not INTERPRETED:
        return "TRITON_INTERPRET must be set before stylemuse is imported"
    if INTERPRETED and not on_cpu:
        return "TRITON_INTERPRET is set, which a GPU does not use; remove it from the environment"
    return None if triton is not None else "this torch is built without CUDA and ROCm"


def triton_kernels(device: torch.device) -> Kernels:
    """All operations in Triton, on a device without an `obstacle`."""
    assert obstacle(device) is None, obstacle(device)
    why = "Triton's interpreter" if INTERPRETED else "measured on an H100 in bf16, on no other GPU yet"
    return Kernels("triton", frozenset((*OPERATIONS, STEP)), why)


_LIBRARY = torch.library.Library("stylemuse", "FRAGMENT")


def operator(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Registers a launcher as ``stylemuse::<schema>`` with its fake, and returns the operator to call.

    It has no gradient: asking for one is an error, since a kernel's output would silently be a constant.
    """
    name = schema.partition("(")[0]

    def register(launcher: Callable[..., Any]) -> Any:
        _LIBRARY.define(schema)
        _LIBRARY.impl(name, launcher, "CompositeExplicitAutograd")
        torch.library.register_fake(f"stylemuse::{name}", fake, lib=_LIBRARY)
        return getattr(torch.ops.stylemuse, name).default

    return register


def forward_only(*tensors: Tensor | None) -> None:
    """Asserts that nobody expects a gradient of a Triton operation."""
    expected = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    assert not expected, "Triton kernels have no gradient; train with the reference"
