"""The manifest of an exported folder: what is in it, told once, and checked before anything of it is used.

manifest.json  text.onnx  condition.onnx  step.onnx  pixels.onnx  codes.onnx  generate.onnx
tokenizer/     adapters/<style>.<graph>.onnx_adapter     each graph maybe with <name>.onnx.data

A folder may come from anyone. Only files the manifest names are opened, by names that cannot leave the folder; each
must have the size and the hash it tells, no link is followed, and a graph may point to no file but its own sidecar,
generate.onnx to those of its parts, too.
Neither torch nor onnx is needed here.
"""

from __future__ import annotations

import hashlib
import json
import re
import stat
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...backend import cpu
from ...core import STYLE_NAME, StylemuseError, is_number
from .spec import GRAPHS, Axis, Tensor

NAME = "manifest.json"
SCHEMA = 1
MAX_JSON_BYTES = 8 << 20
MAX_GRAPH_BYTES = 1 << 30
MAX_DATA_BYTES = 64 << 30
MAX_STYLES = 10_000
MAX_ROWS = 4096
PRECISIONS = ("float32", "float16", "int8")
DTYPES = ("int64", "float32", "float16", "bool", "uint8")

_TOKENIZER = re.compile(r"tokenizer/(tokenizer|tokenizer_config|special_tokens_map|vocab)\.json|tokenizer/merges\.txt")


@dataclass(frozen=True)
class File:
    """A file of the folder: its path inside, with "/", its size and its hash."""

    path: str
    bytes: int
    sha256: str

    @classmethod
    def of(cls, folder: Path, path: str) -> File:
        """A file that is there."""
        return cls(path, (folder / path).stat().st_size, _sha256(folder / path))


@dataclass(frozen=True)
class GraphFile:
    """A graph: its file, its weights' file, what it takes and gives, and the error that each rewrite brought."""

    file: File
    data: File | None
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    errors: Mapping[str, float]


@dataclass(frozen=True, eq=False)
class StyleFile:
    """A style: its tensors' file for each graph that it changes, empty where the style is in the graphs; its slot in
    the tables of a bank's generate.onnx, where 0 is the base, and 0 in other forms; and what a request has to know of
    it, as in ``adapters.canonical.Adapter``."""

    name: str
    files: Mapping[str, File]
    slot: int
    kind: str
    rank: int
    scale: float
    descriptor: str
    caption: str
    recommended: Mapping[str, Any]
    licence: str

    @property
    def sha256(self) -> str:
        """Hash of its files' hashes: of a style in the graphs, which has none, that of nothing."""
        return hashlib.sha256("".join(self.files[graph].sha256 for graph in sorted(self.files)).encode()).hexdigest()

    @property
    def has_picture(self) -> bool:
        """False: an export has no pictures."""
        return False

    def picture(self) -> None:
        """None."""


@dataclass(frozen=True)
class Manifest:
    """An exported folder.

    Attributes:
        form: "bank", "single" or "fused"; of "fused", the only style, if any, is in the graphs.
        mask_id: the token of a masked position. codes: how many codes there are.
        side: the model's own grid, in tokens; factor: pixels per token; unit: sides must be multiples of it, in pixels.
        length: ids per prompt.
        rows: counts of rows of one call that the graphs were tried with; any other runs, too.
        defaults: what the model recommends, "steps" and "scale".
        schedule: the numbers of every step of the default schedule on an empty grid, for readers without this runtime.
        agreement: how the graphs compare with the networks they were made from.
        instructions: those of ``cpu.NAMES`` without which a CPU computes something else.
    """

    model: str
    form: str
    precision: str
    mask_id: int
    codes: int
    side: int
    factor: int
    unit: int
    length: int
    defaults: Mapping[str, Any]
    graphs: Mapping[str, GraphFile]
    tokenizer: tuple[File, ...]
    styles: Mapping[str, StyleFile]
    rows: tuple[int, ...] = ()
    schedule: Mapping[str, Any] = field(default_factory=dict)
    agreement: Mapping[str, Any] = field(default_factory=dict)
    instructions: tuple[str, ...] = ()

    def write(self, folder: Path) -> None:
        """Write manifest.json."""
        text = json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1, allow_nan=False)
        (folder / NAME).write_text(text + "\n", encoding="utf-8")


def read(folder: Path) -> Manifest:
    """The manifest of a folder whose files are all there, unchanged.

    Raises:
        StylemuseError: one line that says what is wrong with the folder.
    """
    path = folder / NAME
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise StylemuseError(f"{NAME} is larger than {MAX_JSON_BYTES >> 20} MB")
        facts = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant)
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, StylemuseError):
            raise
        raise StylemuseError(f"{NAME} cannot be read: {type(error).__name__}") from error
    try:
        manifest = _manifest(facts)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        if isinstance(error, StylemuseError):
            raise
        raise StylemuseError(f"{NAME} is not as an export writes it: {type(error).__name__} {error}"[:300]) from error
    _check_files(folder, manifest)
    return manifest


def _manifest(facts: Mapping[str, Any]) -> Manifest:
    # Version 0.1 wrote int8 graphs with weights of eight bits, and nothing of what they need.
    older = {"instructions": ["VNNI"] if facts["precision"] == "int8" else []}
    known = {name: {**older, **facts}[name] for name in Manifest.__dataclass_fields__}
    if unknown := facts.keys() - known.keys() - {"schema"}:
        raise StylemuseError(f"{NAME} has an unknown entry {sorted(unknown)[0]!r}"[:200])
    _need(
        facts.get("schema") == SCHEMA, f"schema {facts.get('schema')!r} is not supported; this runtime reads {SCHEMA}"
    )
    _need(known["form"] in ("bank", "single", "fused"), "form must be bank, single or fused")
    _need(known["precision"] in PRECISIONS, f"precision must be one of {', '.join(PRECISIONS)}")
    for name, most in (
        ("mask_id", 1 << 24),
        ("codes", 1 << 24),
        ("side", 4096),
        ("factor", 256),
        ("unit", 512),
        ("length", 4096),
    ):
        _need(type(known[name]) is int and 1 <= known[name] <= most, f"{name} must be a whole number from 1 to {most}")
    _need(known["codes"] <= known["mask_id"], "the mask is not a code")
    rows = known["rows"] = tuple(known["rows"])
    _need(all(type(count) is int and 1 <= count <= MAX_ROWS for count in rows), f"rows are from 1 to {MAX_ROWS}")
    _need(isinstance(known["model"], str), "model must be a text")
    needed = known["instructions"] = tuple(known["instructions"])
    _need(set(needed) <= set(cpu.NAMES), f"instructions are of {', '.join(cpu.NAMES)}")
    for name in ("defaults", "schedule", "agreement", "graphs", "styles"):
        _need(isinstance(known[name], dict), f"{name} must be an object")
    defaults = known["defaults"]
    _need(
        type(defaults.get("steps", 12)) is int and 1 <= defaults.get("steps", 12) <= 1000,
        "defaults: steps is 1 to 1000",
    )
    _need(is_number(defaults.get("scale", 10.0)), "defaults: scale must be a number")
    _need(set(known["graphs"]) == set(GRAPHS), f"graphs must be {', '.join(GRAPHS)}")
    _need(len(known["styles"]) <= MAX_STYLES, f"at most {MAX_STYLES} styles are allowed")
    known["graphs"] = {name: _graph(name, each) for name, each in known["graphs"].items()}
    known["styles"] = {name: _style(name, each) for name, each in known["styles"].items()}
    known["tokenizer"] = tuple(_file(each, _TOKENIZER.fullmatch, MAX_GRAPH_BYTES) for each in known["tokenizer"])
    return Manifest(**known)


def _graph(name: str, facts: Mapping[str, Any]) -> GraphFile:
    file = _file(facts["file"], f"{name}.onnx".__eq__, MAX_GRAPH_BYTES)
    data = None if facts["data"] is None else _file(facts["data"], f"{name}.onnx.data".__eq__, MAX_DATA_BYTES)
    inputs, outputs = (tuple(_tensor(each) for each in facts[part]) for part in ("inputs", "outputs"))
    return GraphFile(file, data, inputs, outputs, dict(facts["errors"]))


def _tensor(facts: Mapping[str, Any]) -> Tensor:
    axes: tuple[Axis, ...] = tuple(facts["axes"])
    _need(isinstance(facts["name"], str) and facts["dtype"] in DTYPES, "a tensor needs a name and a known type")
    _need(all(isinstance(axis, str) or (type(axis) is int and axis > 0) for axis in axes), "axes are names or sizes")
    return Tensor(facts["name"], facts["dtype"], axes, overridable=facts["overridable"] is True)


def _style(name: str, facts: Mapping[str, Any]) -> StyleFile:
    _need(STYLE_NAME.fullmatch(name) is not None and facts["name"] == name, f"style {name[:80]!r} is not a name")
    files = {
        graph: _file(file, f"adapters/{name}.{graph}.onnx_adapter".__eq__, MAX_GRAPH_BYTES)
        for graph, file in facts["files"].items()
    }
    _need(files.keys() <= {"condition", "step"}, f"style {name}: files are for condition and step")
    _need(facts["kind"] in ("lora", "bottleneck") and type(facts["rank"]) is int, f"style {name}: kind or rank")
    _need(type(facts["slot"]) is int and 0 <= facts["slot"] <= MAX_STYLES, f"style {name}: slot")
    _need(is_number(facts["scale"]), f"style {name}: scale must be a number")
    _need(all(isinstance(facts[text], str) for text in ("descriptor", "caption", "licence")), f"style {name}: texts")
    recommended = facts["recommended"]
    _need(all(isinstance(each, str) or is_number(each) for each in recommended.values()), f"style {name}: recommended")
    return StyleFile(**{**{key: facts[key] for key in StyleFile.__dataclass_fields__}, "files": files})


def _file(facts: Mapping[str, Any], allowed: Callable[[str], Any], most: int) -> File:
    path, size, sha256 = facts["path"], facts["bytes"], facts["sha256"]
    _need(isinstance(path, str) and bool(allowed(path)), f"file {str(path)[:80]!r} is not one of an export")
    _need(type(size) is int and 0 <= size <= most, f"{path}: its size must be at most {most} bytes")
    _need(isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256) is not None, f"{path}: sha256")
    return File(path, size, sha256)


def _check_files(folder: Path, manifest: Manifest) -> None:
    """Every file is a plain one inside the folder, with the hash and the size that are told."""
    styles = (file for style in manifest.styles.values() for file in style.files.values())
    graphs = (file for graph in manifest.graphs.values() for file in (graph.file, graph.data))
    for file in (*manifest.tokenizer, *graphs, *styles):
        if file is None:
            continue
        path = folder / file.path
        try:
            plain = not path.parent.is_symlink() or path.parent == folder
            found = path.lstat()
        except OSError:
            raise StylemuseError(f"{file.path} is missing") from None
        _need(plain and stat.S_ISREG(found.st_mode) and found.st_nlink == 1, f"{file.path} is a link, or no file", "")
        _need(found.st_size == file.bytes, f"{file.path} has {found.st_size} bytes, not {file.bytes}", "")
        _need(_sha256(path) == file.sha256, f"{file.path} was changed: its sha256 is another", "")
    sidecars = {name: graph.data.path for name, graph in manifest.graphs.items() if graph.data}
    for name, graph in manifest.graphs.items():
        own = sidecars if name == "generate" else {name} & sidecars.keys()
        _check_references(folder / graph.file.path, [sidecars[each] for each in own])


def _check_references(path: Path, allowed: Collection[str]) -> None:
    """A graph names no file but these sidecars. Outside files are named by an entry with the key "location"."""
    content = path.read_bytes()
    entries = (b"\x0a\x08location\x12" + bytes([len(each)]) + each.encode() for each in allowed)
    known = sum(content.count(entry) for entry in entries)
    _need(content.count(b"location") == known, f"{path.name} points to a file that is not its sidecar", "")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _need(fine: bool, otherwise: str, where: str = f"{NAME}: ") -> None:
    if not fine:
        raise StylemuseError(f"{where}{otherwise}"[:300])


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")
