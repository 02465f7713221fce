"""How an exported folder compares with the model it was made from: the same requests, drawn by both.

The folder draws them twice: step by step, and in one call of generate.onnx.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...core import Branch, Request, Sampling, Style
from ...decoding.canvas import Canvas, Rows, Timings
from ...decoding.guidance import CFG
from ...decoding.loop import decode
from ...pipeline import Pipeline
from ...requests.planning import Plan
from ..run.loading import ExportedPipeline, open_folder
from ..run.ort import OnnxNetwork
from ..run.spec import Array, GraphSpec
from ..run.styles import BASE
from . import check

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


def measure(model: Pipeline, folder: Path, pairs: Sequence[tuple[Request, Request]]) -> dict[str, Any]:
    """Share of equal tokens, step by step and in one call, and the mean error of the pictures in 255ths."""
    exported, others = open_folder(folder), [other for _, other in pairs]
    asked, given = model.run([one for one, _ in pairs]), exported.run(others)
    whole = GraphSpec("generate", (), exported.network.manifest.graphs["generate"].outputs)
    inputs = feeds(exported, others)
    del exported  # The weights of a large model need not be there twice.
    (drawn,) = check.run(folder / "generate.onnx", whole, [inputs])
    in_one_call = drawn["tokens_out"] == np.concatenate([one.tokens for one in asked])
    equal = [np.mean(one.tokens == other.tokens) for one, other in zip(asked, given, strict=True)]
    pictures = [
        np.abs(np.asarray(one.images[0], np.float32) - np.asarray(other.images[0], np.float32)).mean()
        for one, other in zip(asked, given, strict=True)
    ]
    return {
        "requests": len(pairs),
        "steps": STEPS,
        "tokens": round(float(np.mean(equal)), 6),
        "tokens_of_generate": round(float(np.mean(in_one_call)), 6),
        "picture_error": round(float(np.mean(pictures)), 4),
    }


def feeds(exported: ExportedPipeline, requests: Sequence[Request]) -> dict[str, Array]:
    """What generate.onnx takes to draw all the pictures of these requests, of one size, in one call."""
    network, shelf, plans = exported.network, exported.adapters, [_plan(exported, request) for request in requests]
    pictures = [(plan, *each) for plan in plans for each in zip(plan.starts, plan.seeds, strict=True)]
    rows = list(dict.fromkeys(_row(branch) for plan in plans for branch in plan.branches))
    count, width = max(len(start.steps) for _, start, _ in pictures), max(len(plan.branches) for plan in plans)
    masked = np.zeros((count, len(pictures)), np.int64)
    token_temperature, choice_temperature = np.zeros((2, *masked.shape), np.float32)
    branches, weights = np.zeros((len(pictures), width), np.int64), np.zeros((*masked.shape, width), np.float32)
    for place, (plan, start, _) in enumerate(pictures):
        own = slice(len(start.steps))
        masked[own, place] = start.steps.masked_after
        token_temperature[own, place] = start.steps.token_temperature
        choice_temperature[own, place] = start.steps.choice_temperature
        for index, branch in enumerate(plan.branches):
            branches[place, index], weights[own, place, index] = rows.index(_row(branch)), branch.weights
    slots = [BASE if style is None else shelf.slot(style) for _, style, _ in rows]
    scales = [1.0 if style is None else strength * shelf[style].scale for _, style, strength in rows]
    for slot in slots:
        network.hold(slot)
    names = frozenset(each.name for each in network.manifest.graphs["generate"].inputs)
    return {
        "ids": network.tokenizer.ids([prompt for prompt, _, _ in rows]),
        "tokens": np.stack(
            [np.where(start.unknown, network.mask_id, start.tokens).reshape(plan.grid) for plan, start, _ in pictures]
        ),
        "branches": branches,
        "weights": weights,
        "seeds": np.array([seed for _, _, seed in pictures], np.int64),
        "masked": masked,
        "token_temperature": token_temperature,
        "choice_temperature": choice_temperature,
        "raw_logit": np.array([start.steps.score == "logit" for _, start, _ in pictures]),
        **network.styles.feeds(names, slots, scales),
    }


def _plan(exported: ExportedPipeline, request: Request) -> Plan:
    job = exported.jobs.begin(request)
    job.release()
    return job.plan


def _row(branch: Branch) -> tuple[str, str | None, float]:
    return branch.prompt, branch.style, branch.strength


def record(exported: ExportedPipeline, given: Sequence[Request]) -> list[dict[str, Array]]:
    """What the step's graph is given while these requests are drawn together, step by step."""
    recorder = Recorder(exported.network)
    with exported.jobs.held(given) as jobs:
        canvases = exported.jobs.canvases(jobs, {"text": 0.0, "condition": 0.0})
        decode(recorder, [canvas for own in canvases for canvas in own])
    return recorder.seen


class Recorder:
    """A network's steps, of which what the graph is given is kept."""

    def __init__(self, network: OnnxNetwork) -> None:
        self.network, self.seen = network, list[dict[str, Array]]()

    def decode_step(self, canvases: Sequence[Canvas], rows: Rows, timings: Timings | None) -> tuple[Any, Any]:
        """One step, and what it was given is kept."""
        feeds = self.network.step_feeds(canvases, rows)
        arrays = {
            name: each if isinstance(each, np.ndarray) else np.array(each.numpy()) for name, each in feeds.items()
        }
        self.seen.append(arrays)
        return self.network.decode_step(canvases, rows, timings)
