"""``stylemuse bench peers`` and ``start``: every contestant draws the same job, and the document says who took what."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Run

from stylemuse.bench.harness import measure
from stylemuse.bench.peers import peers, rivals
from stylemuse.bench.serving import start


@pytest.fixture
def job(tiny_model: Path) -> peers.Job:
    return peers.Job(tiny_model, "tiny", torch.device("cpu"), [torch.float32], steps=3, batch=2)


@pytest.mark.parametrize("group", ["diffusers", pytest.param("compiled", marks=pytest.mark.slow), "peft", "onnx"])
def test_everyone_draws_every_step(job: peers.Job, group: str) -> None:
    with peers.GROUPS[group](job) as contestants:
        rows = peers.run(job, contestants, 2, iter(range(1000)))
    ours = [row for row in rows if row["who"] == "stylemuse"]
    assert ours
    assert len(rows) > len(ours)
    for row in rows:
        assert len(row["step"]["seconds"]) == 2 * 2, "two calls of three steps, the first left out"
        assert len(row["total"]["seconds"]) == 2
        assert (row["batch"], row["dtype"]) == (2, "float32")
    for row in ours:
        others = {other["name"] for other in rows if not other["who"].startswith("stylemuse")}
        alike = {row["name"].replace("stylemuse", "diffusers with peft")} if group == "peft" else others
        assert set(row["times_as_long"]) == alike
    measure.check(json.loads(json.dumps(measure.document("c", 0, job.device, {}, step=rows))))


@torch.no_grad()
def test_the_export_computes_what_the_transformer_does(job: peers.Job, tmp_path: Path) -> None:
    pipe = rivals.load(job.folder, job.device, torch.float32)
    config, length = pipe.transformer.config, pipe.tokenizer.model_max_length
    rivals.export_onnx(pipe, tmp_path / "whole.onnx", rows=4)
    rivals.quantize_onnx(tmp_path / "whole.onnx", tmp_path / "small.onnx")
    generator = torch.Generator().manual_seed(3)
    inputs = (
        torch.randint(config.vocab_size, (4, config.sample_size, config.sample_size), generator=generator),
        torch.randn(4, length, config.encoder_hidden_size, generator=generator),
        torch.randn(4, config.cond_embed_dim, generator=generator),
        torch.rand(4, 5, generator=generator) * 100,
    )
    expected = pipe.transformer(*inputs)
    scale = expected.abs().max()
    assert (rivals.onnx_answer(tmp_path / "whole.onnx")(*inputs) - expected).abs().max() < 1e-4 * scale
    small = (rivals.onnx_answer(tmp_path / "small.onnx")(*inputs) - expected).abs().max()
    assert 1e-5 * scale < small < 0.3 * scale, "int8, and still the network"


@torch.no_grad()
def test_peft_mixes_what_our_rows_mix(job: peers.Job) -> None:
    pipe, styles = peers._with_styles(job, torch.float32)
    transformer = rivals.load(job.folder, job.device, torch.float32).transformer
    loras = rivals.with_loras(transformer, [pipe.adapters[style] for style in styles])
    config = transformer.config
    generator = torch.Generator().manual_seed(3)
    inputs = (
        torch.randint(config.vocab_size, (1, 8, 8), generator=generator).repeat(2, 1, 1),
        torch.randn(1, 16, config.encoder_hidden_size, generator=generator).repeat(2, 1, 1),
        torch.randn(1, config.cond_embed_dim, generator=generator).repeat(2, 1),
        torch.ones(2, 5),
    )
    mixed = loras(*inputs, adapter_names=styles)
    loras.set_adapter(styles[1])
    torch.testing.assert_close(mixed[1:], loras(*inputs)[1:], rtol=1e-4, atol=1e-5)
    assert not torch.equal(mixed[0], mixed[1])


def test_the_document(run: Run, monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> None:
    @contextmanager
    def folder(model: str, *, seed: int) -> Iterator[Path]:
        yield tiny_model

    monkeypatch.setattr(peers, "write_folder", folder)
    monkeypatch.setattr(measure, "roofs", lambda device, dtypes: {"float32_flops": 1e9, "bytes": 1e9})
    monkeypatch.setattr(peers, "SWAPS", 2)
    options = "--only peft --dtypes float32 --batch 2 --steps 2 --repeats 1"
    ran = run("bench", "peers", *options.split())
    assert ran.code == 0, ran.error
    document: dict[str, Any] = json.loads(ran.out.splitlines()[-1])
    measure.check(document)
    assert len(document["step"]) == 6
    assert [row["name"] for row in document["adapter_swap"]] == ["stylemuse, resident", "peft set_adapter"]


def test_one_step_is_refused(run: Run) -> None:
    ran = run("bench", "peers", "--steps", "1")
    assert ran.code == 2
    assert "at least 2" in ran.error


@pytest.mark.slow
def test_start_measures_processes(run: Run, tmp_path: Path) -> None:
    ran = run("bench", "start", "--repeats", "1")
    assert ran.code == 0, ran.error
    document = json.loads(ran.out.splitlines()[-1])
    measure.check(document)
    interpreter, load = (row["wall"]["p50"] for row in document["load"])
    assert load > interpreter
    assert len(document["first_image"]) == 2
    assert set(start.runs(tmp_path)) == {"interpreter", "load", "first image", "first image, styled"}
