"""``stylemuse bench kernels``: each operation of a step as a Triton kernel, in plain torch, through torch.compile.

The shapes are amused-256's. The floor is what the machine's rates allow for the arithmetic and for reading the inputs
and writing the output once; ``error`` is the largest difference to the reference in fp32, relative to its largest
value. On a GPU the times are the device's own, the inputs not in its cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stylemuse.backend.machine import DTYPES, choose
from stylemuse.kernels.attention import attention
from stylemuse.kernels.bottleneck import bottleneck
from stylemuse.kernels.canvases import Canvases, Schedules
from stylemuse.kernels.decoding_step import decoding_step
from stylemuse.kernels.dispatch import REFERENCE, Kernels, obstacle, triton_kernels
from stylemuse.kernels.inputs import norm
from stylemuse.kernels.norm import Norm
from stylemuse.kernels.projection import Projection
from stylemuse.kernels.quantization import FORMATS, NAMES, quantize_reference
from stylemuse.kernels.quantization import obstacle as format_obstacle
from stylemuse.kernels.response_norm import response_norm
from stylemuse.kernels.rows import Bottleneck, LowRank, RowSlots
from stylemuse.models.amused import AmusedConfig

from ..harness import measure
from ..harness.arguments import Arguments, count

TEXT, RANK, WIDTH, STEPS = 77, 16, 32, 1 << 14
"""Keys of the text, rank of a LoRA, width of a second-round bottleneck, and more steps than anybody repeats."""
IMPLEMENTATIONS = ("reference", "compiled", "triton")


@dataclass(frozen=True)
class Operation:
    """One operation on random inputs; ``compared`` is false where its inputs change from call to call.

    ``number`` is the format of its matrix products, where it is not the inputs'.
    """

    name: str
    flop: int
    bytes: int
    run: Callable[[Kernels], Tensor]
    compared: bool = True
    number: torch.dtype | None = None

    def floor(self, rates: dict[str, Any], dtype: torch.dtype) -> float:
        """Seconds."""
        return max(self.flop / rates[f"{measure.short(self.number or dtype)}_flops"], self.bytes / rates["bytes"])


class Inputs:
    """Random tensors, the same for a seed whatever their number format."""

    def __init__(self, device: torch.device, dtype: torch.dtype, seed: int) -> None:
        self.device, self.dtype = device, dtype
        self._generator = torch.Generator().manual_seed(seed)

    def random(self, *shape: int, scale: float = 1.0) -> Tensor:
        made = torch.randn(shape, generator=self._generator) * scale
        return made.to(self.device, self.dtype)


def eight_bit_formats(device: torch.device) -> list[torch.dtype]:
    """Those that a device's matrix units multiply; a CPU has none for fp8."""
    names = ("int8",) if device.type == "cpu" else tuple(FORMATS)
    return [FORMATS[name] for name in names if format_obstacle(name, device) is None]


def operations(
    config: AmusedConfig, device: torch.device, dtype: torch.dtype, *, rows: int, seed: int = 0
) -> Iterator[Operation]:
    """Those of a step with ``rows`` rows, two for each picture, each row in a style of its own."""
    made = Inputs(device, dtype, seed)
    n, d, c, inner = config.sample_size**2, config.hidden_size, config.block_out_channels, config.intermediate_size
    size = dtype.itemsize
    slots = RowSlots(torch.arange(rows, device=device), torch.ones(rows, device=device))

    def product(name: str, inputs: int, outputs: int, parts: int = 1, **options: Any) -> Operation:
        x, weight = made.random(rows, n, inputs), made.random(parts * outputs, inputs, scale=inputs**-0.5)
        adapted, number, residual = options.pop("adapted", False), options.pop("number", None), None
        if options.pop("residual", False):
            residual = made.random(rows, n, outputs)
        pair = None
        if adapted:
            down = made.random(rows, parts, inputs, RANK, scale=inputs**-0.5)
            ranks = torch.full((rows,), RANK, device=device)
            pair = LowRank(down, made.random(rows, parts, RANK, outputs, scale=0.1), ranks)
        extra = 2 * rows * n * RANK * parts * (inputs + outputs) if adapted else 0
        written = parts * outputs // (2 if options.get("activation") == "geglu" else 1)
        project = Projection(weight if number is None else quantize_reference(weight, number), pair)
        moved = size * rows * n * (inputs + written * (2 if residual is not None else 1))
        return Operation(
            name if number is None else f"{name}, {NAMES[number]}",
            2 * rows * n * inputs * parts * outputs + extra,
            moved + project.weight.nbytes + (0 if pair is None else pair.down.nbytes + pair.up.nbytes),
            lambda kernels: project(x, slots if adapted else None, residual=residual, kernels=kernels, **options),
            number=number,
        )

    def attending(name: str, width: int, heads: int, keys: int) -> Operation:
        q, k, v = (made.random(rows, heads, length, width // heads) for length in (n, keys, keys))
        flop, moved = 4 * rows * n * keys * width, rows * width * (2 * n + 2 * keys)
        return Operation(name, flop, size * moved, lambda kernels: attention(q, k, v, kernels=kernels))

    yield product("q, k, v", d, d, 3)
    yield product("q, k, v with adapters", d, d, 3, adapted=True)
    yield product("projection back, residual", d, d, residual=True)
    yield product("projection back, residual, with adapters", d, d, residual=True, adapted=True)
    yield product("gated up-projection", d, 2 * inner, activation="geglu")
    yield product("down-projection, residual", inner, d, residual=True)
    yield product("conv block up-projection, gelu", c, 4 * c, activation="gelu")
    for number in eight_bit_formats(device):
        yield product("q, k, v with adapters", d, d, 3, adapted=True, number=number)
        yield product("gated up-projection", d, 2 * inner, activation="geglu", number=number)
        yield product("down-projection, residual", inner, d, residual=True, number=number)
    yield attending("self-attention", d, config.num_attention_heads, n)
    yield attending("attention to the text", d, config.num_attention_heads, TEXT)
    yield attending("conv stage's attention to the text", c, config.block_num_heads, TEXT)

    y, widths = made.random(rows, n, d), torch.full((rows,), WIDTH, device=device)
    neck = Bottleneck(made.random(rows, d, WIDTH, scale=d**-0.5), made.random(rows, WIDTH, d, scale=0.1), widths)
    moved = size * (2 * rows * n * d + 2 * rows * d * WIDTH)
    yield Operation(
        "bottlenecks", 4 * rows * n * d * WIDTH, moved, lambda kernels: bottleneck(y, neck, slots, kernels=kernels)
    )

    gain, modulation = made.random(d), made.random(rows, 2, d)
    moved = size * 2 * rows * n * d
    yield Operation(
        "RMS norm, modulated", 0, moved, lambda kernels: norm(y, Norm(gain, 1e-6, "rms", modulation), kernels=kernels)
    )
    yield Operation(
        "layer norm, modulated",
        0,
        moved,
        lambda kernels: norm(y, Norm(gain, 1e-6, "layer", modulation), kernels=kernels),
    )
    h, gamma, beta = made.random(rows, n, 4 * c), made.random(4 * c), made.random(4 * c)
    # The norms are over all positions: what is scaled by them must be read again.
    yield Operation(
        "global response norm",
        0,
        size * 3 * rows * n * 4 * c,
        lambda kernels: response_norm(h, gamma, beta, kernels=kernels),
    )
    yield _sampling(config, made, rows)


def _sampling(config: AmusedConfig, made: Inputs, rows: int) -> Operation:
    """Head, guidance, draw and re-masking, half of the positions masked, again and again."""
    n, width, codes = config.sample_size**2, config.in_channels, config.codebook_size
    pictures, masked, device = max(1, rows // 2), n // 2, made.device
    branches = rows // pictures
    index = {"dtype": torch.int32, "device": device}
    places = torch.arange(n, **index).expand(pictures, n).contiguous()  # type: ignore[call-overload]
    canvases = Canvases(
        seeds=torch.arange(pictures, device=device),
        rows=torch.arange(rows, **index).view(pictures, branches),  # type: ignore[call-overload]
        steps=torch.zeros(pictures, **index),  # type: ignore[call-overload]
        counts=torch.full((pictures,), masked, **index),  # type: ignore[call-overload]
        places=places,
        tokens=torch.zeros(pictures, n, dtype=torch.int64, device=device),
        inputs=torch.zeros(rows, n, dtype=torch.int64, device=device),
    )
    weights = torch.tensor([2.0, -1.0][:branches] if branches == 2 else [1.0], device=device)
    schedules = Schedules(
        masked_after=torch.full((pictures, STEPS), masked, **index),  # type: ignore[call-overload]
        token_temperature=torch.ones(pictures, STEPS, device=device),
        choice_temperature=torch.ones(pictures, STEPS, device=device),
        weights=weights.expand(pictures, STEPS, branches).contiguous(),
        raw_logit=torch.zeros(pictures, dtype=torch.bool, device=device),
    )
    hidden, head = made.random(rows, n, width), made.random(codes, width, scale=width**-0.5)

    def run(kernels: Kernels) -> Tensor:
        decoding_step(hidden, head, None, canvases, schedules, config.mask_id, kernels=kernels)
        return canvases.tokens

    moved = made.dtype.itemsize * (rows * masked * width + head.numel())
    return Operation("head, draw and re-masking", 2 * pictures * masked * width * codes, moved, run, compared=False)


def run(
    config: AmusedConfig,
    device: torch.device,
    dtype: torch.dtype,
    *,
    rows: int,
    repeats: int,
    rates: dict[str, Any],
    chosen: Sequence[str] = IMPLEMENTATIONS,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """A row per operation and implementation."""
    exact = operations(config, device, torch.float32, rows=rows, seed=seed)
    found = []
    for operation, definition in zip(operations(config, device, dtype, rows=rows, seed=seed), exact, strict=True):
        runs = {name: _prepared(operation, name, device) for name in chosen}
        ready = {name: each for name, each in runs.items() if not isinstance(each, str)}
        times = measure.on_device(ready, repeats=repeats, device=device)
        expected = definition.run(REFERENCE).float() if operation.compared else None
        for name in chosen:
            row: dict[str, Any] = {"name": f"{operation.name}, {rows} rows, {name}", "operation": operation.name}
            row |= {"implementation": name, "device": str(device), "dtype": measure.short(dtype), "rows": rows}
            if name not in ready:
                found.append(row | {"skipped": runs[name]})
                continue
            wall, floor = measure.series(times[name]), operation.floor(rates, dtype)
            row |= {"wall": wall, "floor": floor, "share_of_floor": floor / wall["p50"]}
            if expected is not None:
                row["error"] = float((ready[name]().float() - expected).abs().max() / expected.abs().max())
            found.append(row)
    return found


def _prepared(operation: Operation, implementation: str, device: torch.device) -> Callable[[], Tensor] | str:
    """What to run, or why it cannot be."""
    if implementation == "triton":
        reason = obstacle(device)
        if reason is not None:
            return reason
        kernels = triton_kernels(device)
        return lambda: operation.run(kernels)
    if implementation == "reference":
        return lambda: operation.run(REFERENCE)
    mode = "max-autotune-no-cudagraphs" if device.type == "cuda" else "default"
    compiled = torch.compile(operation.run, mode=mode, dynamic=False)
    return lambda: compiled(REFERENCE)


def show(rows: Sequence[dict[str, Any]]) -> None:
    """The table, microseconds."""
    print(f"{'':64}{'p20':>10}{'p50':>10}{'p80':>10}{'floor':>8}{'error':>10}")
    for row in rows:
        if "skipped" in row:
            print(f"{row['name']:64} {row['skipped']}")
            continue
        times = "".join(f"{row['wall'][each] * 1e6:10.1f}" for each in ("p20", "p50", "p80"))
        error = f"{row['error']:10.1e}" if "error" in row else ""
        print(f"{row['name']:64}{times}{row['share_of_floor']:8.0%}{error}")


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, and on the last line all of it as one JSON document."""
    parser = Arguments(prog="stylemuse bench kernels", description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", nargs="+", type=count, default=[2], help="rows of a step, two a picture")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="chosen by the machine if left out")
    parser.add_argument("--only", nargs="+", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS))
    parser.add_argument("--repeats", type=count, default=20, help="of each")
    parser.common()
    options = parser.parse_args(arguments)
    dtypes = [choose(options.device, dtype).dtype for dtype in options.dtypes or [None]]
    device = choose(options.device).device
    rates = measure.roofs(device, [*dtypes, *eight_bit_formats(device)])
    rows = [
        row
        for dtype in dtypes
        for number in options.rows
        for row in run(
            AmusedConfig(), device, dtype, rows=number, repeats=options.repeats, rates=rates, chosen=options.only,
            seed=options.seed,
        )
    ]  # fmt: skip
    show(rows)
    measure.publish(measure.document(parser.command, options.seed, device, rates, call=rows), options.out)
