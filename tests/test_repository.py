"""The house: who may import whom, how long a file may be, what stands at the top, and what a wheel holds."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

import stylemuse

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {folder: f"stylemuse.{folder}" for folder in ("kernels", "export", "bench")} | {"runtime": "stylemuse"}
ROOMS = {*PACKAGES, "tests"}
IGNORED = tuple(line.rstrip("/") for line in (ROOT / ".gitignore").read_text(encoding="utf-8").split())
MEGABYTE = 1 << 20

MAY_IMPORT = {
    "core": set[str](),
    "protocols": {"core", "adapters"},
    "kernels": {"kernels"},
    "models": {"core", "kernels", "models"},
    "adapters": {"core", "kernels", "adapters"},
    "decoding": {"core", "kernels", "decoding"},
    "backend": {"core", "kernels", "models", "adapters", "decoding", "backend"},
    "requests": {"core", "protocols", "kernels", "decoding", "backend", "requests"},
    "pipeline": {"core", "protocols", "decoding", "backend", "requests"},
    "engine": {"core", "protocols", "kernels", "adapters", "decoding", "backend", "requests", "pipeline", "engine"},
    "loading": {"core", "kernels", "models", "adapters", "decoding", "backend", "pipeline", "loading"},
    "tuning": {"core", "kernels", "models", "adapters", "backend", "requests", "pipeline", "loading", "tuning"},
}
"""What of ours the inner rooms may import; the outer ones (pipeline, tuning, export, ...) may import all but bench."""

ONLY_IN = {
    ("diffusers", "transformers", "peft", "scipy", "pytest", "hypothesis", "matplotlib"): {"bench"},
    ("typer", "rich"): {"cli", "commands"},
    ("fastapi", "starlette", "uvicorn", "prometheus_client"): {"serving"},
    ("onnx", "onnxruntime"): {"export"},
}
"""Packages of others that only these rooms may import, wherever in a file: the peers all is compared with, and what
is heavy or optional."""


def kept(folder: Path) -> Iterator[Path]:
    """The files below a folder that git does not ignore."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not ignored(path):
            yield from kept(path)
        elif not ignored(path):
            yield path


def ignored(path: Path) -> bool:
    return any(fnmatch(path.name, pattern) for pattern in IGNORED)


def files_at_the_top() -> list[Path]:
    return [path for path in sorted(ROOT.iterdir()) if path.is_file() and not ignored(path)]


def python_files(folder: str) -> list[Path]:
    return [path for path in kept(ROOT / folder) if path.suffix == ".py"]


def modules() -> Iterator[tuple[str, Path]]:
    """Every module of the package by its dotted name; a package's own file ends in "__init__"."""
    for folder, package in PACKAGES.items():
        for path in python_files(folder):
            yield ".".join([package, *path.relative_to(ROOT / folder).with_suffix("").parts]), path


def room(module: str) -> str:
    """ "stylemuse.models.vq" -> "models", "stylemuse.core" -> "core", "stylemuse" -> ""."""
    return module.partition(".")[2].partition(".")[0]


def imports(module: str, path: Path) -> Iterator[tuple[str, str]]:
    """Place and full dotted name of everything a module imports, inside functions and for type checking too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            inside = node.module if isinstance(node, ast.ImportFrom) else None
            parents = module.split(".")[: -node.level] if isinstance(node, ast.ImportFrom) and node.level else []
            for alias in node.names:
                yield f"{path.relative_to(ROOT)}:{node.lineno}", ".".join(filter(None, [*parents, inside, alias.name]))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built from a copy of the tree: a build leaves files behind, and takes up those of earlier ones."""
    tree, target = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for path in [*files_at_the_top(), *(path for folder in PACKAGES for path in kept(ROOT / folder))]:
        copy = tree / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    command = f"-m pip wheel --no-deps --no-build-isolation --disable-pip-version-check --quiet -w {target} {tree}"
    subprocess.run([sys.executable, *command.split()], check=True)
    return zipfile.ZipFile(next(target.glob("*.whl")))


def test_the_top_has_five_folders() -> None:
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and not ignored(path)}
    assert {name for name in folders if not name.startswith(".")} == ROOMS


def test_imports_point_inwards() -> None:
    wrong = []
    for module, path in modules():
        for place, target in imports(module, path):
            if target.partition(".")[0] == "stylemuse":
                inner = MAY_IMPORT.get(room(module))
                outer_may = room(target) != "bench" or room(module) == "bench"
                if not (outer_may if inner is None else room(target) in inner):
                    wrong.append(f"{place} imports {target}")
    assert not wrong


def test_no_room_imports_one_that_imports_it() -> None:
    """Neither at once nor by way of others; inside functions and for type checking too."""
    needs: dict[str, set[str]] = {}
    for module, path in modules():
        for _, target in imports(module, path):
            here, there = room(module), room(target)
            if target.partition(".")[0] == "stylemuse" and here and there and here != there:
                needs.setdefault(here, set()).add(there)
    # `protocols` names the adapter's type, and no more of that room.
    needs["protocols"].discard("adapters")
    left = set(needs)
    while free := {name for name in left if not needs[name] & left}:
        left -= free
    assert not {name: sorted(needs[name] & left) for name in left}


def test_packages_of_others_stay_in_their_rooms() -> None:
    rooms = {name: rooms for names, rooms in ONLY_IN.items() for name in names}
    found = [(room(module), *each) for module, path in modules() for each in imports(module, path)]
    wrong = [
        f"{place} imports {name}" for here, place, name in found if here not in rooms.get(name.split(".")[0], {here})
    ]
    assert not wrong


def test_no_module_goes_by_its_folder() -> None:
    """``import kernels`` would find another package, and ``import runtime`` nothing."""
    tests = [(f"tests.{path.stem}", path) for path in python_files("tests")]
    found = {name.partition(".")[0] for module, path in [*modules(), *tests] for _, name in imports(module, path)}
    assert not found & ROOMS


def test_files_are_short() -> None:
    """At most 400 lines; a kernel with its reference may have 500."""
    lines = {path: path.read_text(encoding="utf-8").count("\n") for name in ROOMS for path in python_files(name)}
    long = {path: count for path, count in lines.items() if count > (500 if ROOT / "kernels" in path.parents else 400)}
    assert not {str(path.relative_to(ROOT)): count for path, count in long.items()}


def test_every_module_says_what_it_is_for() -> None:
    assert not [
        module for module, path in modules() if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]


def test_no_path_of_a_machine() -> None:
    pattern = re.compile(rb"(?<![\w.~>-])/(?:home|Users|root|work|mnt)/\w|\b[A-Z]:\\\\?Users")
    files = [*files_at_the_top(), *(path for name in sorted(ROOMS) for path in kept(ROOT / name))]
    found = {str(path.relative_to(ROOT)): pattern.search(path.read_bytes()) for path in files}
    assert not {name: match[0] for name, match in found.items() if match}


def test_versions_agree() -> None:
    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert declared is not None
    assert declared[1] == stylemuse.__version__


def test_assets_are_small() -> None:
    assert sum(path.stat().st_size for path in kept(ROOT / "runtime/assets")) <= 40 * MEGABYTE


@pytest.mark.slow
def test_wheel_has_one_name_and_every_module(wheel: zipfile.ZipFile) -> None:
    names = {name for name in wheel.namelist() if not name.partition("/")[0].endswith(".dist-info")}
    assert {name.partition("/")[0] for name in names} == {"stylemuse"}
    assert {name for name in names if name.endswith(".py")} == {f"{name.replace('.', '/')}.py" for name, _ in modules()}


@pytest.mark.slow
def test_wheel_has_the_data(wheel: zipfile.ZipFile) -> None:
    assets = {f"stylemuse/{path.relative_to(ROOT / 'runtime').as_posix()}" for path in kept(ROOT / "runtime/assets")}
    web = {f"stylemuse/export/web/{path.name}" for path in kept(ROOT / "export/web")}
    assert set(wheel.namelist()) >= assets | web | {"stylemuse/py.typed", "stylemuse/serving/page.html"}
