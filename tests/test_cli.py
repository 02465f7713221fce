"""The command line as a whole: its commands, and that whatever a user gets wrong is one line and exit code 2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from command_line import Ran, Run, refused

import stylemuse
from stylemuse import cli
from stylemuse.core import StylemuseError

COMMANDS = {"demo", "generate", "tune", "adapters", "export", "serve", "bench", "doctor", "subjects"}


def test_help_lists_the_commands_and_no_stub(run: Run) -> None:
    group: Any = typer.main.get_command(cli.app)
    assert set(group.commands) == COMMANDS
    assert set(group.commands["adapters"].commands) == {"list", "inspect", "import", "export", "verify"}
    for arguments in ([], ["--help"], ["generate", "--help"], ["adapters", "-h"], ["bench", "-h"]):
        ran = run(*arguments)
        assert (ran.code, ran.error) == (0, "")
        assert "Usage: stylemuse" in ran.out
    assert run("--version").out == f"stylemuse {stylemuse.__version__}\n"


def test_every_command_has_json_and_says_what_each_option_is() -> None:
    group: Any = typer.main.get_command(cli.app)
    leaves = [*group.commands.values(), *group.commands["adapters"].commands.values()]
    for command in leaves:
        if not hasattr(command, "commands"):
            assert any("--json" in parameter.opts for parameter in command.params), command.name
        assert command.help or command.name == "adapters"
        assert all(parameter.help for parameter in command.params), command.name


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("paint", "command 'paint' is unknown; allowed: demo, generate, tune"),
        ("export", "Missing argument"),
        ("--fast", "option '--fast' is unknown; allowed: --version"),
        ("adapters", "Missing command; allowed: list, inspect, import, export, verify"),
        ("adapters show", "command 'show' is unknown; allowed: list"),
        ("generate", "Missing argument"),
        ("bench speed", "bench 'speed' is unknown; did you mean"),
        ("bench step --models sdxl", "invalid choice: 'sdxl'"),
        ("bench step --batches 0", "'0' is not allowed: a whole number of at least 1"),
        ("bench step --steps 1", "at least 2"),
        ("bench step --branches 3 --adapters none", "three branches need an adapter"),
        ("generate a fox", "(fox); a text of several words needs quotes"),
        ("generate fox --stile ink", "option '--stile' is unknown; did you mean '--style'? Allowed: --style"),
        ("generate fox --steps many", "'--steps'"),
        ("generate fox --n 0", "n = 0 is not allowed: a whole number from 1 to 256"),
        ("generate fox --seed -1", "0 to 2^63 - 1"),
        ("generate fox --style a --style a", "--style a is given twice"),
        ("generate fox --style a=much", "NAME or NAME=WEIGHT"),
        ("generate fox --guidance cfg:1,2", "cfg:SCALE or styledrop:STYLE,TEXT"),
        ("generate fox --guidance muse", "cfg:SCALE or styledrop:STYLE,TEXT"),
        ("generate fox --guidance styledrop:-1", "at least 0"),
        ("generate fox --size 64", "WIDTHxHEIGHT"),
        ("generate fox --strength 0.5", "no effect without an --image"),
        ("generate fox --adapter ink", "NAME=PATH"),
        ("generate fox --adapter ink=a", "not used; add --style ink"),
        ("generate fox --alpha 3", "none is given"),
        ("generate \udcff", "not UTF-8"),
        ("generate fox --image nothing.png", "nothing.png is missing"),
        ("generate fox --out .", "is a folder"),
        ("generate fox --out fox.tga", "allowed: .png, .jpg, .jpeg, .webp"),
        ("generate fox --out note.txt/fox.png", "cannot be written"),
        (f"generate fox --out {'x' * 300}.png", "too long"),
        ("demo --out demo.gif", "allowed: .png"),
        ("tune nothing.png --prompt cat --out ink", "nothing.png is missing"),
        ("tune note.txt --prompt cat --out ink", "not a picture; allowed: PNG, JPEG"),
        ("tune note.txt --out ink", "Missing option '--prompt'"),
        ("tune note.txt --prompt cat --out new/^", "letters, digits"),
        ("tune note.txt --prompt cat --out ink --rank 33", "1 to 32"),
        ("adapters inspect nothing", "nothing is not there"),
        ("adapters verify nothing", "adapter.json is missing"),
        ("adapters export nothing --format peft --out new", "adapter.json is missing"),
    ],
)
def test_bad_lines_are_refused_before_a_model_is_loaded(run: Run, no_model: None, line: str, words: str) -> None:
    Path("note.txt").write_text("no picture")
    refused(run(*line.split()), words)
    refused(run(*line.split(), "--json"))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("generate fox --model nowhere", "'demo', a folder, or a Hub id"),
        ("generate fox --model MODEL --style inc", "style 'inc' is unknown; did you mean 'ink'? Allowed: ink, neon"),
        ("generate fox --model MODEL --style ink --style neon", "at most 1"),
        ("generate fox --model MODEL --steps 0", "1 to 1000"),
        ("generate fox --model MODEL --schedule linear", "allowed: amused, styledrop, maskgit"),
        ("generate fox --model MODEL --size 12x32", "multiples of 8"),
        ("generate fox --model MODEL --backend tpu", "allowed: auto"),
        ("generate fox --model MODEL --device tpu", "allowed: cpu"),
        ("generate fox --model MODEL --dtype float8", "allowed: float32"),
        ("generate fox --model MODEL --adapter ink=nothing --style ink", "nothing is missing"),
        ("demo --model nowhere", "not found"),
        ("adapters list --model nowhere", "not found"),
        ("adapters import nothing --name a --out new --model MODEL", "nothing is missing"),
        ("adapters import MODEL/styles/ink --name a --out new --model MODEL", "canonical adapter already"),
        ("adapters import MODEL/transformer --name a --out new --model MODEL", "no known LoRA form"),
        ("adapters export MODEL/styles/ink --format onnx --out new", "allowed: diffusers, peft, kohya"),
        ("adapters export MODEL/styles/ink --format kohya --out new.bin", "ends in .safetensors"),
        ("adapters export MODEL/styles/ink --format peft --out MODEL", "exists already"),
    ],
)
def test_bad_values_are_refused(run: Run, tiny_model: Path, line: str, words: str) -> None:
    refused(run(*line.replace("MODEL", str(tiny_model)).split()), words)
    assert not Path("out/picture.png").exists()


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory"), RuntimeError("CUDA out of memory.")],
)
def test_too_little_memory_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(stylemuse, "load", fails)
    refused(run("generate", "a fox"), "out of memory")


def test_a_fault_of_ours_is_not_hidden(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("shapes disagree")

    monkeypatch.setattr(stylemuse, "load", fails)
    with pytest.raises(RuntimeError, match="shapes disagree"):
        run("generate", "a fox")


def test_doctor(run: Run) -> None:
    facts = run("doctor", "--json").document
    assert facts["versions"]["stylemuse"] == stylemuse.__version__
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["cpu"]["threads"] >= 1
    assert len(facts["gpus"]) == torch.cuda.device_count()
    assert facts["demo"]["choice"].keys() >= {"device", "dtype"}
    assert (facts["demo"]["problem"] is None) == bool(facts["demo"]["styles"])
    assert facts["world"]["problem"] is None
    assert Path(facts["world"]["path"]).is_file()
    text = run("doctor")
    assert (text.code, text.error) == (0, "")
    assert "chosen dtype" in text.out


def test_warnings_of_libraries_are_not_shown(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def warns(*_: object, **__: object) -> None:
        warnings.warn("a detail of ours", stacklevel=1)
        raise StylemuseError("no")

    monkeypatch.setattr(stylemuse, "load", warns)
    assert run("generate", "a fox") == Ran(2, "", "stylemuse: no\n")


def test_the_module_runs_and_a_broken_pipe_is_quiet(tiny_model: Path) -> None:
    command = [sys.executable, "-m", "stylemuse", "adapters", "list", "--json", "--model", str(tiny_model)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert len(json.loads(done.stdout)["adapters"]) == 2
    assert done.stderr == ""
    reader, writer = os.pipe()
    os.close(reader)
    broken = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (broken.returncode, broken.stderr) == (1, b"")


def test_errors_cannot_write_to_the_terminal(run: Run) -> None:
    ran = run("generate", "a fox", "--out", "fox.\x1b[31m\nred")
    refused(ran, "fox.?[31m red")
    assert "\x1b" not in ran.error
