"""Training's parts, and a style from one picture."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from PIL import Image

import stylemuse as sm
from stylemuse.kernels.response_norm import response_norm
from stylemuse.tuning import training
from stylemuse.tuning.style import Recipe, _views, descriptor_of, tune


def test_masks_have_the_share_they_were_drawn_with() -> None:
    generator = torch.Generator().manual_seed(0)
    masks = training.mask_at_random((4000, 5, 5), generator)
    counts = masks.flatten(1).sum(1)
    assert counts.min() >= 1
    assert counts.max() == 25
    assert abs(float(counts.float().mean()) / 25 - 2 / math.pi) < 0.01
    places = masks.float().mean(0)
    assert float((places - places.mean()).abs().max()) < 0.04


def test_a_channel_of_zeros_has_a_gradient() -> None:
    """GELU leaves some: the gradient is that of torch's own norm, which is 0 there."""
    generator = torch.Generator().manual_seed(0)
    x, gamma = torch.randn(2, 7, 5, generator=generator), torch.full((5,), 0.3)
    x[:, :, 3] = 0
    found, wanted = x.clone().requires_grad_(), x.clone().requires_grad_()
    response_norm(found, gamma, gamma).sin().sum().backward()
    norms = torch.linalg.vector_norm(wanted, dim=1, keepdim=True)
    (wanted * (1 + gamma * norms / (norms.mean(-1, keepdim=True) + 1e-6)) + gamma).sin().sum().backward()
    assert found.grad is not None
    assert wanted.grad is not None
    assert torch.allclose(found.grad, wanted.grad, rtol=1e-5, atol=1e-6)


def test_learning_rate_rises_holds_and_falls() -> None:
    factors = [training.warm_hold_decay(done, 1000, warm=100) for done in range(0, 1001, 50)]
    assert factors[0] < 0.05
    assert factors[4:14] == [1.0] * 10
    assert factors[-1] == pytest.approx(0.01)
    assert all(later <= earlier for earlier, later in itertools.pairwise(factors[14:]))


def test_average_follows_and_is_restored() -> None:
    layer = torch.nn.Linear(3, 2)
    average = training.Average(layer, 0.9)
    for _ in range(200):
        with torch.no_grad():
            layer.weight.fill_(2.0)
        average.update(layer)
    assert torch.allclose(average.values["weight"], torch.full((2, 3), 2.0), atol=1e-4)
    other = training.Average(torch.nn.Linear(3, 2), 0.9)
    other.restore(average.state())
    assert torch.equal(other.values["weight"], average.values["weight"])
    assert other.updates == 200


def test_checkpoint_survives_an_interrupted_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run" / "state.pt"
    assert training.load(path) is None
    training.save(path, {"done": 1, "weight": torch.ones(2)})

    def broken(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(OSError, match="disk full"):
        training.save(path, {"done": 2})
    state = training.load(path)
    assert state is not None
    assert state["done"] == 1


@pytest.mark.parametrize(
    ("prompt", "descriptor"),
    [
        ("a fox in neon style", "in neon style"),
        ("A cat in a box in watercolor painting style", "in watercolor painting style"),
    ],
)
def test_descriptor_is_what_the_prompt_ends_with(prompt: str, descriptor: str) -> None:
    assert descriptor_of(prompt) == descriptor


@pytest.mark.parametrize("prompt", ["a fox", " in neon style", "a fox in "])
def test_prompt_without_a_style_is_refused(prompt: str) -> None:
    with pytest.raises(sm.StylemuseError, match="CONTENT in STYLE"):
        descriptor_of(prompt)


def test_a_style_is_learnt_from_one_picture(tiny_model: Path) -> None:
    pipe = sm.load(str(tiny_model), dtype="float32")
    before = [value.clone() for value in pipe.network.transformer.parameters()]
    side = pipe.network.transformer.config.sample_size * pipe.network.vq.config.factor
    picture = Image.radial_gradient("L").resize((side, side)).convert("RGB")
    losses: list[float] = []
    adapter = tune(
        pipe,
        picture,
        "a fox in brush style",
        name="brush",
        recipe=Recipe(rank=4, rate=1e-2, steps=60, batch=8),
        seed=1,
        on_step=lambda step, steps, loss: losses.append(loss),
    )
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    assert all(torch.equal(a, b) for a, b in zip(before, pipe.network.transformer.parameters(), strict=True))
    assert adapter.descriptor == "in brush style"
    assert adapter.rank == 4
    assert adapter.base_sha256 == pipe.adapters.base_sha256()
    plain = pipe.generate("a fox", seed=1).tokens
    pipe.adapters.add("brush", adapter)
    assert (pipe.generate("a fox", style="brush", seed=1).tokens != plain).any()
    assert (pipe.generate("a fox", seed=1).tokens == plain).all()


def test_the_picture_is_shown_as_it_is_and_mirrored(tiny_model: Path) -> None:
    pipe = sm.load(str(tiny_model), dtype="float32")
    picture = Image.linear_gradient("L").rotate(90).resize((40, 40)).convert("RGB")
    one, two = _views(pipe.network, picture)
    assert torch.equal(one, pipe.network.codes(picture, (8, 8)))
    mirrored = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert torch.equal(two, pipe.network.codes(mirrored, (8, 8)))


def test_tuning_in_another_format_is_refused(tiny_model: Path) -> None:
    pipe = sm.load(str(tiny_model), dtype="bfloat16")
    with pytest.raises(sm.StylemuseError, match=r'cpu in bfloat16 .* dtype="float32"'):
        tune(pipe, Image.new("RGB", (32, 32)), "a fox in brush style", name="brush")


@pytest.mark.parametrize("change", [{"rank": 0}, {"steps": 0}, {"batch": -1}, {"rate": 0.0}])
def test_impossible_recipes_are_refused(change: dict[str, int]) -> None:
    with pytest.raises(sm.StylemuseError, match=next(iter(change))):
        Recipe(**change)
