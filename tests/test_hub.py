"""Names of models -> folders; the Hub is replaced by a function, so nothing leaves the machine."""

from __future__ import annotations

import logging
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from stylemuse.core import StylemuseError
from stylemuse.loading import hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"

PUBLISHED = [
    "model_index.json",
    "README.md",
    "assets/collage_small.png",
    "scheduler/scheduler_config.json",
    "tokenizer/merges.txt",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    *(
        f"{component}/{name}"
        for component, stem in hub.COMPONENTS.items()
        for name in (
            "config.json",
            f"{stem}.safetensors",
            f"{stem}.fp16.safetensors",
            f"{stem}.bin",
            f"{stem}.onnx",
            f"{stem}.ckpt",
        )
    ),
]


class Calls(list[dict[str, Any]]):
    """What the replaced snapshot_download was asked, and the folder it answers with."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Calls:
    calls = Calls(tmp_path / "models--org--model" / "snapshots" / COMMIT)
    calls.folder.mkdir(parents=True)
    (calls.folder / "model_index.json").write_text("{}")

    def snapshot_download(name: str, **options: Any) -> str:
        calls.append({"name": name, **options})
        return str(calls.folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def test_demo_is_the_embedded_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "assets" / "demo"
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    monkeypatch.setattr(hub, "__file__", str(tmp_path / "loading" / "hub.py"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    assert hub.resolve("demo") == folder


def test_a_folder_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: Calls) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    assert hub.resolve(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert hub.resolve(f"~/{tmp_path.name}") == tmp_path
    assert hub.revision_of(tmp_path) is None
    assert not calls


def test_published_models_are_pinned(calls: Calls) -> None:
    for name, commit in hub.PINNED.items():
        assert len(commit) == 40
        assert hub.resolve(name) == calls.folder
        assert hub.resolve(name, revision="main") == calls.folder
        assert [call["revision"] for call in calls[-2:]] == [commit, "main"]
        assert {call["name"] for call in calls[-2:]} == {name}


def test_an_unpinned_model_reports_its_commit(calls: Calls, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="stylemuse.loading.hub"):
        folder = hub.resolve("org/model")
    assert calls[0]["revision"] is None
    assert hub.revision_of(folder) == COMMIT
    assert COMMIT in caplog.text
    caplog.clear()
    hub.resolve("org/model", revision="v1")
    assert not caplog.records


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_one_variant_is_fetched_and_nothing_that_runs_code(calls: Calls, variant: str | None) -> None:
    hub.resolve("org/model", variant=variant)
    patterns = calls[0]["allow_patterns"]
    fetched = [name for name in PUBLISHED if any(fnmatchcase(name, pattern) for pattern in patterns)]
    weights = [name for name in fetched if name.endswith(".safetensors")]
    assert len(weights) == 3
    assert all((".fp16." in name) == (variant == "fp16") for name in weights)
    assert {name for name in PUBLISHED if name.endswith((".json", ".txt"))} == set(fetched) - set(weights)


@pytest.mark.parametrize(
    ("variant", "names"),
    [
        (None, ["model-00001-of-00002.safetensors", "model.safetensors.index.json"]),
        ("fp16", ["model.fp16-00001-of-00002.safetensors", "model.safetensors.index.fp16.json"]),
        ("fp16", ["model-00001-of-00002.fp16.safetensors", "model.fp16.safetensors.index.json"]),
    ],
)
def test_shards_are_fetched(variant: str | None, names: list[str]) -> None:
    patterns = hub.wanted_files(variant)
    for name in names:
        assert any(fnmatchcase(f"text_encoder/{name}", pattern) for pattern in patterns)


def test_names_that_are_nothing_are_refused(tmp_path: Path, calls: Calls) -> None:
    allowed = "not found; allowed: 'demo', a folder, or a Hub id 'organization/model'"
    for name in ("nowhere", "/no/such/folder", "./folder", "a/b/c", "org/mo del", "https://huggingface.co/org/model"):
        with pytest.raises(StylemuseError, match=allowed):
            hub.resolve(name)
    with pytest.raises(StylemuseError, match=r"holds no model_index\.json; a folder in diffusers' layout"):
        hub.resolve(str(tmp_path))
    for name in ("demo", str(calls.folder)):
        with pytest.raises(StylemuseError, match="revision 'main' given; it is allowed for a Hub id only"):
            hub.resolve(name, revision="main")
    (calls.folder / "model_index.json").unlink()
    with pytest.raises(StylemuseError, match=r"holds no model_index\.json"):
        hub.resolve("org/model")


def failure(kind: type[Exception], message: str) -> Exception:
    """An error of the Hub's client; those of the server need a response, whatever its transport is."""
    error = kind.__new__(kind)
    error.args = (message,)
    return error


@pytest.mark.parametrize(
    ("kind", "offline", "message"),
    [
        (errors.LocalEntryNotFoundError, True, "HF_HUB_OFFLINE is set, and it is not complete in the cache"),
        (errors.LocalEntryNotFoundError, False, "the Hub cannot be reached, and it is not complete in the cache"),
        (errors.GatedRepoError, False, "access has to be granted on its Hub page"),
        (errors.RepositoryNotFoundError, False, "no such model, or it is private; known: amused/amused-256"),
        (errors.RevisionNotFoundError, False, "no such commit, tag or branch"),
        (errors.HFValidationError, False, "not a Hub id; allowed: 'organization/model'"),
        (OSError, False, r"the download failed: disk full$"),
        (RuntimeError, False, r"the download failed: disk full$"),
    ],
)
def test_a_failed_download_is_one_clear_line(
    monkeypatch: pytest.MonkeyPatch, kind: type[Exception], offline: bool, message: str
) -> None:
    def snapshot_download(name: str, **options: Any) -> str:
        raise failure(kind, "disk full\nmore lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    with pytest.raises(StylemuseError, match=message) as caught:
        hub.resolve("org/model", revision="v1")
    assert str(caught.value).startswith("model 'org/model' at revision 'v1': ")
    assert "\n" not in str(caught.value)


def test_a_cached_snapshot_is_found_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    name, commit = next(iter(hub.PINNED.items()))
    folder = tmp_path / f"models--{name.replace('/', '--')}" / "snapshots" / commit
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.resolve(name) == folder
    assert hub.revision_of(hub.resolve(name)) == commit
    with pytest.raises(StylemuseError, match="HF_HUB_OFFLINE is set"):
        hub.resolve("org/model")
