"""What this CPU can do: the instruction sets that decide what is computed in. Needs neither torch nor ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path

import numpy
import numpy.lib

_INFO = Path("/proc/cpuinfo")
# Each by the flags of which one is enough, as Linux and numpy call them, without their underscores.
_SETS = {
    "AVX2": {"avx2"},
    "AVX-512": {"avx512bw"},
    "VNNI": {"avx512vnni", "avxvnni"},
    "AVX-512 BF16": {"avx512bf16"},
    "AMX": {"amxbf16"},
    "NEON": {"neon", "asimd"},
    "dot products": {"asimddp"},
    "BF16": {"bf16"},
}
NAMES = tuple(_SETS)


@cache
def features() -> frozenset[str]:
    """Those of `NAMES` that this CPU has. What the system doesn't tell counts as missing."""
    return named(_flags())


def named(flags: Iterable[str]) -> frozenset[str]:
    """Those of `NAMES` that these flags stand for."""
    given = {flag.lower().replace("_", "") for flag in flags}
    return frozenset(name for name, any_of in _SETS.items() if given & any_of)


def _flags() -> list[str]:
    try:
        lines = _INFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # no Linux; what numpy asked the CPU for, AMX and AVX-VNNI are not in it
        room = "numpy._core" if numpy.lib.NumpyVersion(numpy.__version__) >= "2.0.0" else "numpy.core"
        asked: Mapping[str, bool] = import_module(f"{room}._multiarray_umath").__cpu_features__
        return [name for name, there in asked.items() if there]
    found = (line.partition(":")[2] for line in lines if line.startswith(("flags", "Features")))
    return next(found, "").split()
