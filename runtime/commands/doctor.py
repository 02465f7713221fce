"""``stylemuse doctor``: what this machine has, and what a pipeline would choose."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ..core import StylemuseError
from . import options
from .output import document, table

PACKAGES = (
    "stylemuse",
    "torch",
    "triton",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "safetensors",
    "tokenizers",
    "pillow",
)


def doctor(as_json: options.Json = False) -> None:
    """Say what this machine has, and what would be chosen and why."""
    facts = {
        "versions": {"python": platform.python_version()} | {package: _version(package) for package in PACKAGES},
        "cpu": _cpu(),
        "gpus": _gpus(),
        "world": _world(),
        "demo": _demo(),
    }
    if as_json:
        document(facts)
        return
    table(("", ""), [(name, value) for name, value in _lines(facts)])


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    import torch

    from ..backend import cpu

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "machine": f"{platform.system()} {platform.machine()}",
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "instructions": {name: name in cpu.features() for name in cpu.NAMES},
        "cores": usable,
        "threads": torch.get_num_threads(),
    }


def _gpus() -> list[dict[str, Any]]:
    import torch

    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        {"name": gpu.name, "capability": f"{gpu.major}.{gpu.minor}", "gigabytes": round(gpu.total_memory / 2**30, 1)}
        for gpu in found
    ]


def _world() -> dict[str, Any]:
    """The subjects that the embedded model's pictures are made of; training and judging need them, drawing doesn't."""
    from ..pretraining import layers

    if layers.PATH.is_file():
        return {"path": str(layers.PATH), "problem": None}
    return {"path": None, "problem": "not installed; only training and judging the embedded model need it"}


def _demo() -> dict[str, Any]:
    """The embedded model as `load` gives it, or why it doesn't, and the choices made for any model."""
    import stylemuse

    from ..backend.machine import choose

    try:
        pipe = stylemuse.load()
        return {"styles": list(pipe.adapters.names), "choice": pipe.explain(), "problem": None}
    except StylemuseError as error:
        machine = choose()
        chosen = {"device": machine.device, "dtype": str(machine.dtype).removeprefix("torch.")}
        choice = {name: f"{value}: {machine.why[name]}" for name, value in chosen.items()}
        return {"styles": [], "choice": choice, "problem": str(error)}


def _lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    cpu, demo = facts["cpu"], facts["demo"]
    lines = [(package, found or "not installed") for package, found in facts["versions"].items()]
    lines += [("CPU", f"{cpu['machine']}; torch uses {cpu['vectors']}")]
    has = [name for name, there in cpu["instructions"].items() if there]
    lines += [("instructions", f"{', '.join(has) or 'unknown'}")]
    lines += [("threads", f"{cpu['threads']} on {cpu['cores']} cores")]
    gpus = [f"{gpu['name']}, {gpu['gigabytes']} GiB, compute capability {gpu['capability']}" for gpu in facts["gpus"]]
    lines += [("GPU", gpu) for gpu in gpus or ["none"]]
    lines += [("layers of subjects", facts["world"]["path"] or facts["world"]["problem"])]
    lines += [("embedded model", demo["problem"] or "ready"), ("its styles", ", ".join(demo["styles"]) or "none")]
    return lines + [(f"chosen {name}", value) for name, value in demo["choice"].items() if name != "model"]
