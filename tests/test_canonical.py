"""adapters/canonical.py: round trips to the bit, durable writes, and damaged folders that only give clear errors."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stylemuse.adapters import canonical
from stylemuse.adapters.canonical import Adapter
from stylemuse.core import StylemuseError


def adapter() -> Adapter:
    torch.manual_seed(0)
    return Adapter(
        name="neon-1",
        kind="lora",
        tensors={
            "layer.to_q": (torch.randn(3, 5), torch.randn(7, 3)),
            "layer.to_out.0": (torch.randn(2, 7), torch.randn(5, 2)),
        },
        base_model="amused/amused-256",
        base_sha256="0a" * 32,
        scale=0.8,
        descriptor="in neon style",
        caption="A cat in neon style",
        recommended={"guidance": "StyleDrop", "style": 2.0, "steps": 12},
        licence="CC-BY-4.0",
    )


def same(one: Adapter, other: Adapter) -> bool:
    facts = ("name", "kind", "base_model", "base_sha256", "scale", "descriptor", "caption", "licence", "rank", "sha256")
    return (
        all(getattr(one, fact) == getattr(other, fact) for fact in facts)
        and one.recommended == other.recommended
        and one.tensors.keys() == other.tensors.keys()
        and all(
            torch.equal(one.tensors[site][side], other.tensors[site][side]) for site in one.tensors for side in (0, 1)
        )
    )


@pytest.mark.parametrize("kind", ["lora", "bottleneck"])
def test_round_trip(tmp_path: Path, kind: str) -> None:
    original = adapter()
    if kind == "bottleneck":
        shared = torch.randn(5, 2)
        original = replace(original, kind="bottleneck", tensors={"a": (shared, shared.T), "b": (shared, shared.T)})
    folder = canonical.save(original, tmp_path / "neon")
    loaded = canonical.load(folder)
    assert same(loaded, original)
    assert sorted(file.name for file in folder.iterdir()) == ["adapter.json", "adapter.safetensors"]
    assert hashlib.sha256((folder / "adapter.safetensors").read_bytes()).hexdigest() == original.sha256
    assert os.listdir(tmp_path) == ["neon"], "no temporary names are left"


def test_an_existing_adapter_is_never_overwritten(tmp_path: Path) -> None:
    folder = canonical.save(adapter(), tmp_path / "neon")
    before = (folder / "adapter.json").read_bytes()
    with pytest.raises(StylemuseError, match="neon exists already"):
        canonical.save(replace(adapter(), name="other"), folder)
    assert (folder / "adapter.json").read_bytes() == before
    assert os.listdir(tmp_path) == ["neon"]


def test_everything_is_synced_before_save_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def recording_fsync(descriptor: int) -> None:
        events.append("fsync " + Path(os.readlink(f"/proc/self/fd/{descriptor}")).name.split(".")[-1])
        fsync(descriptor)

    def recording_rename(self: Path, target: Path) -> Path:
        events.append("rename")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(Path, "rename", recording_rename)
    canonical.save(adapter(), tmp_path / "neon")
    assert events[:2] == ["fsync safetensors", "fsync json"]
    assert events[3:] == ["rename", f"fsync {tmp_path.name.split('.')[-1]}"]


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StylemuseError, match="neon cannot be written: No space left on device"):
        canonical.save(adapter(), tmp_path / "neon")
    assert os.listdir(tmp_path) == []


NAN = torch.tensor([[float("nan")]])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "../etc"}, "name '../etc' is not allowed"),
        ({"name": ""}, "is not allowed"),
        ({"kind": "dora"}, "'dora' is unknown; allowed are lora, bottleneck"),
        ({"tensors": {}}, "has no tensors"),
        ({"tensors": {"a": (torch.ones(3), torch.ones(3))}}, "must be two matrices"),
        ({"tensors": {"a": (torch.ones(3, 0), torch.ones(2, 3))}}, "must be two matrices"),
        ({"tensors": {"a": (torch.ones(3, 2), torch.ones(2, 2))}}, "do not fit as a lora pair"),
        ({"kind": "bottleneck"}, "do not fit as a bottleneck pair"),
        ({"tensors": {"a": (torch.ones(1, 2).half(), torch.ones(2, 1))}}, "must be float32"),
        ({"tensors": {"a": (NAN, torch.ones(2, 1))}}, "NaN or infinity"),
        ({"scale": float("inf")}, "scale must be a finite number"),
        ({"base_sha256": "abc"}, "64 hexadecimal digits"),
        ({"descriptor": None}, "descriptor must be a text"),
        ({"recommended": {"steps": [1]}}, "texts or finite numbers"),
    ],
)
def test_invalid_adapters_cannot_be_made(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(StylemuseError, match=words):
        replace(adapter(), **changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"schema_version": 2}, "schema_version is 2; this release reads 1"),
        ({"schema_version": True}, "schema_version is True"),
        ({"colour": "blue"}, "unknown fields colour"),
        ({"licence": ...}, "missing fields licence"),
        ({"rank": 4}, "rank is 4 but the tensors have 3"),
        ({"sha256": "0" * 64}, "does not match the sha256"),
        ({"scale": 10**400}, "scale must be a finite number"),
        ({"name": ["neon"]}, "is not allowed"),
        ({"recommended": []}, "recommended must be an object"),
        ({"caption": "\ud800"}, "caption must be a text"),
    ],
)
def test_a_changed_description_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    folder = canonical.save(adapter(), tmp_path / "neon")
    facts = json.loads((folder / "adapter.json").read_text()) | changes
    text = json.dumps({key: value for key, value in facts.items() if value is not ...})
    (folder / "adapter.json").write_text(text)
    with pytest.raises(StylemuseError, match=words):
        canonical.load(folder)


@pytest.mark.parametrize(
    ("flat", "words"),
    [
        ({"a.down": torch.ones(2, 3)}, "unpaired or unknown tensors a.up"),
        ({"a.down": torch.ones(2, 3), "a.up": torch.ones(4, 2), "b": torch.ones(1)}, "unknown tensors b"),
        ({"a.down": torch.ones(2, 3), "a.up": torch.full((4, 2), torch.inf)}, "a holds NaN or infinity"),
        ({"a.down": torch.ones(2, 3).half(), "a.up": torch.ones(4, 2)}, "a must be float32"),
    ],
)
def test_odd_tensors_are_refused_even_with_a_matching_hash(tmp_path: Path, flat: dict[str, Any], words: str) -> None:
    folder = canonical.save(adapter(), tmp_path / "neon")
    data = safetensors.torch.save(flat)
    rewrite(folder, data)
    with pytest.raises(StylemuseError, match=words):
        canonical.load(folder)


def rewrite(folder: Path, data: bytes) -> None:
    """Other tensors, and their hash in the description."""
    (folder / "adapter.safetensors").write_bytes(data)
    facts = json.loads((folder / "adapter.json").read_text()) | {"sha256": hashlib.sha256(data).hexdigest()}
    (folder / "adapter.json").write_text(json.dumps(facts))


def test_missing_and_oversized_files(tmp_path: Path) -> None:
    with pytest.raises(StylemuseError, match=r"adapter.json is missing"):
        canonical.load(tmp_path)
    folder = canonical.save(adapter(), tmp_path / "neon")
    with (folder / "adapter.safetensors").open("ab") as file:
        file.truncate(1 << 40)  # sparse: a reader that allocated before asking would die here
    with pytest.raises(StylemuseError, match="at most 1073741824 are allowed"):
        canonical.load(folder)
    (folder / "adapter.json").write_text("[" * 100_000)
    with pytest.raises(StylemuseError, match=r"adapter.json is not valid JSON"):
        canonical.load(folder)
    os.unlink(folder / "adapter.json")
    os.mkfifo(folder / "adapter.json")  # a reader that opened it would wait for ever
    with pytest.raises(StylemuseError, match="not a regular file"):
        canonical.load(folder)


def saved() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as place:
        folder = canonical.save(adapter(), Path(place) / "neon")
        return {file.name: file.read_bytes() for file in folder.iterdir()}


FILES = saved()


@st.composite
def mutations(draw: st.DrawFn) -> tuple[str, bool, list[tuple[str, int, bytes]]]:
    file = draw(st.sampled_from(["adapter.json", "adapter.safetensors"]))
    edit = st.tuples(st.sampled_from(["replace", "insert", "cut"]), st.integers(0, 2000), st.binary(max_size=8))
    return file, draw(st.booleans()), draw(st.lists(edit, min_size=1, max_size=4))


@given(mutations())
@settings(max_examples=300, deadline=None)
def test_mutated_files_load_correctly_or_fail_clearly(mutation: tuple[str, bool, list[tuple[str, int, bytes]]]) -> None:
    name, hash_again, edits = mutation
    original = adapter()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for file, content in FILES.items():
            (folder / file).write_bytes(content)
        data = FILES[name]
        for action, position, new in edits:
            at = position % (len(data) + 1)
            end = at + {"replace": len(new), "insert": 0, "cut": len(new) * 16}[action]
            data = data[:at] + (b"" if action == "cut" else new) + data[end:]
        if name == "adapter.safetensors" and hash_again:
            rewrite(folder, data)
        else:
            (folder / name).write_bytes(data)
        error = ""
        try:
            loaded = canonical.load(folder)
            assert all(torch.isfinite(side).all() for pair in loaded.tensors.values() for side in pair)
            assert hash_again or name == "adapter.json" or same(loaded, original)
        except StylemuseError as refusal:
            error = str(refusal)
        assert "\n" not in error
        assert len(error) < 400
