"""The comparison at full size (``bench/parity.py``), here at tiny sizes: it runs, and its figures are small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from peers import TINY

from stylemuse.bench.step import parity

TOLERANCE = 1e-5


@pytest.mark.parametrize("halved", [False, True])
def test_transformer(halved: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "RANK", 3)
    found = parity.transformer(**TINY | {"downsample": halved, "upsample": halved, "sample_size": 6})
    assert found["logits"]["relative"] <= TOLERANCE
    assert found["decoding"]["equal_after_step"] == [36, 36]
    assert found["lora"]["effect"] > 0.1
    assert found["lora"]["modules"] == 3 * 2 * (TINY["num_hidden_layers"] + 2 * TINY["num_res_blocks"])
    assert max(found["lora"][way]["relative"] for way in ("at_its_place", "merged")) <= TOLERANCE


def test_tokenizer_and_text() -> None:
    vq = parity.tokenizer(24, block_out_channels=(8, 12), num_vq_embeddings=37, latent_channels=6, norm_num_groups=4)
    assert vq["codes"] == {"equal": 144, "of": 144}
    assert max(vq[part]["relative"] for part in ("latent", "picture")) <= TOLERANCE
    text = parity.text(vocab_size=99, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=3)
    assert max(text[part]["relative"] for part in ("penultimate", "pooled")) <= TOLERANCE


def test_the_document_is_the_last_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name in ("text", "tokenizer", "transformer"):
        monkeypatch.setattr(parity, name, lambda **sizes: {"part": {"relative": 1e-6}, "sizes": sizes})
    parity.main(["--skip-512", "--out", str(tmp_path / "parity.json")])
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document == json.loads((tmp_path / "parity.json").read_text())
    assert list(document["results"]) == ["text", "tokenizer", "amused-256"]
    assert document["results"]["amused-256"]["sizes"] == {"sample_size": 16}
    assert {"command", "machine", "threads", "versions", "peak_gigabytes"} < set(document)
