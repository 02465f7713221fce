"""Parity at full size: random weights of the published sizes, in diffusers, transformers and peft, and in ours.

    stylemuse bench parity [--sizes amused-256 amused-512] [--skip-512] [--out bench/results/parity.json]

Each network is made in its peer, its tensors go over by the checkpoint's names, both compute in fp32 on the CPU:

    max    largest |ours - peer|            rms    root mean square of ours - peer
    scale  largest |peer|                   relative = max / scale

The published weights are not needed: that two programs compute one function shows at any weights, and random ones let
every path matter. One network is held at a time, about 5 GB. Needs the ``dev`` extra.
"""

from __future__ import annotations

import gc
import json
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from stylemuse.adapters import lora
from stylemuse.adapters.bank import Bank
from stylemuse.adapters.merge import merged
from stylemuse.decoding.canvas import Canvas
from stylemuse.decoding.loop import advance
from stylemuse.decoding.schedule import amused
from stylemuse.kernels import sampling
from stylemuse.kernels.rows import RowAdapters, RowSlots
from stylemuse.loading import weights
from stylemuse.models.amused import Amused, AmusedConfig
from stylemuse.models.layers import Conditioning
from stylemuse.models.text import ClipText, ClipTextConfig
from stylemuse.models.vq import VQ, VQConfig

from ..harness.arguments import Arguments
from ..harness.networks import SIZES, TEXT, randomize

Errors = dict[str, float]

PROJECTIONS = ["to_q", "to_k", "to_v"]
SEED, GUIDANCE, STEPS = 7, 3.0, 2
RANK, ALPHA_PER_RANK = 16, 2
"""Of the LoRA, as in diffusers' training command for amused-256."""


def errors(ours: Tensor, peer: Tensor) -> Errors:
    """The figures of the module's text."""
    assert ours.shape == peer.shape
    difference, scale = ours.double() - peer.double(), float(peer.abs().max())
    largest, rms = float(difference.abs().max()), float(difference.square().mean().sqrt())
    return {"max": largest, "rms": rms, "scale": scale, "relative": largest / scale}


def peers(module: str) -> Any:
    """A module of the ``dev`` extra; of any type, for these have none to check by."""
    return import_module(module)


class Rows:
    """Our transformer as the decoding loop asks for it; a context is a row's conditioning."""

    def __init__(self, network: Amused, grid: tuple[int, int]) -> None:
        self.network, self.grid, self.mask_id = network, grid, network.config.mask_id

    def features(self, tokens: Tensor, contexts: Sequence[Conditioning]) -> Tensor:
        stacked = {name: torch.cat([context[name] for context in contexts]) for name in contexts[0]}
        return self.network.features(tokens.view(len(contexts), *self.grid), stacked)

    def readout(self, features: Tensor) -> Tensor:
        return self.network.readout(features)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.network.logits(hidden)


class Transformers:
    """diffusers' transformer and ours with the same weights, and one input: a prompt's row and a negative's."""

    def __init__(self, **config: Any) -> None:
        self.peer = peers("diffusers").UVit2DModel(**config).eval().requires_grad_(False)
        randomize(self.peer, SEED)
        self.ours = self.load(self.peer.state_dict())
        sizes, side = self.ours.config, self.ours.config.sample_size
        generator = torch.Generator().manual_seed(SEED)
        self.grid = (side, side)
        self.tokens = torch.randint(sizes.codebook_size, (2, side, side), generator=generator)
        self.tokens[:, ::2, 1::3] = sizes.mask_id
        self.text = torch.randn(2, 77, sizes.encoder_hidden_size, generator=generator)
        self.pooled = torch.randn(2, sizes.cond_embed_dim, generator=generator)
        self.micro = torch.tensor([[16.0 * side, 16.0 * side, 0.0, 0.0, 6.0]]).repeat(2, 1)

    def load(self, tensors: Mapping[str, Tensor]) -> Amused:
        with torch.device("meta"):
            network = Amused(AmusedConfig.from_dict(self.config))
        weights.load_into(network, tensors, weights.AMUSED)
        return network.rest()

    @property
    def config(self) -> Mapping[str, Any]:
        return self.peer.config

    def expected(self, tokens: Tensor) -> Tensor:
        """The peer's logits (R, N, K)."""
        result: Tensor = self.peer(tokens, self.text, self.pooled, self.micro)
        return result.flatten(2).transpose(1, 2)

    def logits(self, network: Amused, tokens: Tensor, adapters: RowAdapters | None = None) -> Tensor:
        """Ours, the same."""
        conditioning = network.condition(self.text, self.pooled, self.micro, adapters)
        features = network.features(tokens, conditioning, adapters)
        return network.logits(network.readout(features.flatten(0, 1))).unflatten(0, features.shape[:2])


@torch.no_grad()
def transformer(**config: Any) -> dict[str, Any]:
    """Logits, tokens of the first decoding steps, and a LoRA on the attention projections: at its place and merged."""
    both = Transformers(**config)
    expected = both.expected(both.tokens)
    found: dict[str, Any] = {
        "parameters": sum(parameter.numel() for parameter in both.ours.parameters()),
        "logits": errors(both.logits(both.ours, both.tokens), expected),
        "decoding": decoding(both),
    }
    return found | {"lora": with_lora(both, expected)}


def decoding(both: Transformers) -> dict[str, Any]:
    """Tokens after every step of diffusers' AmusedScheduler, guided, with the same noise."""
    network, size, mask = both.ours, both.grid[0] * both.grid[1], both.ours.config.mask_id
    conditioning = network.condition(both.text, both.pooled, both.micro)
    contexts = tuple({name: value[row : row + 1] for name, value in conditioning.items()} for row in (0, 1))
    branches = (GUIDANCE,) * STEPS, (1.0 - GUIDANCE,) * STEPS
    canvas = Canvas.blank(size, seed=SEED, steps=amused(size, size, STEPS), contexts=contexts, weights=branches)
    scheduler = peers("diffusers").AmusedScheduler(mask_token_id=mask)
    scheduler.set_timesteps(STEPS, (2, 0))
    sample, equal = torch.full((1, size), mask), []
    for timestep in scheduler.timesteps:
        conditional, negative = both.expected(sample.view(1, *both.grid).repeat(2, 1, 1)).split(1)
        guided = negative + GUIDANCE * (conditional - negative)
        with our_noise(network.config.codebook_size, size, canvas.step):
            sample = scheduler.step(guided, timestep, sample).prev_sample
        advance(Rows(network, both.grid), [canvas])
        equal.append(int((canvas.tokens.masked_fill(canvas.unknown, mask) == sample[0]).sum()))
    return {"steps": STEPS, "guidance": GUIDANCE, "tokens": size, "equal_after_step": equal}


@contextmanager
def our_noise(codes: int, size: int, step: int) -> Iterator[None]:
    """Both sources of noise of diffusers' scheduler replaced by what we draw at this step."""
    scheduling = peers("diffusers.schedulers.scheduling_amused")
    places = torch.full((size,), SEED), torch.full((size,), step), torch.arange(size)
    token_noise, choice_noise = sampling.token_gumbel(codes, *places), sampling.position_gumbel(*places)
    draw = patch.object(torch, "multinomial", lambda probs, *_, **__: (probs.log() + token_noise).argmax(-1, True))
    with draw, patch.object(scheduling, "gumbel_noise", lambda *_, **__: choice_noise[None]):
        yield


def with_lora(both: Transformers, base: Tensor) -> dict[str, Any]:
    """peft's LoRA of rank 16 in the peer, saved by diffusers, read by us; ``effect`` is how far it moves the logits."""
    pristine, sites = both.peer.state_dict(), both.ours.config.sites()
    config = peers("peft").LoraConfig(
        r=RANK, lora_alpha=ALPHA_PER_RANK * RANK, target_modules=PROJECTIONS, init_lora_weights=False
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        both.peer.add_adapter(config)
    with tempfile.TemporaryDirectory() as folder:
        both.peer.save_lora_adapter(folder)
        adapter = lora.read(folder, name="random", sites=sites)
    expected = both.expected(both.tokens)
    bank = Bank(sites, both.ours.config.bottleneck_sites(), slots=1, rank=RANK)
    rows = RowSlots(torch.full((2,), bank.add(adapter)), torch.ones(2))
    at_its_place = errors(both.logits(both.ours, both.tokens, RowAdapters(rows, bank.sites)), expected)
    network = both.load(merged(pristine, adapter, 1.0))
    return {
        "rank": RANK,
        "modules": len(adapter.tensors),
        "parameters": sum(side.numel() for pair in adapter.tensors.values() for side in pair),
        "effect": errors(base, expected)["relative"],
        "at_its_place": at_its_place,
        "merged": errors(both.logits(network, both.tokens), expected),
    }


@torch.no_grad()
def tokenizer(side: int = 256, **config: Any) -> dict[str, Any]:
    """The VQ model: latents, codes and the picture of a random one."""
    sizes = VQConfig(**config)
    blocks = len(sizes.block_out_channels)
    peer = (
        peers("diffusers")
        .VQModel(
            block_out_channels=sizes.block_out_channels,
            layers_per_block=sizes.layers_per_block,
            latent_channels=sizes.latent_channels,
            num_vq_embeddings=sizes.num_vq_embeddings,
            norm_num_groups=sizes.norm_num_groups,
            down_block_types=("DownEncoderBlock2D",) * blocks,
            up_block_types=("UpDecoderBlock2D",) * blocks,
            mid_block_add_attention=False,
            lookup_from_codebook=True,
        )
        .eval()
    )
    randomize(peer, SEED)
    with torch.device("meta"):
        ours = VQ(VQConfig.from_dict(peer.config)).eval()
    weights.load_into(ours, peer.state_dict(), weights.VQ)
    picture = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(SEED))
    latent = peer.encode(picture).latents
    codes = peer.quantize(latent)[2][2].view(1, *latent.shape[2:])
    found = ours.encode(picture)
    drawn = peer.decode(codes, force_not_quantize=True, shape=(*codes.shape, ours.config.embed_dim)).sample
    return {
        "parameters": sum(parameter.numel() for parameter in ours.parameters()),
        "latent": errors(ours.latent(picture), latent),
        "codes": {"equal": int((found == codes).sum()), "of": codes.numel()},
        "picture": errors(ours.render(ours.quantize.look_up(codes)), drawn),
    }


@torch.no_grad()
def text(**config: Any) -> dict[str, Any]:
    """CLIP's text tower: the features and the pooled vector of two random prompts."""
    transformers = peers("transformers")
    sizes: dict[str, Any] = {**TEXT, **config}
    peer = transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**sizes)).eval()
    randomize(peer, SEED)
    with torch.device("meta"):
        ours = ClipText(ClipTextConfig.from_dict(sizes)).eval()
    weights.load_into(ours, peer.state_dict(), weights.CLIP_TEXT)
    ids = torch.randint(sizes["vocab_size"], (2, 77), generator=torch.Generator().manual_seed(SEED))
    expected, found = peer(ids, output_hidden_states=True), ours(ids)
    return {
        "parameters": sum(parameter.numel() for parameter in ours.parameters()),
        "penultimate": errors(found.penultimate, expected.hidden_states[-2]),
        "pooled": errors(found.pooled, expected.text_embeds),
    }


def machine() -> dict[str, Any]:
    """Where the figures come from."""
    packages = ("stylemuse", "torch", "diffusers", "transformers", "peft")
    return {
        "machine": f"{platform.system()} {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()} | {package: version(package) for package in packages},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the figures, and on the last line all of it as one JSON document."""
    parser = Arguments(prog="stylemuse bench parity", description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="transformers to compare")
    parser.add_argument("--skip-512", action="store_true", help="leave out amused-512")
    parser.add_argument("--out", type=Path, help="write the JSON document to this file too")
    options = parser.parse_args(arguments)
    jobs: dict[str, Callable[[], dict[str, Any]]] = {"text": text, "tokenizer": tokenizer}
    for size in options.sizes:
        if not (options.skip_512 and size == "amused-512"):
            jobs[size] = partial(transformer, **SIZES[size])
    results: dict[str, Any] = {}
    for name, job in jobs.items():
        began = time.perf_counter()
        results[name] = job() | {"seconds": round(time.perf_counter() - began, 1)}
        gc.collect()
        report(name, results[name])
    command = " ".join(["stylemuse bench parity", *(sys.argv[1:] if arguments is None else arguments)])
    peak = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 1)
    document = {"command": command, **machine(), "peak_gigabytes": peak, "results": results}
    if options.out is not None:
        options.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(document))


def report(name: str, values: Mapping[str, Any], indent: str = "") -> None:
    """The figures, a line each."""
    print(f"{indent}{name}", flush=True)
    for key, value in values.items():
        if isinstance(value, dict) and "relative" in value:
            figures = "  ".join(f"{figure} {number:.2e}" for figure, number in value.items())
            print(f"{indent}  {key:14} {figures}", flush=True)
        elif isinstance(value, dict):
            report(key, value, indent + "  ")
        else:
            print(f"{indent}  {key:14} {value}", flush=True)
