"""``stylemuse bench step`` on a tiny model: every variant is measured, and the document says what was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Run
from peers import TINY

import stylemuse as sm
from stylemuse.backend.machine import choose
from stylemuse.bench.harness import measure, networks
from stylemuse.bench.step import steps
from stylemuse.loading.assembly import assemble
from stylemuse.models.amused import AmusedConfig
from stylemuse.models.vq import VQConfig

TEXT = networks.TEXT | {"vocab_size": 2048, "hidden_size": TINY["encoder_hidden_size"], "num_attention_heads": 2}
TEXT |= {"intermediate_size": 16, "num_hidden_layers": 2, "projection_dim": TINY["cond_embed_dim"]}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    def pipeline(model: str, *, device: str | None, dtype: str | None, seed: int, backend: str) -> sm.Pipeline:
        config = AmusedConfig.from_dict(TINY | {"sample_size": 8})
        vq = VQConfig((8, 12), 1, latent_channels=6, num_vq_embeddings=config.codebook_size, norm_num_groups=4)
        made = networks.random_networks(config, vq=vq, text=TEXT, seed=seed)
        return assemble(model, made, choose(device, dtype), lambda: model)

    monkeypatch.setattr(steps, "pipeline", pipeline)
    monkeypatch.setattr(measure, "roofs", lambda device, dtypes: {"float32_flops": 1e9, "bytes": 1e9})


def test_every_variant_has_its_row(tiny: None, run: Run, tmp_path: Path) -> None:
    arguments = "--dtypes float32 --batches 1 3 --steps 4 --repeats 2 --seed 5 --out steps.json"
    ran = run("bench", "step", *arguments.split())
    assert ran.code == 0, ran.error
    document: dict[str, Any] = json.loads(ran.out.splitlines()[-1])
    measure.check(document)
    assert document == json.loads((tmp_path / "steps.json").read_text(encoding="utf-8"))
    assert (document["seed"], document["command"]) == (5, f"stylemuse bench step {arguments}")
    rows = {(row["branches"], row["batch"], row["adapters"]): row for row in document["step"]}
    assert set(rows) == {
        (1, 1, "none"), (1, 1, "one"), (1, 3, "none"), (1, 3, "one"), (1, 3, "many"),
        (2, 1, "none"), (2, 1, "one"), (2, 3, "none"), (2, 3, "one"), (2, 3, "many"),
        (3, 1, "one"), (3, 3, "one"), (3, 3, "many"),
    }  # fmt: skip
    for (branches, batch, adapters), row in rows.items():
        assert len(row["step"]["seconds"]) == 2 * 3, "two repeats of the three steps after the first"
        assert len(row["first_step"]["seconds"]) == 2
        assert row["cost"]["rows"] == branches * batch
        assert (row["cost"]["adapter_flop"] > 0) == (adapters != "none")
        parts = zip(*(row[part]["seconds"] for part in steps.PARTS), strict=True)
        assert all(sum(part) <= whole for part, whole in zip(parts, row["step"]["seconds"], strict=True))
    assert [row["name"] for row in document["call"]] == [row["name"] for row in document["step"]]
    alone = json.loads(run("bench", "step", "--json", *arguments.split()).out)
    assert len(alone["step"]) == len(rows)


def test_branches_are_what_they_are_called() -> None:
    pipe = networks.pipeline("demo", dtype="float32")
    for index in range(3):
        pipe.adapters.add(f"random-{index}", networks.random_adapter(pipe, f"random-{index}", rank=2, seed=index))
    rows: list[int] = []
    features = pipe.network.features
    pipe.network.features = lambda tokens, contexts: (rows.append(len(contexts)), features(tokens, contexts))[1]  # type: ignore[method-assign]
    for variant in steps.variants([1, 2, 3], [1, 3], ["none", "one", "many"]):
        rows.clear()
        pipe.run(variant.requests(2, iter(range(9)).__next__))
        assert rows[1] == variant.branches * variant.batch


@torch.no_grad()
def test_random_models_are_made_in_place() -> None:
    made = networks.random_networks(AmusedConfig.from_dict(TINY), vq=VQConfig((8,), 1, norm_num_groups=4), text=TEXT)
    again = networks.random_networks(AmusedConfig.from_dict(TINY), vq=VQConfig((8,), 1, norm_num_groups=4), text=TEXT)
    pairs = zip(made.transformer.parameters(), again.transformer.parameters(), strict=True)
    assert all(torch.equal(one, two) for one, two in pairs)
    assert made.tokenizer(["a fox"]).shape == (1, 77)


def test_graphs_are_measured_as_networks_are() -> None:
    pipe = networks.pipeline("tiny", backend="onnx", slots=4, rank=steps.RANK)
    assert (pipe.name, list(pipe.adapters.names)) == ("tiny", [])
    rates = {"float32_flops": 1e9, "bytes": 1e9}
    (row,), (call,) = steps.run(pipe, [steps.Variant(2, 2, "many")], steps=3, repeats=2, rates=rates)
    assert (row["backend"], row["dtype"], row["device"]) == ("onnx", "float32", "cpu")
    same = networks.pipeline("tiny", device="cpu", dtype="float32", slots=4, rank=steps.RANK)
    assert row["cost"] == steps.paper(same, steps.Variant(2, 2, "many"), 3).to_dict()
    assert len(row["step"]["seconds"]) == 2 * 2
    assert not set(steps.PARTS) & set(row), "one call has no parts"
    assert len(call["total"]["seconds"]) == 2
