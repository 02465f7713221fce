"""The ONNX backend: exported graphs in ONNX Runtime, as the decoding loop and the pipeline use them.

Numbers come and go as numpy arrays; torch is not needed. A decoding step is one call of step.onnx for all canvases.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
from PIL import Image

from ...core import AESTHETIC_SCORE, Sizes, StylemuseError
from ...decoding.canvas import Canvas, Rows, Timings, timed
from ...models.tokenizer import ClipTokenizer
from . import styles
from .manifest import GraphFile, Manifest
from .spec import Array, Tensor

_KINDS = {"int64": "int64", "float32": "float", "float16": "float16", "bool": "bool", "uint8": "uint8"}


class Text(NamedTuple):
    """What a prompt becomes: features (1, L, D) and pooled vector (1, P), fp32."""

    penultimate: Array
    pooled: Array


@dataclass(frozen=True, eq=False)
class Context:
    """What stays the same over the steps for one row: conditioning (1, ...), grid, adapter slot and scale."""

    conditioning: Mapping[str, Array]
    grid: tuple[int, int]
    slot: int
    scale: float

    @property
    def bytes(self) -> int:
        """The memory its arrays take."""
        return sum(array.nbytes for array in self.conditioning.values())


class Provider(NamedTuple):
    """Where the graphs run, and why there; `device` is where their inputs lie."""

    device: str
    names: tuple[str, ...]
    why: str


_CPU, _CUDA, _TENSORRT = (f"{name}ExecutionProvider" for name in ("CPU", "CUDA", "Tensorrt"))
_PROVIDERS = {"cpu": (_CPU,), "cuda": (_CUDA, _CPU), "tensorrt": (_TENSORRT, _CUDA, _CPU)}


def choose_provider(device: str | None) -> Provider:
    """ONNX Runtime's execution providers for a device; what is asked for is taken or refused.

    Without a device it is CUDA where a GPU and its provider are there, else the CPU. TensorRT, which builds engines for
    minutes before it draws, is only taken when it is asked for, and leaves to CUDA what it doesn't know.
    """
    if device is not None and device not in _PROVIDERS:
        allowed = ", ".join(_PROVIDERS)
        raise StylemuseError(f"device {device!r} is not supported by backend 'onnx'; allowed: {allowed}")
    there = onnxruntime.get_available_providers() if _sees_gpu() else [_CPU]
    if device is not None:
        if missing := [name for name in _PROVIDERS[device] if name not in there]:
            raise StylemuseError(
                f"device {device!r} is not there: ONNX Runtime sees no GPU, or is without {missing[0]}"
            )
        return Provider("cpu" if device == "cpu" else "cuda", _PROVIDERS[device], "asked for")
    if _CUDA in there:
        return Provider("cuda", _PROVIDERS["cuda"], "a GPU is there")
    return Provider("cpu", _PROVIDERS["cpu"], "no GPU is there, or no provider for it")


def _sees_gpu() -> bool:
    return Path("/dev/nvidiactl").exists()


class Session:
    """One graph, loaded; checked to take and give what the manifest says."""

    def __init__(self, folder: Path, graph: GraphFile, provider: Provider, threads: int | None) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        self.device, self.file = provider.device, graph.file.path
        try:
            self._session = onnxruntime.InferenceSession(
                str(folder / graph.file.path), options, providers=list(provider.names)
            )
        except Exception as error:  # ONNX Runtime's errors share no base but Exception
            raise StylemuseError(f"{graph.file.path} cannot be loaded: {_first_line(error)}") from error
        if self._session.get_providers()[0] != provider.names[0]:
            raise StylemuseError(f"ONNX Runtime could not start {provider.names[0]} for {graph.file.path}")
        overridable = self._session.get_overridable_initializers()
        _check(self.file, graph.inputs, [*self._session.get_inputs(), *overridable])
        _check(self.file, graph.outputs, self._session.get_outputs())
        self.inputs = frozenset(tensor.name for tensor in graph.inputs)
        self.outputs = tuple(tensor.name for tensor in graph.outputs)

    def keep(self, array: Array) -> Any:
        """An array where the graph runs, to be given to it many times; on a CPU it is the array's own memory."""
        return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), self.device)

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Array]:
        """Outputs by name for arrays, or what `keep` gave, by name."""
        binding = self._session.io_binding()
        for name, value in feeds.items():
            # The one way that overridable initializers can be bound, too.
            binding.bind_ortvalue_input(name, self.keep(value) if isinstance(value, np.ndarray) else value)
        for name in self.outputs:
            binding.bind_output(name, "cpu")
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:
            raise StylemuseError(f"{self.file} failed: {_first_line(error)}") from error
        return dict(zip(self.outputs, binding.copy_outputs_to_cpu(), strict=True))


class OnnxNetwork:
    """Text, transformer and VQ of an exported folder; the methods are those of ``backend.network.TorchNetwork``.

    Args:
        folder, manifest: the folder, and its manifest as ``manifest.read`` gave it.
        slots: how many styles can be resident at once.
        threads: None leaves the number to ONNX Runtime.
        style: what a slot holds: the holder, to tell it from others, its name, and its tensors as the graphs take them.
        files: what keeps the folder there, if it is temporary.
    """

    name = "onnx"

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        *,
        device: str | None = None,
        slots: int = 64,
        threads: int | None = None,
        style: Callable[[int], tuple[object, str, Callable[[], Mapping[str, Array]]]] | None = None,
        files: object = None,
    ) -> None:
        self.provider, self.manifest, self.threads = choose_provider(device), manifest, threads
        self.device, self.dtype, self.mask_id = "cpu", manifest.precision, manifest.mask_id
        self.sizes = Sizes(manifest.side, manifest.factor, manifest.unit)
        self.tokenizer = ClipTokenizer.from_folder(folder / "tokenizer", manifest.length)
        # The whole job in one graph is for those who run no loop.
        parts = {name: graph for name, graph in manifest.graphs.items() if name != "generate"}
        self._graphs = {name: Session(folder, graph, self.provider, threads) for name, graph in parts.items()}
        inputs = [*manifest.graphs["condition"].inputs, *manifest.graphs["step"].inputs]
        scale = next((style.scale for style in manifest.styles.values()), None)
        self.styles = styles.make(manifest.form, inputs, slots, scale)
        self._style, self._files = style, files
        self._held: dict[int, object] = {}
        self._stacked: tuple[tuple[Context, ...], dict[str, Any]] | None = None

    def row_bytes(self, ahead: int) -> None:
        """None: what ONNX Runtime takes is its own affair."""

    @property
    def text_length(self) -> int:
        """Ids that every prompt is padded or cut to."""
        return self.tokenizer.length

    def prompt_tokens(self, prompt: str) -> int:
        """How many tokens a prompt is, its start and end included; the encoder reads `text_length` of them."""
        return self.tokenizer.count(prompt)

    def text(self, prompt: str) -> Text:
        """One prompt -> features and pooled vector."""
        made = self._graphs["text"].run({"ids": self.tokenizer.ids([prompt])})
        return Text(made["text"], made["pooled"])

    def context(self, text: Text, grid: tuple[int, int], slot: int = styles.BASE, scale: float = 1.0) -> Context:
        """The step-constant part of one row. grid is (h, w) in tokens; slot -1 is the base."""
        self.hold(slot)
        graph = self._graphs["condition"]
        height, width = (side * self.manifest.factor for side in grid)
        micro = np.array([[width, height, 0, 0, AESTHETIC_SCORE]], np.float32)
        feeds = {"text": text.penultimate, "pooled": text.pooled, "micro": micro}
        made = graph.run(feeds | self.styles.feeds(graph.inputs, [slot], [scale]))
        return Context(made, grid, slot, scale)

    def contexts(self, rows: Sequence[tuple[Text, tuple[int, int], int, float]]) -> list[Context]:
        """The step-constant parts of rows of (text, grid, slot, scale)."""
        return [self.context(*row) for row in rows]

    def decode_step(self, canvases: Sequence[Canvas], rows: Rows, timings: Timings | None) -> tuple[Any, Any]:
        """Tokens and unknown of each canvas after one step, (N,) each."""
        with timed(timings, "graph", "cpu"):
            made = self._graphs["step"].run(self.step_feeds(canvases, rows))
        after, preview = (made[name].reshape(len(canvases), -1) for name in ("tokens_out", "preview"))
        return preview, after == self.mask_id

    def step_feeds(self, canvases: Sequence[Canvas], rows: Rows) -> dict[str, Any]:
        """What step.onnx takes for one step of these canvases."""
        unknown = np.stack([canvas.unknown for canvas in canvases])
        tokens = np.where(unknown, self.mask_id, np.stack([canvas.tokens for canvas in canvases]))
        width = max(len(branches) for branches in rows.branches)
        branches, weights = np.zeros((len(canvases), width), np.int64), np.zeros((len(canvases), width), np.float32)
        for index, pairs in enumerate(rows.branches):
            branches[index, : len(pairs)], weights[index, : len(pairs)] = zip(*pairs, strict=True)
        numbers = [(each.steps, each.step) for each in canvases]
        return {
            "tokens": tokens.reshape(-1, *rows.contexts[0].grid),
            "sources": np.array(rows.sources, np.int64),
            "branches": branches,
            "weights": weights,
            "seeds": np.array([canvas.seed for canvas in canvases], np.int64),
            "steps": np.array([step for _, step in numbers], np.int64),
            "masked": np.array([steps.masked_after[step] for steps, step in numbers], np.int64),
            "token_temperature": np.array([steps.token_temperature[step] for steps, step in numbers], np.float32),
            "choice_temperature": np.array([steps.choice_temperature[step] for steps, step in numbers], np.float32),
            "raw_logit": np.array([steps.score == "logit" for steps, _ in numbers]),
            **self._conditioning(tuple(rows.contexts)),
        }

    def pixels(self, tokens: Any) -> list[Image.Image]:
        """(B, h, w) codes -> B pictures."""
        grids = np.asarray(tokens).astype(np.int64)
        made = (self._graphs["pixels"].run({"tokens": grid[None]})["images"][0] for grid in grids)
        return [Image.fromarray(picture) for picture in made]

    def array(self, values: Array) -> Array:
        """The values as they are."""
        return values

    def codes(self, picture: Image.Image, grid: tuple[int, int]) -> Array:
        """A picture, resized to the grid -> codes (h, w)."""
        height, width = (side * self.manifest.factor for side in grid)
        resized = picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
        return self._graphs["codes"].run({"images": np.asarray(resized)[None]})["tokens"][0]

    def hold(self, slot: int) -> None:
        """Make sure that the graphs' slot has what the registry's slot holds."""
        if slot == styles.BASE:
            return
        assert self._style is not None, "a network without a registry has no slots"
        holder, name, packed = self._style(slot)
        if self._held.get(slot) is not holder:
            self.styles.write(slot, name, packed())
            self._held[slot] = holder

    def explain(self) -> dict[str, str]:
        """What ONNX Runtime runs, and how."""
        threads = "ONNX Runtime's own choice" if self.threads is None else str(self.threads)
        told = {
            "kernels": f"ONNX Runtime {onnxruntime.__version__}, {self.provider.names[0]}; form {self.manifest.form}",
            "threads": threads,
        }
        if self.provider.device == "cuda":
            told["CUDA graphs"] = "not used: what a step computes is as long as the positions that are still masked"
        return told

    def _conditioning(self, contexts: tuple[Context, ...]) -> dict[str, Any]:
        """The rows' conditioning, stacked, and their styles, kept while the rows stay the same."""
        if self._stacked is None or self._stacked[0] != contexts:
            step, names = self._graphs["step"], contexts[0].conditioning
            stacked = {
                name: step.keep(np.concatenate([context.conditioning[name] for context in contexts])) for name in names
            }
            slots, scales = [each.slot for each in contexts], [each.scale for each in contexts]
            for slot in set(slots):
                self.hold(slot)
            given = self.styles.feeds(step.inputs, slots, scales)
            self._stacked = (contexts, stacked | {name: step.keep(array) for name, array in given.items()})
        return self._stacked[1]


def _check(what: str, told: Sequence[Tensor], found: Sequence[Any]) -> None:
    """Raise unless the graph takes or gives what is told."""
    there = {each.name: (each.type, len(each.shape)) for each in found}
    expected = {each.name: (f"tensor({_KINDS[each.dtype]})", len(each.axes)) for each in told}
    if there != expected:
        name = sorted(dict(there.items() ^ expected.items()))[0]
        raise StylemuseError(f"{what}: {name[:80]!r} is not as the manifest says")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300]
