"""``stylemuse bench``: the measurements of ``stylemuse.bench``, found by name when they are asked for."""

from __future__ import annotations

import contextlib
import io
from importlib import import_module
from typing import Annotated

import typer

from ..core import StylemuseError, unknown
from . import options
from .output import say

MEASUREMENTS = {
    "step": ("step.steps", "latency per decoding step and its parts, beside the floor"),
    "adapters": ("serving.adapters", "what mixing styles in a batch costs, and what changing them costs"),
    "peers": ("peers.peers", "the same pictures with diffusers, torch.compile, PEFT and ONNX Runtime"),
    "onnx": ("peers.exports", "exported folders of every form and precision: size, load, agreement, steps"),
    "kernels": ("step.kernels", "each operation as a Triton kernel, in torch, compiled, and the roof"),
    "compiled": ("step.compiled", "what the Triton kernels take of each chip, compiled without a GPU"),
    "tune": ("step.tune", "which launch of every operation is the fastest on this GPU, left in kernels/tuned"),
    "gpu": ("step.gpu", "all that a GPU has to answer, in one command"),
    "start": ("serving.start", "from process start to a loaded model and to the first picture"),
    "serve": ("serving.serving", "load on a running server, in MLPerf's scenarios, and goodput"),
    "soak": ("serving.soak", "minutes of mixed load on a server, nothing lost"),
    "parity": ("step.parity", "errors against diffusers, transformers and peft at full size"),
    "quantization": ("step.quantization", "what a model loses in 8 bits"),
    "pictures": ("pictures.pictures", "what a judge sees in the embedded model's pictures"),
    "report": ("harness.report", "one HTML page and plots of what was measured"),
    "tables": ("harness.tables", "the README's tables, from bench/results"),
}
"""The module of each, and what it measures."""


def bench(
    context: typer.Context,
    what: Annotated[str, typer.Argument(help=f"{', '.join(MEASUREMENTS)}; WHAT --help tells its options.")] = "--help",
    as_json: options.Json = False,
) -> None:
    """Measure: latency per decoding step, parity with the peers at full size, what the pictures show."""
    if what in ("--help", "-h"):
        say("Usage: stylemuse bench WHAT [OPTIONS]\n")
        for name, (_, about) in MEASUREMENTS.items():
            say(f"  {name:14}{about}")
        say("")
        say("WHAT --help tells its options. The last line is the JSON document; --json prints it alone.")
        return
    if what not in MEASUREMENTS:
        raise StylemuseError(unknown("bench", what, MEASUREMENTS))
    measurement = import_module(f"stylemuse.bench.{MEASUREMENTS[what][0]}").main
    if not as_json:
        measurement(context.args)
        return
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        measurement(context.args)
    say(text.getvalue().splitlines()[-1])
