"""The end of a decoding step, a program for each picture: join the spans of the draw, score, mask again.

See `decoding_step`, whose third kernel this is.
"""

from __future__ import annotations

from .device import follow
from .dispatch import constant, jit, tl
from .noise import position_gumbel
from .tuning import Launch, power_of_two

_MINUS_INFINITY = constant(float("-inf"))
_NO_CODE = constant(float(1 << 24))


def reveal_choices(places: int) -> tuple[Launch, ...]:
    """The launches of the revealing program for grids of so many positions: a whole grid lies in its registers.

    So do several spans of it while they are joined, and the counts of a digit: `BITS` of the confidence at a time.
    """
    block = power_of_two(places)
    bits = 4 if block <= 256 else 2 if block <= 1024 else 1
    return (_revealing(block, max(1, min(16, 4096 // block)), bits, max(1, min(8, block // 32))),)


def _revealing(places: int, spans: int, bits: int, warps: int) -> Launch:
    return Launch({"BLOCK_PLACES": places, "BLOCK_SPANS": spans, "BITS": bits}, warps, 1)


@jit
def better(best: tl.tuple, other: tl.tuple) -> tl.tuple:
    """Of two (value, code, logit) the one of the larger value; the first where they are equal."""
    larger = other[0] > best[0]
    return (
        tl.where(larger, other[0], best[0]),
        tl.where(larger, other[1], best[1]),
        tl.where(larger, other[2], best[2]),
    )


@jit
def add_mass(top: tl.tensor, mass: tl.tensor, other: tl.tensor) -> tl.tuple:
    """A running sum mass * exp(top) rescaled to the larger of top and other: (top, mass, finite top to subtract)."""
    higher = tl.maximum(top, other)
    shift = tl.where(higher == _MINUS_INFINITY, 0.0, higher)
    return higher, mass * tl.exp(top - shift), shift


@jit
def reveal_kernel(
    partials: tl.tensor,
    rows: tl.tensor,
    masked_after: tl.tensor,
    temperatures: tl.tensor,
    raw_logit: tl.tensor,
    seeds: tl.tensor,
    steps: tl.tensor,
    counts: tl.tensor,
    places: tl.tensor,
    drawn: tl.tensor,
    inputs: tl.tensor,
    rows_picture: tl.tensor,
    schedule: tl.tensor,
    positions: tl.tensor,
    spans: tl.tensor,
    plane: tl.tensor,
    mask_id: tl.tensor,
    BRANCHES: tl.constexpr,
    DEPENDENT: tl.constexpr,
    BLOCK_PLACES: tl.constexpr,
    BLOCK_SPANS: tl.constexpr,
    BITS: tl.constexpr,
) -> None:
    """One picture: join its spans, score, choose what is masked again, and end the step."""
    follow(DEPENDENT)
    picture = tl.program_id(0)
    count = tl.load(counts + picture)
    if count == 0:
        return
    step = tl.load(steps + picture)
    seed = tl.load(seeds + picture)
    now = picture * schedule + step
    entry = tl.arange(0, BLOCK_PLACES)
    live = entry < count
    place = tl.load(places + picture * positions + entry, live, 0)

    none = tl.full((BLOCK_PLACES,), _MINUS_INFINITY, tl.float32)
    best = (none, tl.zeros((BLOCK_PLACES,), tl.float32), none)
    top, mass = none, tl.zeros((BLOCK_PLACES,), tl.float32)
    for first in range(0, spans, BLOCK_SPANS):
        span = first + tl.arange(0, BLOCK_SPANS)
        inside = (span < spans)[:, None] & live[None, :]
        at = partials + (picture * spans + span).to(tl.int64)[:, None] * positions + entry[None, :]
        values, codes = tl.load(at, inside, _MINUS_INFINITY), tl.load(at + plane, inside, _NO_CODE)
        logits = tl.load(at + 2 * plane, inside, _MINUS_INFINITY)
        log_masses = tl.load(at + 3 * plane, inside, _MINUS_INFINITY)
        value = tl.max(values, axis=0)
        # Of equal ones the lowest code; codes of spans that are not there are beyond all.
        code = tl.min(tl.where(values == value[None, :], codes, _NO_CODE), axis=0)
        logit = tl.max(tl.where(codes == code[None, :], logits, _MINUS_INFINITY), axis=0)
        best = better(best, (value, code, logit))
        top, mass, shift = add_mass(top, mass, tl.max(log_masses, axis=0))
        mass += tl.sum(tl.exp(log_masses - shift[None, :]), axis=0)
    token = best[1].to(tl.int64)

    score = best[2] - tl.where(tl.load(raw_logit + picture), 0.0, top + tl.log(mass))
    confidence = score + tl.load(temperatures + now) * position_gumbel(seed, step, place)
    # As unsigned numbers in the order of the confidences; both zeros are one.
    bits = tl.where(confidence == 0.0, 0.0, confidence).to(tl.int32, bitcast=True)
    key = (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)
    wanted = tl.minimum(tl.load(masked_after + now), count)
    # The largest number with fewer than `wanted` keys below it, digit by digit.
    threshold = tl.zeros((1,), tl.uint32)
    digit = tl.arange(0, 1 << BITS).to(tl.uint32)
    for shift in tl.static_range(32 - BITS, -1, -BITS):
        candidate = threshold | (digit << shift)
        below = tl.sum((live[None, :] & (key[None, :] < candidate[:, None])).to(tl.int32), axis=1)
        threshold |= tl.max(tl.where(below < wanted, digit, 0), axis=0) << shift
    below = live & (key < threshold)
    equal = (live & (key == threshold)).to(tl.int32)
    left = wanted - tl.sum(below.to(tl.int32), axis=0)
    again = below | ((equal > 0) & (tl.cumsum(equal, axis=0) <= left))

    # All threads have read the picture's state before any of it is written.
    tl.debug_barrier()
    order = tl.cumsum(again.to(tl.int32), axis=0) - 1
    tl.store(places + picture * positions + order, place, again)
    tl.store(drawn + picture * positions + place, token, live)
    for branch in tl.static_range(BRANCHES):
        row = tl.load(rows + picture * rows_picture + branch)
        seen = inputs + row.to(tl.int64) * positions + place
        tl.store(seen, tl.where(again, mask_id, token), live & (entry * 0 + row >= 0))
    tl.store(counts + picture, wanted)
    tl.store(steps + picture, step + 1)
