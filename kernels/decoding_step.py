"""What follows the network in a decoding step, in three launches and without a word to the host.

For every masked position of a picture, with h_b (D,) the hidden states its branches left there, w_b their weights at
this step, W (V, D) and c (V,) the head:

    l = W (sum_b w_b h_b) + c          the head is affine and the weights sum to 1: one head for all branches
    token, score, confidence           as in `sampling`
    masked again                       the ``masked_after`` least confident, ties by lowest position

`hidden` is (R, N, D), one row per branch, rows named by ``canvases.rows``. The pictures' state is changed in place.

The kernels. *Blend* adds the branches up in fp32, once for all codes, and leaves the sums in the order of the masked
positions, as the product takes them. *Draw*: a program takes a tile of a picture's masked positions and `SPAN` codes.
Nothing is between the loads and the matrix unit; noise is added to the tile as it is made, and four numbers are left
per position: the best l + tau g with its code and logit, and the log-sum-exp. The list of masked positions is on the
device, and programs beyond its end return at once, so that the work follows the number of masked positions while the
launch stays the same. *Reveal*: one program per picture joins the spans, many at a time, scores, finds the n-th least
confidence digit by digit from its bits, and writes tokens, the new list, and what the network sees next. Apart, logits
and noise of M positions would be written and read, 16 M V bytes (33 MB of 256 x 8192) with the noise's integers on top;
here 16 M V / 128 bytes are.

By counting, for 256 masked positions, 8,192 codes and a width of 768 on an H100: blend moves 1.2 MB (2 us); draw is 128
tiles of 128 x 128, one for each multiprocessor, which reads 0.4 MB (7 us from the L2 cache) and then runs 43,000
instructions of a warp, most of them noise (7 us); reveal reads 0.26 MB (7 us, all of it waiting). Not measured yet. The
version before, whose draw added the branches up between load and product, took 30 and 22 us there.

A picture's result does not depend on its neighbours: spans are cut by codes alone, a branch that is not there adds
nothing to the sum. Tokens are those of the reference but for the rounding of logits and logarithms: in half precision
the reference rounds the logits too, the kernel keeps them in fp32.

Source: Chang et al., "MaskGIT", CVPR 2022; Gumbel-max over tiles as in any two-stage argmax.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from . import sampling
from .canvases import Canvases, Schedules
from .device import follow, multiply
from .dispatch import REFERENCE, STEP, Kernels, constant, forward_only, jit, operator, tl
from .noise import gumbel, token_words
from .product import operand
from .reveal import add_mass, better, reveal_choices, reveal_kernel
from .tuning import (
    INTERPRETER,
    Call,
    Described,
    Launch,
    Specimen,
    ceil_div,
    dependent,
    describable,
    family,
    pick,
    power_of_two,
    precision,
)

SPAN = 128
"""Codes of one program. 8192 codes x 256 positions in tiles of 128 are 128 programs: one for each multiprocessor."""

_SPAN = constant(SPAN)
_MINUS_INFINITY = constant(float("-inf"))


def decoding_step_reference(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, canvases: Canvases, schedules: Schedules, mask_id: int
) -> None:
    """The definition in plain torch: the masked positions of all pictures in one list."""
    pictures, places = canvases.places.shape
    running = canvases.counts > 0
    picture, entry = (torch.arange(places, device=hidden.device) < canvases.counts[:, None]).nonzero(as_tuple=True)
    place, step, seeds = canvases.places[picture, entry].long(), canvases.steps[picture].long(), canvases.seeds[picture]

    total = torch.zeros(len(place), hidden.shape[2], device=hidden.device)
    for branch in range(schedules.weights.shape[2]):
        share, row = schedules.weights[picture, step, branch, None], canvases.rows[picture, branch].clamp(min=0).long()
        total = torch.where(share == 0.0, total, total + share * hidden[row, place].float())
    logits = F.linear(total.to(weight.dtype), weight).float()
    logits = logits if bias is None else logits + bias.float()

    temperature, raw = schedules.token_temperature[picture, step], schedules.raw_logit[picture]
    tokens, scores = sampling.draw(logits, seeds, step, place, temperature, raw)
    confidences = torch.full((pictures, places), torch.inf, device=hidden.device)
    choice = schedules.choice_temperature[picture, step]
    confidences[picture, entry] = sampling.confidence(scores, seeds, step, place, choice)
    now = canvases.steps.clamp(max=schedules.masked_after.shape[1] - 1).long()[:, None]
    after = torch.where(running, schedules.masked_after.gather(1, now)[:, 0], 0)
    again = sampling.remask(confidences, after.long())

    masked = again[picture, entry]
    canvases.tokens[picture, place] = tokens
    seen = tokens.masked_fill(masked, mask_id)
    for rows in canvases.rows[picture].long().unbind(1):
        canvases.inputs[rows[rows >= 0], place[rows >= 0]] = seen[rows >= 0]
    order = again.cumsum(1) - 1
    canvases.places[picture[masked], order[again]] = place[masked].int()
    canvases.counts.copy_(after)
    canvases.steps.add_(running)


def choices(architecture: str, dtype: torch.dtype) -> tuple[Launch, ...]:
    """The launches of the draw for a head's number format, the default first."""
    if architecture == INTERPRETER:
        return (_launch(16, 64, 32, 4, 1),)
    if dtype == torch.float32:
        return (_launch(32, 64, 32, 8, 2), _launch(16, 64, 32, 4, 2))
    large = _launch(128, 128, 64, 8, 3)
    # Twice the warps to choose from, where one product is not the work of four of them.
    crowded = () if architecture == "sm_100" else (_launch(128, 128, 64, 16, 3),)
    return large, *crowded, _launch(64, 128, 64, 8, 3), _launch(64, 64, 64, 4, 3)


def _launch(places: int, codes: int, inputs: int, warps: int, stages: int) -> Launch:
    return Launch({"BLOCK_PLACES": places, "BLOCK_CODES": codes, "BLOCK_INPUTS": inputs}, warps, stages)


def blend_choices(inputs: int) -> tuple[Launch, ...]:
    """The launches of the branches' sum for a width: about 2048 numbers a program."""
    return (Launch({"BLOCK_PLACES": max(1, 2048 // power_of_two(inputs))}, 4, 1),)


@jit
def _by_word(x: tl.tensor, ROWS: tl.constexpr, BLOCKS: tl.constexpr) -> tl.tuple:
    """(ROWS, 4 BLOCKS) -> its four (ROWS, BLOCKS): numbers 0, 4, ..., then 1, 5, ..., and so on."""
    even, odd = x.reshape(ROWS, BLOCKS, 2, 2).split()
    first, third = even.split()
    second, fourth = odd.split()
    return first, second, third, fourth


@jit
def _blend_kernel(
    hidden: tl.tensor,
    rows: tl.tensor,
    weights: tl.tensor,
    steps: tl.tensor,
    counts: tl.tensor,
    places: tl.tensor,
    total: tl.tensor,
    hidden_row: tl.tensor,
    hidden_place: tl.tensor,
    rows_picture: tl.tensor,
    weights_step: tl.tensor,
    schedule: tl.tensor,
    positions: tl.tensor,
    BRANCHES: tl.constexpr,
    INPUTS: tl.constexpr,
    PADDED: tl.constexpr,
    DEPENDENT: tl.constexpr,
    BLOCK_PLACES: tl.constexpr,
) -> None:
    """The weighted sum of the branches at some of one picture's masked positions."""
    follow(DEPENDENT)
    tile, picture = tl.program_id(0), tl.program_id(1)
    count = tl.load(counts + picture)
    if tile * BLOCK_PLACES >= count:
        return
    now = picture * schedule + tl.load(steps + picture)
    entry = tile * BLOCK_PLACES + tl.arange(0, BLOCK_PLACES)
    live = entry < count
    place = tl.load(places + picture * positions + entry, live, 0)
    channel = tl.arange(0, PADDED)
    value = tl.zeros((BLOCK_PLACES, PADDED), tl.float32)
    for branch in tl.static_range(BRANCHES):
        share = tl.load(weights + now * weights_step + branch)
        row = tl.load(rows + picture * rows_picture + branch).to(tl.int64)
        width = tl.where(share != 0.0, INPUTS, 0)
        at = hidden + row * hidden_row + place[:, None] * hidden_place + channel[None, :]
        part = tl.load(at, live[:, None] & (channel < width)[None, :], 0.0)
        value = tl.fma(part.to(tl.float32), share, value)
    to = total + (picture * positions + entry).to(tl.int64)[:, None] * INPUTS + channel[None, :]
    tl.store(to, value.to(total.dtype.element_ty), live[:, None] & (channel < INPUTS)[None, :])


@jit
def _draw_kernel(
    total: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    temperatures: tl.tensor,
    seeds: tl.tensor,
    steps: tl.tensor,
    counts: tl.tensor,
    places: tl.tensor,
    partials: tl.tensor,
    schedule: tl.tensor,
    positions: tl.tensor,
    plane: tl.tensor,
    INPUTS: tl.constexpr,
    CODES: tl.constexpr,
    DESCRIBED: tl.constexpr,
    DEPENDENT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_PLACES: tl.constexpr,
    BLOCK_CODES: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
) -> None:
    """A tile of one picture's masked positions, and one span of the codes. Rows beyond the list hold anything."""
    follow(DEPENDENT)
    BLOCKS: tl.constexpr = BLOCK_CODES // 4
    tile, span, picture = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    count = tl.load(counts + picture)
    if tile * BLOCK_PLACES >= count:
        return
    step = tl.load(steps + picture)
    seed = tl.load(seeds + picture)
    temperature = tl.load(temperatures + picture * schedule + step)
    entry = tile * BLOCK_PLACES + tl.arange(0, BLOCK_PLACES)
    live = entry < count
    place = tl.load(places + picture * positions + entry, live, 0)
    first_row, end = picture * positions + tile * BLOCK_PLACES, picture * positions + count

    none = tl.full((BLOCK_PLACES,), _MINUS_INFINITY, tl.float32)
    best = (none, tl.zeros((BLOCK_PLACES,), tl.int32), none)
    top, mass = none, tl.zeros((BLOCK_PLACES,), tl.float32)
    for first in range(span * _SPAN, tl.minimum(span * _SPAN + _SPAN, CODES), BLOCK_CODES):
        code = first + tl.arange(0, BLOCK_CODES)
        logits = tl.zeros((BLOCK_PLACES, BLOCK_CODES), tl.float32)
        for start in range(0, INPUTS, BLOCK_INPUTS):
            sums = operand(total, first_row, start, end, INPUTS, DESCRIBED, BLOCK_PLACES, BLOCK_INPUTS)
            head = operand(weight, first, start, CODES, INPUTS, DESCRIBED, BLOCK_CODES, BLOCK_INPUTS)
            logits = multiply(sums, head.T, logits, PRECISION)
        if bias is not None:
            logits += tl.load(bias + code, code < CODES, 0.0).to(tl.float32)[None, :]
        logits = tl.where((code < CODES)[None, :], logits, _MINUS_INFINITY)

        top, mass, shift = add_mass(top, mass, tl.max(logits, axis=1))
        mass += tl.sum(tl.exp(logits - shift[:, None]), axis=1)

        block = first // 4 + tl.arange(0, BLOCKS)
        words = token_words(seed, step, place[:, None], block[None, :])
        parts = _by_word(logits, BLOCK_PLACES, BLOCKS)
        codes = 4 * block[None, :] + tl.zeros((BLOCK_PLACES, BLOCKS), tl.int32)
        chosen = (parts[0] + temperature * gumbel(words[0]), codes, parts[0])
        for word in tl.static_range(1, 4):
            value = parts[word] + temperature * gumbel(words[word])
            chosen = better(chosen, (value, codes + word, parts[word]))
        value = tl.max(chosen[0], axis=1)
        token = tl.min(tl.where(chosen[0] == value[:, None], chosen[1], CODES - 1), axis=1)
        logit = tl.max(tl.where(chosen[1] == token[:, None], chosen[2], _MINUS_INFINITY), axis=1)
        best = better(best, (value, token, logit))

    at = partials + (picture * tl.num_programs(1) + span).to(tl.int64) * positions + entry
    tl.store(at, best[0], live)
    tl.store(at + plane, best[1].to(tl.float32), live)
    tl.store(at + 2 * plane, best[2], live)
    tl.store(at + 3 * plane, top + tl.log(mass), live)


def calls(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    canvases: Canvases,
    schedules: Schedules,
    mask_id: int,
    architecture: str,
) -> tuple[Call, Call, Call]:
    """Blend, draw and reveal, with what passes from one to the other."""
    codes, inputs = weight.shape
    pictures, positions = canvases.places.shape
    steps, branches = schedules.weights.shape[1:]
    spans = ceil_div(codes, SPAN)
    assert codes < 1 << 24, "a code passes as an fp32 number"
    assert hidden.stride(2) == weight.stride(1) == 1, "inputs lie side by side"
    assert canvases.rows.shape == (pictures, branches)
    assert schedules.masked_after.shape == schedules.token_temperature.shape == (pictures, steps)
    assert schedules.choice_temperature.shape == (pictures, steps)
    stated = [getattr(each, name) for each in (canvases, schedules) for name in each.__dataclass_fields__]
    # Branches may be the front of more.
    packed = [tensor for tensor in stated if tensor is not canvases.rows and tensor is not schedules.weights]
    assert all(tensor.is_contiguous() for tensor in packed)
    assert canvases.rows.stride(1) == schedules.weights.stride(2) == 1, "branches lie side by side"
    assert pictures == 1 or schedules.weights.stride(0) == steps * schedules.weights.stride(1)

    total, weight = weight.new_empty(pictures * positions, inputs), weight.contiguous()
    partials = torch.empty(4, pictures, spans, positions, device=hidden.device)
    state: dict[str, Tensor | int] = {
        "steps": canvases.steps, "counts": canvases.counts, "places": canvases.places, "schedule": steps,
        "positions": positions,
    }  # fmt: skip
    branched: dict[str, Tensor | int] = {"rows": canvases.rows, "rows_picture": canvases.rows.stride(0)}
    left: dict[str, Tensor | int] = {"seeds": canvases.seeds, "partials": partials, "plane": partials.stride(0)}
    follows = {"DEPENDENT": dependent(architecture)}
    blend = Call(
        _blend_kernel,
        {"hidden": hidden, "weights": schedules.weights, "total": total, "hidden_row": hidden.stride(0),
         "hidden_place": hidden.stride(1), "weights_step": schedules.weights.stride(1), **state, **branched},
        {"BRANCHES": branches, "INPUTS": inputs, "PADDED": power_of_two(inputs), **follows},
        lambda tiles: (ceil_div(positions, tiles["BLOCK_PLACES"]), pictures),
    )  # fmt: skip
    described = architecture not in ("sm_80", "gfx942") and describable(total) and describable(weight)
    draw = Call(
        _draw_kernel,
        {"total": Described(total, ("BLOCK_PLACES", "BLOCK_INPUTS")) if described else total,
         "weight": Described(weight, ("BLOCK_CODES", "BLOCK_INPUTS")) if described else weight, "bias": bias,
         "temperatures": schedules.token_temperature, **state, **left},
        {"INPUTS": inputs, "CODES": codes, "DESCRIBED": described, "PRECISION": precision(architecture), **follows},
        lambda tiles: (ceil_div(positions, tiles["BLOCK_PLACES"]), spans, pictures),
    )  # fmt: skip
    reveal = Call(
        reveal_kernel,
        {"masked_after": schedules.masked_after, "temperatures": schedules.choice_temperature,
         "raw_logit": schedules.raw_logit, "drawn": canvases.tokens, "inputs": canvases.inputs,
         "spans": spans, "mask_id": mask_id, **state, **branched, **left},
        {"BRANCHES": branches, **follows},
        lambda tiles: (pictures,),
    )  # fmt: skip
    return blend, draw, reveal


def _nothing(*_: object) -> None:
    """What the operator returns: it changes the pictures' state in place."""


@operator(
    "decoding_step(Tensor hidden, Tensor weight, Tensor? bias, int mask_id, Tensor seeds, Tensor rows, "
    "Tensor(a!) steps, Tensor(b!) counts, Tensor(c!) places, Tensor(d!) tokens, Tensor(e!) inputs, "
    "Tensor masked_after, Tensor token_temperature, Tensor choice_temperature, Tensor weights, Tensor raw_logit) -> ()",
    fake=_nothing,
)
def _decoding_step(hidden: Tensor, weight: Tensor, bias: Tensor | None, mask_id: int, *state: Tensor) -> None:
    canvases, schedules = Canvases(*state[:7]), Schedules(*state[7:])
    architecture = family(hidden.device)
    blend, draw, reveal = calls(hidden, weight, bias, canvases, schedules, mask_id, architecture)
    inputs, positions = weight.shape[1], canvases.places.shape[1]
    blend.run(pick("blend", f"{inputs} inputs", hidden.device, blend_choices(inputs)))
    problem = f"{weight.shape[0]} x {inputs} {str(weight.dtype).removeprefix('torch.')}"
    draw.run(pick("decoding_step", problem, hidden.device, choices(architecture, weight.dtype)))
    reveal.run(pick("reveal", f"{positions} positions", hidden.device, reveal_choices(positions)))


def decoding_step(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    canvases: Canvases,
    schedules: Schedules,
    mask_id: int,
    *,
    kernels: Kernels = REFERENCE,
) -> None:
    """Draw, score and mask again in every picture, in place; see the module's docstring.

    Args:
        hidden: (R, N, D), of any number format.
        weight, bias: (V, D) and (V,), the head.
        mask_id: the token that stands for a masked position.
    """
    if STEP not in kernels.triton:
        decoding_step_reference(hidden, weight, bias, canvases, schedules, mask_id)
        return
    forward_only(hidden, weight, bias)
    state = [getattr(canvases, name) for name in Canvases.__dataclass_fields__]
    numbers = [getattr(schedules, name) for name in Schedules.__dataclass_fields__]
    _decoding_step(hidden, weight, bias, mask_id, *state, *numbers)


def specimens(architecture: str) -> Iterator[Specimen]:
    """Every way the kernels are compiled: heads of aMUSEd and of StyleDrop-PyTorch, grids up to 64 x 64."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    def launches(
        dtype: torch.dtype, branches: int, positions: int, codes: int, inputs: int, biased: bool
    ) -> tuple[Call, Call, Call]:
        pictures, steps, rows, index = 2, 12, 2 * branches, torch.int32
        canvases = Canvases(
            seeds=empty(pictures, dtype=torch.int64), rows=empty(pictures, branches, dtype=index),
            steps=empty(pictures, dtype=index), counts=empty(pictures, dtype=index),
            places=empty(pictures, positions, dtype=index), tokens=empty(pictures, positions, dtype=torch.int64),
            inputs=empty(rows, positions, dtype=torch.int64),
        )  # fmt: skip
        schedules = Schedules(
            masked_after=empty(pictures, steps, dtype=index), token_temperature=empty(pictures, steps),
            choice_temperature=empty(pictures, steps), weights=empty(pictures, steps, branches),
            raw_logit=empty(pictures, dtype=torch.bool),
        )  # fmt: skip
        bias = empty(codes, dtype=dtype) if biased else None
        hidden, weight = empty(rows, positions, inputs, dtype=dtype), empty(codes, inputs, dtype=dtype)
        return calls(hidden, weight, bias, canvases, schedules, codes, architecture)

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        for branches in (1, 2, 3, 5):
            blend, _, _ = launches(dtype, branches, 256, 8192, 768, False)
            yield Specimen(f"blend, {branches} branches, {name}", blend, blend_choices(768), matrix=False)
        for what, codes, inputs in (("draw", 8192, 768), ("draw with bias", 1024, 1152)):
            _, draw, _ = launches(dtype, 2, 256, codes, inputs, what != "draw")
            yield Specimen(f"{what}, {name}", draw, choices(architecture, dtype), matrix=True)
    for side in (8, 16, 32, 64):
        _, _, reveal = launches(torch.bfloat16, 3, side * side, 8192, 768, False)
        yield Specimen(f"reveal, {side} x {side}", reveal, reveal_choices(side * side), matrix=False)
