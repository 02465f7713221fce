"""``stylemuse bench quantization``: what 8 bits lose, the same requests drawn by a model as it is and quantized.

    hidden   what the head is given at masked positions of half-drawn pictures, in every branch: errors as in `parity`,
             the model as it is being the peer, and rms relative to the root mean square of the peer's
    choices  at how many of those positions the most likely code is the same
    tokens   of whole pictures drawn with the same noise, where one other token changes what comes after it

Both compute in fp32 on the CPU, by the definition, so that all of the difference is the quantization's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import stylemuse as sm
from stylemuse.decoding.rng import image_seeds
from stylemuse.kernels.quantization import FORMATS
from stylemuse.loading.assembly import TorchPipeline, in_torch

from ..harness import measure
from ..harness.arguments import Arguments
from .parity import errors, report

PROMPTS = ("a fox", "an owl", "a castle", "a car", "a rose", "a fish", "a rocket", "a tree")


def losses(name: str, model: str = "demo", prompts: Sequence[str] = PROMPTS, seed: int = 0) -> dict[str, Any]:
    """The figures of the module's text for one format, of prompts without a style and in each of the model's."""
    plain, small = (
        in_torch(sm.load(model, backend="reference", device="cpu", dtype="float32", quantization=each))
        for each in (None, name)
    )
    styles = (None, *plain.adapters.names)
    pairs = list(zip(prompts, image_seeds(seed, len(prompts)), strict=True))
    requests = [sm.Request(prompt, style=style, seed=own) for style in styles for prompt, own in pairs]
    expected, drawn = (np.concatenate([result.tokens for result in pipe.run(requests)]) for pipe in (plain, small))
    generator, found = torch.Generator().manual_seed(seed), list[tuple[Tensor, Tensor]]()
    for request, grid in zip(requests, torch.from_numpy(expected), strict=True):
        masked = torch.rand(grid.shape, generator=generator) < 0.5
        found.append((_hidden(small, request, grid, masked), _hidden(plain, request, grid, masked)))
    ours, peer = (torch.cat(each) for each in zip(*found, strict=True))
    same = small.network.logits(ours).argmax(1) == plain.network.logits(peer).argmax(1)
    hidden = errors(ours, peer)
    return {
        "pictures": len(requests),
        "hidden": hidden | {"relative_rms": hidden["rms"] / float(peer.double().square().mean().sqrt())},
        "choices": {"equal": int(same.sum()), "of": len(same)},
        "tokens": {"equal": int((expected == drawn).sum()), "of": int(expected.size)},
        "explain": small.explain()["quantization"],
    }


@torch.no_grad()
def _hidden(pipe: TorchPipeline, request: sm.Request, grid: Tensor, masked: Tensor) -> Tensor:
    """(h, w) tokens -> (branches times masked positions, D): what the request's rows make of them."""
    network = pipe.network
    with pipe.jobs.held([request]) as jobs:
        contexts = pipe.jobs.canvases(jobs, {"text": 0.0, "condition": 0.0})[0][0].contexts
        given = grid.masked_fill(masked, network.mask_id).flatten().expand(len(contexts), -1)
        return network.readout(network.features(given, contexts)[:, masked.flatten()].flatten(0, 1))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the figures, and on the last line all of it as one JSON document."""
    parser = Arguments(prog="stylemuse bench quantization", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="demo", help="what stylemuse.load takes")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--prompts", nargs="+", default=list(PROMPTS), help="each drawn in every style of the model")
    parser.add_argument("--seed", type=int, default=0, help="of the pictures and of what is masked")
    parser.add_argument("--out", type=Path, help="write the JSON document to this file too")
    options = parser.parse_args(arguments)
    results: dict[str, Any] = {}
    for name in options.formats:
        results[name] = losses(name, options.model, options.prompts, options.seed)
        report(name, results[name])
    head = {"command": parser.command, "versions": measure.versions(), "commit": measure.commit()}
    document = head | {"machine": measure.machine(torch.device("cpu")), "model": options.model, "results": results}
    if options.out is not None:
        options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document))
