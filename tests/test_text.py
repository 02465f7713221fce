"""The text tower against transformers' CLIPTextModelWithProjection, on tiny random weights at odd sizes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from stylemuse.core import StylemuseError
from stylemuse.loading.weights import CLIP_TEXT, load_into
from stylemuse.models.text import ClipText, ClipTextConfig

END = 49
SIZES = {
    "vocab_size": 51,
    "hidden_size": 21,
    "intermediate_size": 37,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "projection_dim": 13,
    "max_position_embeddings": 11,
}


def pair(**changes: object) -> tuple[ClipText, CLIPTextModelWithProjection]:
    """Our tower and transformers', with the same weights, from the same config.json."""
    torch.manual_seed(0)
    theirs = CLIPTextModelWithProjection(CLIPTextConfig(**(SIZES | {"eos_token_id": END} | changes))).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours = ClipText(ClipTextConfig.from_dict(theirs.config.to_dict()))
    load_into(ours, theirs.state_dict(), CLIP_TEXT)
    return ours, theirs


def prompts(rows: int, length: int) -> Tensor:
    """Ids as the tokenizer frames them: text, the end token, and padding that repeats it."""
    ids = torch.randint(0, END, (rows, length), generator=torch.Generator().manual_seed(1))
    for row in range(rows):
        ids[row, min(length - 1, 2 * row + 1) :] = END
    return ids


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("end", [END, 2])
@pytest.mark.parametrize("layers", [1, 3])
@torch.no_grad()
def test_outputs_agree_with_transformers(activation: str, end: int, layers: int) -> None:
    ours, theirs = pair(hidden_act=activation, eos_token_id=end, num_hidden_layers=layers)
    for length in (2, 7, 11):
        ids = prompts(5, length)
        expected = theirs(ids, output_hidden_states=True)
        output = ours(ids)
        assert output.penultimate.shape == (5, length, 21)
        assert output.pooled.shape == (5, 13)
        torch.testing.assert_close(output.penultimate, expected.hidden_states[-2], rtol=0, atol=1e-5)
        torch.testing.assert_close(output.pooled, expected.text_embeds, rtol=0, atol=1e-5)


@torch.no_grad()
def test_where_the_pooled_vector_is_taken() -> None:
    ours, theirs = pair(eos_token_id=2)
    ids = torch.tensor([[5, 50, 2, 49, 50, 2]])
    torch.testing.assert_close(ours(ids).pooled, theirs(ids).text_embeds, rtol=0, atol=1e-5)
    at_first_end, theirs = pair(eos_token_id=49)
    torch.testing.assert_close(at_first_end(ids).pooled, theirs(ids).text_embeds, rtol=0, atol=1e-5)
    assert not torch.allclose(ours(ids).pooled, at_first_end(ids).pooled, atol=1e-2)


@torch.no_grad()
def test_later_tokens_do_not_reach_earlier_ones() -> None:
    ours, _ = pair()
    ids = prompts(1, 9)
    changed = ids.clone()
    changed[:, 6:] = 7
    torch.testing.assert_close(ours(ids).penultimate[:, :6], ours(changed).penultimate[:, :6], rtol=0, atol=1e-6)


def test_every_parameter_that_conditions_the_image_is_trained() -> None:
    tower = ClipText(ClipTextConfig(**SIZES, eos_token_id=END))
    output = tower(prompts(4, 11))
    (output.penultimate.square().mean() + output.pooled.square().mean()).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in tower.parameters())


def test_fresh_weights_follow_clip() -> None:
    torch.manual_seed(0)
    tower = ClipText(ClipTextConfig(**(SIZES | {"vocab_size": 4096, "hidden_size": 96, "intermediate_size": 384})))
    layer = tower.layers[0]
    spread = {
        tower.token.weight: 0.02,
        layer.attention.qkv.weight: 96**-0.5,
        layer.attention.out.weight: 96**-0.5 * 6**-0.5,
        layer.widen.weight: 192**-0.5,
        layer.narrow.weight: 96**-0.5 * 6**-0.5,
    }
    for weight, std in spread.items():
        assert weight.std().item() == pytest.approx(std, rel=0.05)


def test_config_survives_a_round_trip_and_transformers_reads_it() -> None:
    config = ClipTextConfig(**SIZES, hidden_act="gelu", layer_norm_eps=1e-6, eos_token_id=END)
    assert ClipTextConfig.from_dict(config.to_dict()) == config
    assert ClipTextConfig.from_dict(CLIPTextConfig(**config.to_dict()).to_dict()) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act 'relu' is not supported; allowed: gelu, quick_gelu"),
        ({"num_attention_heads": 4}, "hidden_size 21 is not a multiple of num_attention_heads 4"),
        ({"vocab_size": 0}, "vocab_size is 0; a positive integer"),
        ({"eos_token_id": [1, 2]}, r"eos_token_id is \[1, 2\]; a positive integer"),
        ({"model_type": "clip"}, "model_type 'clip' is not supported; allowed: clip_text_model"),
    ],
)
def test_a_config_that_cannot_run_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(StylemuseError, match=message):
        ClipTextConfig.from_dict(SIZES | changes)


def test_a_missing_size_is_named() -> None:
    sizes = {name: value for name, value in SIZES.items() if name != "projection_dim"}
    with pytest.raises(StylemuseError, match=r"config.json does not give 'projection_dim'"):
        ClipTextConfig.from_dict(sizes)


def test_too_long_a_prompt_is_refused() -> None:
    tower = ClipText(replace(ClipTextConfig(**SIZES), num_hidden_layers=1))
    with pytest.raises(StylemuseError, match="12 tokens given; at most 11 are allowed"):
        tower(torch.zeros(1, 12, dtype=torch.int64))
