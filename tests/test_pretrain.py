"""The embedded model's recipe on smaller networks: it learns, stops, goes on, and leaves files and a model folder."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import stylemuse as sm
from stylemuse.models.tokenizer import ClipTokenizer
from stylemuse.models.vq import VQ
from stylemuse.pretraining import painter, pretrain, pretrain_vq
from stylemuse.pretraining.painter import Painter, Step, micro_conditions, read_out
from stylemuse.tuning import training
from stylemuse.tuning.training import load_weights, mask_at_random, save_weights, warm_hold_decay

CODES = 64


class Ticks:
    """A clock that goes on by half a second whenever it is asked how much is over."""

    def __init__(self, minutes: float, before: float = 0.0) -> None:
        self.total, self.seconds = minutes * 60, before

    @property
    def share(self) -> float:
        self.seconds += 0.5
        return min(self.seconds / self.total, 1.0)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    vq = replace(pretrain_vq.CONFIG, block_out_channels=(8, 8, 8, 8), latent_channels=16, num_vq_embeddings=CODES)
    config = replace(
        painter.CONFIG, hidden_size=32, encoder_hidden_size=32, in_channels=32, block_out_channels=32,
        num_hidden_layers=1, num_res_blocks=1, intermediate_size=32, codebook_size=CODES, vocab_size=CODES + 1,
    )  # fmt: skip
    monkeypatch.setattr(pretrain_vq, "CONFIG", vq)
    monkeypatch.setattr(pretrain_vq, "_SPREAD_OVER", 32)
    monkeypatch.setattr(painter, "CONFIG", config)
    monkeypatch.setattr(Painter.__init__, "__defaults__", (config,))
    for module in (painter, pretrain_vq):
        monkeypatch.setattr(module, "Clock", Ticks)


@pytest.fixture
def text(tmp_path: Path) -> ClipTokenizer:
    return pretrain.words(tmp_path / "run")


@pytest.fixture
def run(small: None, tmp_path: Path) -> Path:
    """A folder with a tokenizer that has learned nothing."""
    torch.manual_seed(0)
    save_weights(tmp_path / "run", "tokenizer", VQ(pretrain_vq.CONFIG).state_dict(), torch.float32, {})
    return tmp_path / "run"


def test_training_goes_on_and_leaves_a_model(
    run: Path, text: ClipTokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    painter.train(run, 0.15, text, batch=4, pool=8)
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")]
    assert [line["loss"] > 0 for line in lines if "loss" in line] == [True], "a report after more than five seconds"
    first = torch.load(run / "transformer.pt", weights_only=True)
    painter.train(run, 0.3, text, batch=4, pool=8)
    second = torch.load(run / "transformer.pt", weights_only=True)
    assert first["average"]["updates"] * 4 == first["done"] > 0
    assert second["average"]["updates"] * 4 == second["done"] > first["done"]
    assert 9 <= first["seconds"] < 10
    assert 18 <= second["seconds"] < 19, "the second run takes what is left"

    pretrain.export(run, tmp_path / "model")
    picture = sm.load(str(tmp_path / "model")).generate("a fox", seed=0, steps=2).images[0]
    assert picture.size == (128, 128)


def test_a_lean_run_keeps_weights_alone_and_goes_on_from_them(run: Path, text: ClipTokenizer) -> None:
    painter.train(run, 0.1, text, batch=4, pool=8, resumable=False)
    before = load_weights(run, "transformer")
    assert not (run / "transformer.pt").exists()
    painter.train(run, 0.02, text, batch=4, pool=8, rate=0.0, resumable=False)
    after = load_weights(run, "transformer")
    assert all(torch.allclose(before[name], after[name], atol=1e-3) for name in before)


def test_the_tokenizer_goes_on_where_it_stopped(small: None, tmp_path: Path) -> None:
    first = pretrain_vq.train(tmp_path, 0.2, batch=2)
    state = torch.load(tmp_path / "tokenizer.pt", weights_only=True)
    assert state["started"], "codes come after a fifth of the time"
    second = pretrain_vq.train(tmp_path, 0.4, batch=2)
    assert torch.load(tmp_path / "tokenizer.pt", weights_only=True)["done"] > state["done"]
    assert not torch.equal(first.quantize.embedding.weight, second.quantize.embedding.weight)
    grid = second.encode(torch.rand(1, 3, 128, 128))
    assert grid.shape == (1, 16, 16)
    assert second.decode(grid).shape == (1, 3, 128, 128)


def test_a_lean_tokenizer_goes_on_with_its_codes(small: None, tmp_path: Path) -> None:
    first = pretrain_vq.train(tmp_path, 0.2, batch=2, resumable=False)
    second = pretrain_vq.train(tmp_path, 0.02, batch=2, rate=0.0, resumable=False)
    assert not (tmp_path / "tokenizer.pt").exists()
    assert torch.allclose(first.encoder.conv_in.weight, second.encoder.conv_in.weight)
    moved = (first.quantize.embedding.weight - second.quantize.embedding.weight).norm(dim=1)
    assert (moved < 0.1 * first.quantize.embedding.weight.norm(dim=1)).sum() > CODES // 2, "codes near where they were"


def test_codes_start_far_apart_and_dead_ones_move() -> None:
    torch.manual_seed(0)
    model = VQ(replace(pretrain_vq.CONFIG, num_vq_embeddings=32)).requires_grad_(False)
    places = 8 * torch.randn(32, model.config.embed_dim)
    # Half of the latents are one and the same: codes drawn by density would often be that one.
    latent = torch.cat([places[:1].repeat(60, 1), places.repeat(2, 1)])
    codes = pretrain_vq.CodebookAverages(model, torch.Generator().manual_seed(0))
    codes.start(latent)
    assert codes.started
    nearest = torch.cdist(places, codes.table, compute_mode="donot_use_mm_for_euclid_dist").min(1)
    assert nearest.values.max() < 1e-2
    assert nearest.indices.unique().numel() == 32

    away = int(nearest.indices[5])
    codes.table[away] = 1000.0
    codes.counts[away], codes.sums[away] = 0.01, 10.0
    codes.update(latent, torch.cdist(latent, codes.table).argmin(1))
    assert (codes.table[away] - places[5]).norm() < 1e-3, "put onto the latents that no code was near"
    assert codes.counts[away] == 1


def test_losses_are_those_of_all_masked_positions(small: None) -> None:
    torch.manual_seed(0)
    model = Painter(40, 39)
    chance = torch.Generator().manual_seed(0)
    tokens = torch.randint(CODES, (8, 16, 16), generator=chance)
    masked = mask_at_random((8, 16, 16), chance, stratified=True)
    ids = torch.tensor([[1, 2, 39]]).repeat(8, 1)
    at = read_out(masked)
    assert (at >= 0).sum() == min(int(masked.sum()), len(at))
    loss, place = model.losses(ids, tokens, masked, at, micro_conditions(8))
    features, places = model(ids, tokens, masked, micro_conditions(8))
    chosen = masked.flatten().nonzero()[: len(at), 0]
    logits = model.transformer.logits(model.transformer.readout(features.flatten(0, 1)[chosen]))
    torch.testing.assert_close(loss, F.cross_entropy(logits, tokens.flatten()[chosen]))
    assert places.shape == (8, 64, 64)
    torch.testing.assert_close(place, F.cross_entropy(places.flatten(0, 1), torch.arange(64).repeat(8)))
    assert not any("place" in name for name, _ in model.transformer.named_parameters())


def test_masks_of_a_batch_fit_what_is_read_out() -> None:
    """Few are left out by the fixed share: the mean of cos(pi u / 2) is 2 / pi, under `_READ`."""
    chance = torch.Generator().manual_seed(0)
    for _ in range(20):
        masked = mask_at_random((32, 16, 16), chance, stratified=True)
        assert masked.sum() - (read_out(masked) >= 0).sum() <= 0.01 * masked.numel()
        assert masked.flatten(1).any(1).all()


def test_a_restored_step_keeps_its_own_rate(small: None) -> None:
    """A checkpoint of a GPU has Adam's rate as a tensor and says that it may be captured."""
    step = Step(Painter(40, 39), 2, torch.device("cpu"), torch.float32)
    adam = step.adam.state_dict()
    adam["param_groups"][0] |= {"lr": torch.tensor(0.5), "capturable": True}
    step.restore({"muon": step.muon.state_dict(), "adam": adam})
    group = step.adam.param_groups[0]
    assert (group["lr"], group["capturable"]) == (painter._RATE, False)


def test_weights_lie_in_small_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "SHARD_BYTES", 4096)
    values = {f"layer.{index}": torch.randn(20, 30) for index in range(9)}
    save_weights(tmp_path, "part", values, torch.float16, {"samples": 3})
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == [f"part-{number}.safetensors" for number in (1, 2, 3)]
    read = load_weights(tmp_path, "part")
    assert read.keys() == values.keys()
    assert all(torch.equal(read[name], value.half().float()) for name, value in values.items())

    good = [file.read_bytes() for file in files]
    broken = values | {"layer.8": torch.full((20, 30), float("nan"))}
    with pytest.raises(sm.StylemuseError, match=r"layer\.8 of the part has no finite number"):
        save_weights(tmp_path, "part", broken, torch.float16, {})
    assert [file.read_bytes() for file in files] == good


def test_files_of_both_parts_are_few_and_small() -> None:
    """At most 16 MiB each: two of the tokenizer, in fp32, and five of the transformer, in fp16; assets <= 40 MB."""
    vq = sum(value.numel() for value in VQ(pretrain_vq.CONFIG).parameters())
    model = Painter(600, 599)
    both = sum(value.numel() for value in model.parameters())
    assert training.SHARD_BYTES <= 16 << 20
    assert 4 * vq <= 2 * training.SHARD_BYTES
    assert max(value.nbytes for value in model.parameters()) < training.SHARD_BYTES
    assert 2 * both <= 4 * training.SHARD_BYTES
    assert 2 * (vq + both) <= 40e6


@pytest.mark.parametrize(
    ("done", "factor"), [(0.0, 0.001), (0.01, 0.501), (0.02, 1.0), (0.65, 1.0), (0.825, 0.5), (1.0, 0.01)]
)
def test_the_rate_rises_stays_and_falls(done: float, factor: float) -> None:
    assert warm_hold_decay(done, 1.0, warm=0.02, decay=0.35) == pytest.approx(max(factor, 0.01), abs=2e-3)


def test_the_recipe_makes_the_shipped_weights() -> None:
    folder = Path(training.__file__).parents[1] / "assets" / "demo"
    for part, config in (("vqvae", pretrain_vq.CONFIG), ("transformer", painter.CONFIG)):
        there = json.loads((folder / part / "config.json").read_text())
        ours = json.loads(json.dumps(asdict(config)))
        # Written for diffusers, codes are padded to the latent's width: `vq_embed_dim` is not said.
        ours.pop("vq_embed_dim", None)
        assert {name: there.get(name) for name in ours} == ours
