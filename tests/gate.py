"""Forward passes that wait to be let through, so that tests decide what an engine is doing when something happens."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from stylemuse import Engine, Pipeline

SOON = 60.0
"""Seconds that nothing here takes: a test that waits so long has failed."""


class Gate:
    """Holds every forward pass until it is let through; counts their rows."""

    def __init__(self, pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: list[int] = []
        self.failing = False
        self._arrived, self._open, self._free = threading.Semaphore(0), threading.Semaphore(0), False
        original = pipe.network.features

        def features(tokens: Any, contexts: Any) -> Any:
            self.rows.append(len(tokens))
            self._arrived.release()
            if not self._free:
                assert self._open.acquire(timeout=SOON)
            if self.failing:
                self.failing = False
                raise RuntimeError("a broken kernel")
            return original(tokens, contexts)

        monkeypatch.setattr(pipe.network, "features", features)

    def arrive(self) -> None:
        """Wait until a forward pass stands before the gate."""
        assert self._arrived.acquire(timeout=SOON)

    def step(self) -> None:
        """Let it through and wait for the next."""
        self._open.release()
        self.arrive()

    def free(self) -> None:
        """Let everything through from here on."""
        self._free = True
        self._open.release()


def settled(engine: Engine, condition: Callable[[], bool]) -> None:
    """Wait until the engine's threads have come so far."""
    with engine._changed:
        assert engine._changed.wait_for(condition, SOON)


def idle(engine: Engine, pipe: Pipeline) -> None:
    """Nothing is held any more."""
    held = pipe.adapters._held
    settled(engine, lambda: not (engine._works or engine._done or any(version.users for version in held.values())))
    assert all(not version.pins for version in pipe.adapters._versions.values())
