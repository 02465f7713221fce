"""What of a process a library could change for others, and a small program that looks whether ours does.

python tests/process.py FOLDER      imports stylemuse, loads the model of the folder and draws; prints JSON
"""

from __future__ import annotations

import json
import locale
import logging
import os
import random
import signal
import socket
import sys
import threading
import warnings

import numpy as np
import PIL.Image
import safetensors.torch
import tokenizers
import torch

DEPENDENCIES = (PIL.Image, safetensors.torch, tokenizers)
"""Imported before the first look: what these change is theirs."""


def state() -> dict[str, str]:
    """Defaults, generators, handlers and settings, as texts to compare."""
    values = {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "threads running": threading.active_count(),
        "precision": torch.get_float32_matmul_precision(),
        "determinism": torch.are_deterministic_algorithms_enabled(),
        "gradients": torch.is_grad_enabled(),
        "generator of torch": torch.get_rng_state().tolist(),
        "generator of numpy": np.random.get_state(),  # noqa: NPY002
        "generator of Python": random.getstate(),
        "signals": [signal.getsignal(number) for number in sorted(signal.valid_signals())],
        "environment": dict(os.environ),
        "warnings": warnings.filters,
        "logging": (logging.root.level, logging.root.handlers),
        "locale": locale.setlocale(locale.LC_ALL),
        "folder": os.getcwd(),
        "path": sys.path,
        "hooks": (sys.excepthook, sys.displayhook, threading.excepthook),
        "limits": (sys.getrecursionlimit(), socket.getdefaulttimeout()),
    }
    return {name: repr(value) for name, value in values.items()}


def main() -> None:
    """Print what importing and using the package change, and which packages importing it imports."""
    before, known = state(), set(sys.modules)
    import stylemuse

    imported, packages = state(), {name.partition(".")[0] for name in set(sys.modules) - known}
    pipe = stylemuse.load(sys.argv[1])
    pipe.generate("a fox", style="ink", n=2)
    used = state()
    found = {
        "import": [name for name in before if imported[name] != before[name]],
        "use": [name for name in before if used[name] != imported[name]],
        "packages": sorted(packages),
        "cuda": torch.cuda.is_initialized(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
