"""The model an adapter is for, as far as a command needs it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from ..adapters.canonical import Adapter
    from ..models.amused import AmusedConfig


class Target:
    """The model an adapter is for, from its configuration; weights are read only when they are needed."""

    def __init__(self, name: str) -> None:
        from ..loading import hub

        self.name, self.folder = name, hub.resolve(name)

    @cached_property
    def config(self) -> AmusedConfig:
        from ..loading.folder import read_json
        from ..models.amused import AmusedConfig

        return AmusedConfig.from_dict(read_json(self.folder / "transformer" / "config.json"))

    @cached_property
    def parameters(self) -> int:
        """Numbers in the transformer."""
        import torch

        from ..models.amused import Amused

        with torch.device("meta"):
            return sum(parameter.numel() for parameter in Amused(self.config).parameters())

    def check(self, adapter: Adapter) -> None:
        """Raise unless the adapter fits this model, and its very weights where it says which it was made for."""
        from ..adapters.bank import Bank
        from ..loading.folder import weights_sha256

        known = weights_sha256(self.folder / "transformer") if adapter.base_sha256 else None
        sites, bottlenecks = self.config.sites(), self.config.bottleneck_sites()
        Bank(sites, bottlenecks, slots=1, rank=adapter.rank, base_sha256=known).add(adapter)


class Weights(Mapping[str, "Tensor"]):
    """A transformer's weights by checkpoint name, read when the first is asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder, self.read = folder, False

    @cached_property
    def _tensors(self) -> dict[str, Tensor]:
        from ..loading import weights

        self.read = True
        return weights.read(self._folder)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
