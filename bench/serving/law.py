"""What "same request, same bytes" costs: the forms that keep it, beside those that a batch alone would choose.

What a request draws may not depend on what shares its forward pass, nor on the number of threads. On a CPU the order of
a sum hangs on the shape of a product, on the batch of a convolution in bf16, and on how a norm's sums are split among
threads. Hence

    contexts   texts one at a time, conditioning with its vectors in eights      free: all rows at once
    products   of a style's low-rank pairs, batched over the style's rows        free: one over all their tokens
    scores     by log_softmax, which sums each row in one order                  free: by logsumexp
    pixels     one picture at a time, group norms of contiguous pictures         free: all at once, torch's norms

A batch of requests in one style, which is where products differ most, then takes

    (contexts + steps (step) + pixels) / (contexts' + steps (step - products + products' - scores + scores') + pixels')

times what it would take without the law; the primes are the free forms.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from stylemuse.backend.network import TorchNetwork
from stylemuse.core import AESTHETIC_SCORE
from stylemuse.decoding.canvas import Canvas
from stylemuse.decoding.loop import decode
from stylemuse.decoding.schedule import amused
from stylemuse.kernels.linear import linear_reference
from stylemuse.kernels.rows import LowRank, RowAdapters, RowSlots
from stylemuse.loading.assembly import TorchPipeline
from stylemuse.models.vq import VQ, GroupNorm

from ..harness import measure

Runs = Mapping[str, Callable[[], Any]]


def rows(pipe: TorchPipeline, style: str, *, batch: int, decoding: int, repeats: int) -> list[dict[str, Any]]:
    """A row for each part with its seconds both ways, and the ratio of a whole batch of one-branch requests."""
    network, slot = pipe.network, pipe.adapters.version(style).slot
    assert slot is not None, "a style that was just added is resident"
    masked = round(fmean(amused(_tokens(network), _tokens(network), decoding).masked_after[:-1]))
    parts: dict[str, Runs] = {
        "contexts": _contexts(network, slot, batch),
        "products": _products(network, slot, batch),
        "scores": _scores(network, batch * masked),
        "pixels": _pixels(network, batch),
    }
    facts = {"scenario": "law", "model": pipe.name, "batch": batch, "dtype": measure.short(network.dtype)}
    made, middle = [], dict[str, dict[str, float]]()
    for part, runs in parts.items():
        found = measure.interleaved(runs, repeats=repeats, device=network.device, on_run=measure.progress)
        series = {name: measure.series(times["wall"]) for name, times in found.items()}
        middle[part] = {name: values["p50"] for name, values in series.items()}
        ratio = middle[part]["kept"] / middle[part]["free"]
        made.append({"name": f"{pipe.name}, batch {batch}, {part}", "part": part, **facts, **series, "to_free": ratio})
    step = measure.series(_steps(network, slot, batch, repeats))
    surcharge = sum(middle[part]["kept"] - middle[part]["free"] for part in ("products", "scores"))
    whole = {
        name: middle["contexts"][name] + middle["pixels"][name] + decoding * (step["p50"] - less)
        for name, less in (("kept", 0.0), ("free", surcharge))
    }
    ratio = whole["kept"] / whole["free"]
    name = f"{pipe.name}, batch {batch}, same request, same bytes"
    return [*made, {"name": name, "part": "whole", **facts, "steps": decoding, "step": step, "to_free": ratio}]


def _tokens(network: TorchNetwork) -> int:
    return int(network.sizes.side**2)


@torch.no_grad()
def _at_once(network: TorchNetwork, prompts: list[str], slot: int) -> Any:
    """The conditioning of all prompts in one pass."""
    text = network.text_encoder(network.tokenizer(prompts).to(network.device))
    side = float(network.sizes.side * network.sizes.factor)
    micro = torch.tensor([[side, side, 0.0, 0.0, AESTHETIC_SCORE]] * len(prompts), device=network.device)
    slots = torch.full((len(prompts),), slot, device=network.device)
    adapters = RowAdapters(
        RowSlots(slots, torch.ones(len(prompts), device=network.device)), network.bank.touched([slot])
    )
    return network.transformer.condition(text.penultimate, text.pooled, micro, adapters)


def _kept(network: TorchNetwork, prompts: list[str], slot: int) -> list[Any]:
    """The same, each prompt's as if it were alone."""
    grid = (network.sizes.side, network.sizes.side)
    return network.contexts([(network.text(prompt), grid, slot, 1.0) for prompt in prompts])


def _contexts(network: TorchNetwork, slot: int, batch: int) -> Runs:
    prompts = [f"a fox {index}" for index in range(batch)]
    return {
        "kept": partial(_kept, network, prompts, slot),
        "free": partial(_at_once, network, prompts, slot),
    }


def _products(network: TorchNetwork, slot: int, batch: int) -> Runs:
    """Every projection of a step that the style adapts, on random tokens, as often as the network has it."""
    device, dtype, config = network.device, network.dtype, network.transformer.config
    touched = {site: at for site, at in network.bank.touched([slot]).items() if not site.endswith(".kv")}
    times = Counter((at.down.shape, at.up.shape) for at in touched.values())
    alike = {(at.down.shape, at.up.shape): at for at in touched.values() if isinstance(at, LowRank)}
    tokens = _tokens(network) // (4 if config.downsample else 1)
    slots = RowSlots(torch.full((batch,), slot, device=device), torch.ones(batch, device=device))
    calls = []
    for shapes, at in alike.items():
        _, parts, inputs, _ = at.down.shape
        x = torch.randn(batch, tokens, inputs, device=device).to(dtype)
        weight = torch.randn(parts * at.up.shape[-1], inputs, device=device).to(dtype)
        calls += [(x, weight, at)] * times[shapes]

    @torch.no_grad()
    def run(product: Callable[..., Tensor]) -> None:
        for x, weight, at in calls:
            product(x, weight, None, at, slots)

    return {"kept": partial(run, linear_reference), "free": partial(run, _one_product)}


def _one_product(x: Tensor, weight: Tensor, _: None, adapter: LowRank, slots: RowSlots) -> Tensor:
    """`linear_reference` of rows in one style, whose products take all tokens at once."""
    y = nn.functional.linear(x, weight)
    slot = slots.numbers[0]
    rank, parts, outputs = int(adapter.ranks[slot]), adapter.up.shape[1], adapter.up.shape[3]
    down = adapter.down[slot, :, :, :rank].transpose(0, 1).flatten(1)
    hidden = (x.flatten(0, 1) @ down * slots.scales.repeat_interleave(x.shape[1])[:, None]).to(x.dtype)
    flat = y.view(-1, y.shape[-1])
    for part in range(parts):
        target = flat[:, part * outputs : (part + 1) * outputs]
        target.addmm_(hidden[:, part * rank : (part + 1) * rank], adapter.up[slot, part, :rank])
    return y


def _scores(network: TorchNetwork, positions: int) -> Runs:
    """Log-probabilities of the drawn codes at so many positions."""
    logits = torch.randn(positions, network.transformer.config.codebook_size, device=network.device)
    drawn = logits.argmax(1, keepdim=True)
    return {
        "kept": lambda: logits.log_softmax(-1).gather(1, drawn),
        "free": lambda: logits.gather(1, drawn) - logits.logsumexp(-1, keepdim=True),
    }


def _pixels(network: TorchNetwork, batch: int) -> Runs:
    """Pictures of random codes, and one at a time with torch's own group norms."""
    side, codes = network.sizes.side, network.transformer.config.codebook_size
    tokens, free = torch.randint(codes, (batch, side, side), device=network.device), _own_norms(network.vq)

    @torch.no_grad()
    def drawn(part: int) -> list[Any]:
        pictures = [free.decode(each).float().permute(0, 2, 3, 1) for each in tokens.split(part)]
        return [(each * 255).round().to(torch.uint8).cpu().numpy() for each in pictures]

    return {
        "kept": partial(network.pixels, tokens),
        "one_at_a_time": partial(drawn, 1),
        "free": partial(drawn, batch),
    }


def _own_norms(vq: VQ) -> VQ:
    """A copy whose group norms are torch's own."""
    copy = deepcopy(vq)
    for parent in list(copy.modules()):
        for name, child in parent.named_children():
            if isinstance(child, GroupNorm):
                own = nn.GroupNorm(child.num_groups, child.num_channels, child.eps)
                own.weight, own.bias = child.weight, child.bias
                setattr(parent, name, own)
    return copy


def _steps(network: TorchNetwork, slot: int, batch: int, repeats: int) -> list[float]:
    """Seconds of steps after the first, of a batch of one-branch pictures in the style."""
    tokens, side = _tokens(network), network.sizes.side
    contexts = _kept(network, [f"a fox {index}" for index in range(batch)], slot)
    steps, timings, seconds = amused(tokens, tokens, 4), dict[str, list[float]](), list[float]()
    for _ in range(repeats):
        canvases = [
            Canvas.blank(tokens, seed=seed, steps=steps, contexts=(each,), weights=((1.0,) * 4,), device=network.device)
            for seed, each in enumerate(contexts)
        ]
        for canvas in canvases:
            canvas.shape = (side, side)
        decode(network, canvases, timings=timings)
        seconds += timings.pop("step")[1:]
    return seconds
