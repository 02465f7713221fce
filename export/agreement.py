"""How an exported folder compares with the model it was made from: the same requests, drawn by both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..core import Request, Sampling, Style
from ..decoding.guidance import CFG
from ..decoding.loop import Canvas, Rows, Timings
from ..pipeline import Pipeline
from .ort import OnnxNetwork
from .spec import Array

PROMPT = "a fox"
STEPS = 4


def requests(form: str, styles: Sequence[str], strength: float) -> list[tuple[Request, Request]]:
    """Pairs of the same picture: as the model is asked for it, and as the export."""
    sampling = Sampling(steps=STEPS)
    if form == "fused" and styles:
        guidance = CFG(3.0)
        asked = Request(PROMPT, {styles[0]: Style(strength=strength)}, seed=1, sampling=sampling, guidance=guidance)
        return [(asked, Request(PROMPT, styles[0], seed=1, sampling=sampling, guidance=guidance))]
    chosen = [None, *(styles[:2] if form == "bank" else styles[:1])]
    made = [Request(PROMPT, style, seed=seed, sampling=sampling) for seed, style in enumerate(chosen, 1)]
    return [(request, request) for request in made]


def measure(model: Pipeline, exported: Pipeline, pairs: Sequence[tuple[Request, Request]]) -> dict[str, Any]:
    """Share of equal tokens, and the mean error of the pictures in 255ths."""
    asked, given = model.run([one for one, _ in pairs]), exported.run([other for _, other in pairs])
    equal = [np.mean(one.tokens == other.tokens) for one, other in zip(asked, given, strict=True)]
    pictures = [
        np.abs(np.asarray(one.images[0], np.float32) - np.asarray(other.images[0], np.float32)).mean()
        for one, other in zip(asked, given, strict=True)
    ]
    return {
        "requests": len(pairs),
        "steps": STEPS,
        "tokens": round(float(np.mean(equal)), 6),
        "picture_error": round(float(np.mean(pictures)), 4),
    }


def record(exported: Pipeline, given: Sequence[Request]) -> list[dict[str, Array]]:
    """What the step's graph is given while these requests are drawn together, step by step."""
    recorder = Recorder(exported.network)
    exported.network = recorder
    exported.run(given)
    return recorder.seen


class Recorder:
    """A network that keeps what its step graph is given."""

    def __init__(self, network: OnnxNetwork) -> None:
        self.network, self.mask_id, self.seen = network, network.mask_id, list[dict[str, Array]]()

    def decode_step(self, canvases: Sequence[Canvas], rows: Rows, timings: Timings | None) -> tuple[Any, Any]:
        """One step, and what it was given is kept."""
        feeds = self.network.step_feeds(canvases, rows)
        arrays = {
            name: each if isinstance(each, np.ndarray) else np.array(each.numpy()) for name, each in feeds.items()
        }
        self.seen.append(arrays)
        return self.network.decode_step(canvases, rows, timings)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.network, name)
