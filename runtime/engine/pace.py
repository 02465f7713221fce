"""How far a program may run ahead of a GPU: one step. The device never waits for launches, and steps keep its pace.

A newcomer joins, and who is cancelled leaves, at most one step later than the device is.
"""

from __future__ import annotations

from typing import Any

import torch


class Pace:
    """Call `launched` after every step; on a CPU there is nothing to wait for."""

    def __init__(self, device: torch.device | str) -> None:
        self._device = device if str(device).startswith("cuda") else None
        self._last: Any = None

    def launched(self) -> None:
        """Returns when the step before the one just launched is done; an error of the device is raised here."""
        if self._device is None:
            return
        with torch.cuda.device(self._device):
            event = torch.cuda.Event()
            event.record()
        last, self._last = self._last, event
        if last is not None:
            last.synchronize()
