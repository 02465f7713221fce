"""Fixtures that several files share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import interpreter  # noqa: F401  (first: it decides how kernels are made)
import pytest
import torch
from command_line import Ran, Run
from drawing import load
from gate import Gate
from models import write_tiny_model

import stylemuse
from stylemuse import Engine, Pipeline, cli


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random model and its styles "ink" and "neon"; read it, never write into it."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def pipe(tiny_model: Path) -> Pipeline:
    """The tiny model in fp32, a test's own."""
    return load(tiny_model)


@pytest.fixture
def engine(pipe: Pipeline) -> Iterator[Engine]:
    """An engine of eight rows on `pipe`."""
    with Engine(pipe, max_rows=8) as made:
        yield made


@pytest.fixture
def gate(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> Gate:
    """Holds the forward passes of `pipe`."""
    return Gate(pipe, monkeypatch)


@pytest.fixture
def nan_filled() -> Iterator[None]:
    """New tensors hold NaN, so that a place that was not written is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs a command line in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments: object) -> Ran:
        capsys.readouterr()
        code = cli.main([str(argument) for argument in arguments])
        return Ran(code, *capsys.readouterr())

    return command


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test that gets as far as loading a model."""

    def load(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(stylemuse, "load", load)
