"""One style merged into the weights: W' = W + scale up down, for deployments that need no other.

Always from the pristine weights, in fp32: unmerging by subtraction would not give them back to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..core import StylemuseError
from .canonical import Adapter


def merged(weights: Mapping[str, Tensor], adapter: Adapter, scale: float) -> dict[str, Tensor]:
    """A new mapping with the adapted weights in fp32 and all others as they are; nothing of the input is written to.

    Args:
        weights: the model's tensors by checkpoint name ("<site>.weight", (out, in)).
        scale: the whole factor; a caller multiplies a request's strength and `adapter.scale`.

    Raises:
        StylemuseError: a bottleneck adapter, which no weight can hold; a site without a weight, or of another shape.
    """
    if adapter.kind != "lora":
        raise StylemuseError(
            f"adapter {adapter.name} is a {adapter.kind}: y + gelu(y Wd) Wu is not linear in y, no weight can hold it"
        )
    result = dict(weights)
    for site, (down, up) in adapter.tensors.items():
        weight = weights.get(f"{site}.weight")
        if weight is None:
            raise StylemuseError(
                f"adapter {adapter.name} adapts {site}, but there is no {site}.weight among the weights"
            )
        if weight.shape != (up.shape[0], down.shape[1]):
            raise StylemuseError(
                f"adapter {adapter.name}: {site}.weight is {tuple(weight.shape)}, its pair makes "
                f"{(up.shape[0], down.shape[1])}; it belongs to another model"
            )
        delta = (up @ down).to(weight.device)
        result[f"{site}.weight"] = weight.detach().float() + scale * delta
    return result
