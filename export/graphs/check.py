"""A graph run on made-up inputs and compared: what every rewrite, and every export, has to pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from ...core import StylemuseError
from ..run.spec import Array, GraphSpec


def run(
    path: Path, description: GraphSpec, inputs: Sequence[Mapping[str, Array]], probes: Sequence[str] = ()
) -> list[dict[str, Array]]:
    """What a written graph gives for each of these inputs on the CPU, and values inside: its probe, and these."""
    names = [output.name for output in description.outputs]
    inside = [*probes, *([description.probe] if description.probe else [])]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    source = str(path)
    if inside:
        names += inside
        source = str(_probed(path, inside))
    try:
        session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        return [dict(zip(names, session.run(names, dict(each)), strict=True)) for each in inputs]
    except Exception as error:  # ONNX Runtime's errors share no base but Exception
        raise StylemuseError(f"{path.name} does not run: {str(error).splitlines()[0]}") from error
    finally:
        if source != str(path):
            Path(source).unlink()


def compare(description: GraphSpec, what: str, before: Mapping[str, Array], after: Mapping[str, Array]) -> float:
    """The largest error relative to the largest value; whole numbers must agree as the description allows.

    Raises:
        StylemuseError: an error above the tolerance, or too many whole numbers that differ; `what` is named.
    """
    worst = 0.0
    for name, expected in before.items():
        got = after[name]
        if got.shape != expected.shape:
            raise StylemuseError(f"{what}: {name} is {got.shape} instead of {expected.shape}")
        if not expected.size:
            continue
        if np.issubdtype(expected.dtype, np.integer):
            # A byte of a picture may be rounded either way.
            near = 1 if expected.dtype == np.uint8 else 0
            equal = float((np.abs(got.astype(np.int64) - expected) <= near).mean())
            if equal < description.agreement:
                raise StylemuseError(f"{what}: {equal:.2%} of {name} agree; at least {description.agreement:.1%} must")
            continue
        got, expected = got.astype(np.float32), expected.astype(np.float32)
        error, allowed = float(np.abs(got - expected).max() / np.abs(expected).max()), description.tolerance
        if not error <= allowed:
            raise StylemuseError(f"{what}: {name} is off by {error:.2g} of its largest value; allowed is {allowed:g}")
        worst = max(worst, error)
    return worst


def _probed(path: Path, probes: Sequence[str]) -> Path:
    """A copy of the graph beside it, whose weights it shares, that gives these values too."""
    model = onnx.load(path, load_external_data=False)
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(probe) for probe in probes)
    copy = path.with_name(f".{path.name}.probe")
    copy.write_bytes(model.SerializeToString())
    return copy
