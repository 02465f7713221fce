"""The embedded model's recipe on a smaller network: it learns, stops, goes on, and leaves a model folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from font import needs_font

import stylemuse as sm
from stylemuse.folder import write_model
from stylemuse.models.tokenizer import build_word_tokenizer
from stylemuse.models.vq import VQ
from stylemuse.tuning import pretrain, pretrain_vq
from stylemuse.tuning.looks import vocabulary

pytestmark = needs_font


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(
        pretrain.TRANSFORMER, hidden_size=32, in_channels=32, block_out_channels=32, num_hidden_layers=1,
        num_res_blocks=1, intermediate_size=32,
    )  # fmt: skip
    monkeypatch.setattr(pretrain, "TRANSFORMER", config)
    monkeypatch.setattr(pretrain, "_REPORT", 3)


def test_training_goes_on_where_it_stopped(small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    tokenizer = VQ(pretrain_vq.CONFIG).eval()
    text = build_word_tokenizer(vocabulary(), tmp_path / "model" / "tokenizer", pretrain.TEXT_LENGTH)
    batch = pretrain._BATCH
    pretrain.train(tmp_path, tokenizer, text, 6 * batch)
    first = torch.load(tmp_path / "transformer.pt", weights_only=True)
    painter = pretrain.train(tmp_path, tokenizer, text, 9 * batch)
    second = torch.load(tmp_path / "transformer.pt", weights_only=True)
    assert (first["done"], second["done"]) == (6 * batch, 9 * batch)
    assert second["average"]["updates"] == 9
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")]
    assert [line["done"] for line in lines] == [3 * batch, 6 * batch, 9 * batch]
    assert not painter.training

    write_model(tmp_path / "model", painter.transformer, tokenizer, painter.text)
    pipe = sm.load(str(tmp_path / "model"))
    assert pipe.generate("a fox", seed=0, steps=2).images[0].size == (64, 64)


def test_places_are_named_for_training_only(small: None) -> None:
    painter = pretrain.Painter(40, 39)
    tokens = torch.zeros(2, 16, 16, dtype=torch.int64)
    masked = torch.zeros_like(tokens, dtype=torch.bool)
    masked[0, 0, :3] = True
    ids = torch.tensor([[1, 2, 39], [3, 39, 39]])
    logits, places = painter(ids, tokens, masked, pretrain.micro_conditions(2))
    assert logits.shape == (3, pretrain.TRANSFORMER.codebook_size)
    assert places.shape == (2, 64, 64)
    assert not any("place" in name for name, _ in painter.transformer.named_parameters())


def test_the_tokenizer_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain_vq, "_SPREAD_OVER", 8)
    first = pretrain_vq.train(tmp_path, 32)
    assert torch.load(tmp_path / "vq.pt", weights_only=True)["started"], "the second half is quantized"
    second = pretrain_vq.train(tmp_path, 40)
    assert torch.load(tmp_path / "vq.pt", weights_only=True)["done"] == 40
    assert not torch.equal(first.quantize.embedding.weight, second.quantize.embedding.weight)
    grid = second.encode(torch.rand(1, 3, 64, 64))
    assert grid.shape == (1, 16, 16)
    assert second.decode(grid).shape == (1, 3, 64, 64)
