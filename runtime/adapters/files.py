"""Reading files nobody vouches for, and writing files that survive a crash.

Reading: sizes are bounded before anything is allocated, pickles are refused, and whatever is wrong with a file comes
out as one `StylemuseError` that names the file but not its folder, since the text may reach a client.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..core import StylemuseError

MAX_HEADER_BYTES = 4 << 20
"""Bound on a safetensors header; 168 pairs with long names take 50 kB."""
MAX_FILE_BYTES = 8 << 30
"""Bound on a safetensors file; only checkpoints saved with injected adapters come near (2.4 GB for aMUSEd)."""
MAX_JSON_BYTES = 1 << 20

PICKLES = frozenset({".bin", ".ckpt", ".pkl", ".pt", ".pth"})
NUMBERS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
}


def some(names: Iterable[str], shown: int = 3) -> str:
    """The first few names, then "and N more"."""
    ordered = sorted(names)
    text = ", ".join(ordered[:shown])
    return text if len(ordered) <= shown else f"{text} and {len(ordered) - shown} more"


def quoted(names: Iterable[str]) -> str:
    """`some` of names that may hold anything, in short ASCII."""
    return some(ascii(name)[1:-1][:80] for name in names)


def check_names(file: str, names: Iterable[str]) -> tuple[str, ...]:
    """The names, if errors can quote them on one line."""
    names = tuple(names)
    if any(len(name) > 200 or not name.isprintable() for name in names):
        raise StylemuseError(f"{file}: tensor names must be printable and at most 200 characters long")
    return names


def refuse_pickle(path: Path) -> None:
    """Raise if the name is a pickle's."""
    if path.suffix.lower() in PICKLES:
        raise pickled(path.name)


def pickled(name: str) -> StylemuseError:
    """The error for a pickle: reading one runs whatever code it carries."""
    return StylemuseError(f"{name} is a pickle, which can run code when read; convert it to .safetensors offline first")


def parse_json(data: bytes | str, what: str) -> dict[str, Any]:
    """A JSON object of bounded size and finite numbers."""
    if len(data) > MAX_JSON_BYTES:
        raise StylemuseError(f"{what} holds {len(data)} bytes of JSON; at most {MAX_JSON_BYTES} are allowed")

    def constant(text: str) -> NoReturn:
        raise ValueError(f"{text} is not a JSON number")

    try:
        value = json.loads(data, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise StylemuseError(f"{what} is not valid JSON: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise StylemuseError(f"{what} must be a JSON object, not {type(value).__name__}")
    return value


def read_bytes(path: Path, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes."""
    try:
        if not path.is_file():
            raise StylemuseError(f"{path.name} is missing or not a regular file")
        if (size := path.stat().st_size) > limit:
            raise StylemuseError(f"{path.name} has {size} bytes; at most {limit} are allowed")
        with path.open("rb") as file:
            return file.read(size)
    except OSError as error:
        raise StylemuseError(f"{path.name} cannot be read: {error.strerror}") from None


class TensorFile:
    """An open safetensors file whose header is sound; tensors are read one at a time.

    Not by safetensors' own ``get_tensor``: in 0.8.0 it leaks two integers of every torch tensor, which a server that
    takes uploads all day would feel.
    """

    def __init__(self, name: str, file: BufferedReader) -> None:
        file.seek(0)
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        self.name, self._file, self._start = name, file, 8 + length
        self.metadata: Mapping[str, str] = header.pop("__metadata__", None) or {}
        self._header: Mapping[str, Any] = header
        self.names: tuple[str, ...] = check_names(name, sorted(header))

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape from the header; nothing is read."""
        return tuple(self._header[key]["shape"])

    def read(self, key: str) -> Tensor:
        """The tensor in its own type; an error if it does not hold numbers, or holds NaN or infinity."""
        kind, (begin, end) = self._header[key]["dtype"], self._header[key]["data_offsets"]
        if kind not in NUMBERS:
            raise StylemuseError(f"{self.name}: {key} has type {kind}; allowed are {', '.join(sorted(NUMBERS))}")
        data = bytearray(end - begin)
        self._file.seek(self._start + begin)
        if self._file.readinto(data) != len(data):
            raise StylemuseError(f"{self.name} was cut while it was read")
        tensor = torch.frombuffer(data, dtype=NUMBERS[kind]) if data else torch.empty(0, dtype=NUMBERS[kind])
        if not bool(torch.isfinite(tensor).all()):
            raise StylemuseError(f"{self.name}: {key} holds NaN or infinity")
        return tensor.reshape(self.shape(key))


@contextmanager
def open_tensors(path: Path) -> Iterator[TensorFile]:
    """Open a safetensors file whose sizes are within bounds and whose header is consistent with its length."""
    refuse_pickle(path)
    try:
        if not path.is_file():
            raise StylemuseError(f"{path.name} is missing or not a regular file")
        with path.open("rb") as file:
            check_start(path.name, file.read(8), path.stat().st_size)
            with safe_open(path, "np"):  # checks that types, shapes and offsets cover the file
                pass
            yield TensorFile(path.name, file)
    except OSError as error:
        raise StylemuseError(f"{path.name} cannot be read: {error.strerror or 'damaged'}") from None
    except SafetensorError as error:
        raise StylemuseError(f"{path.name} is damaged or not a safetensors file: {one_line(error)}") from None


def check_start(name: str, start: bytes, size: int) -> None:
    """Check the header's length, the first 8 bytes (little endian), against the bounds and the file's size."""
    if start[:2] in (b"PK", b"\x80\x02", b"\x80\x04"):
        raise pickled(name)
    if size > MAX_FILE_BYTES:
        raise StylemuseError(f"{name} has {size} bytes; at most {MAX_FILE_BYTES} are allowed")
    header = struct.unpack("<Q", start)[0] if len(start) == 8 else size
    if header > size - 8 or header > MAX_HEADER_BYTES:
        raise StylemuseError(f"{name} is truncated or not a safetensors file ({size} bytes)")


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Create `folder` with these files, all of it or nothing, on the disk before this returns.

    Written under a temporary name beside it, synced, renamed, and the parent synced. An existing folder that is not
    empty is an error: a live adapter is never overwritten.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise StylemuseError(f"{folder.name} exists already; choose another name or remove it first")
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            for name, data in files.items():
                with (temporary / name).open("xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
            temporary.chmod(0o755)
            sync_folder(temporary)
            temporary.rename(folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        sync_folder(folder.parent)
    except OSError as error:
        raise StylemuseError(f"{folder.name} cannot be written: {error.strerror}") from None


def sync_folder(folder: Path) -> None:
    """Force a folder's entries to the disk; a rename is durable only after this."""
    if os.name == "nt":  # Windows opens no folders, and its rename is journalled.
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def one_line(error: BaseException) -> str:
    """An error's text on one line."""
    return " ".join(str(error).split())[:200]
