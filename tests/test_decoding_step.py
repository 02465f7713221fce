"""The decoding step's kernels against plain torch: state equal, scores near, nothing of a neighbour's read."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import DEVICE
from pictures import Batch, random_batch
from scipy.stats import chisquare
from torch import Tensor

from stylemuse.kernels import sampling
from stylemuse.kernels.canvases import Canvases, Schedules
from stylemuse.kernels.decoding_step import SPAN, blend_choices, calls, choices
from stylemuse.kernels.dispatch import triton_kernels
from stylemuse.kernels.tuning import family

KERNELS = triton_kernels(DEVICE)

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}
"""Of logits, relative to the largest of |h| |w|: fp32 sums up to 100 products, each rounded at 2^-24; in half precision
the products are exact, and the branches' sum may round to the other neighbour (2^-9, 2^-12) in another order."""


def same(one: Batch, other: Batch) -> None:
    """Asserts that two batches stand at the same place, bit for bit."""
    left, right = one.state(), other.state()
    for name in left:
        assert torch.equal(left[name].cpu(), right[name].cpu()), name


def drawn(batch: Batch) -> Tensor:
    """What the draw leaves for every listed position: (4, B, spans, N) fp32; all else is NaN."""
    blend, draw, _ = calls(*batch, len(batch.weight), family(DEVICE))
    blend.run(blend_choices(batch.weight.shape[1])[0])
    draw.arguments["partials"].fill_(torch.nan)
    draw.run(choices(family(DEVICE), batch.weight.dtype)[0])
    return draw.arguments["partials"]


@pytest.mark.parametrize(
    ("counts", "positions", "codes", "inputs", "branches", "bias"),
    [
        ([1], 1, 1, 1, 1, False),
        ([7, 3], 7, 3, 5, 2, True),
        ([16, 0, 1], 35, 50, 33, 3, False),
        ([77, 20], 77, SPAN + 1, 40, 2, True),
        ([5, 33], 256 + 77, 2 * SPAN + 99, 64, 5, False),
    ],
)
def test_a_step_is_that_of_plain_torch(
    counts: list[int], positions: int, codes: int, inputs: int, branches: int, bias: bool
) -> None:
    batch = random_batch(
        counts, positions=positions, codes=codes, inputs=inputs, branches=branches, bias=bias, seed=positions
    )
    ours = batch.to(DEVICE)
    before = batch.copy()
    batch.step()
    ours.step(KERNELS)
    same(ours, batch)
    for picture, count in enumerate(counts):
        step = int(before.canvases.steps[picture])
        after = int(before.schedules.masked_after[picture, step]) if count else 0
        assert int(batch.canvases.counts[picture]) == after
        assert int(batch.canvases.steps[picture]) == step + (count > 0)
        listed = batch.canvases.places[picture, :after].tolist()
        assert listed == sorted(set(listed) & set(before.canvases.places[picture, :count].tolist()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_best_code_and_the_mass_in_every_number_format(dtype: torch.dtype) -> None:
    """In float64, from the branches' sum rounded as the product takes it: values, logits, codes, log-sum-exp."""
    counts, codes, inputs = [35, 11, 30], SPAN + 43, 65
    batch = random_batch(counts, positions=35, codes=codes, inputs=inputs, branches=3, dtype=dtype, bias=True)
    value, code, logit, log_mass = drawn(batch.to(DEVICE)).cpu()
    canvases, schedules = batch.canvases, batch.schedules
    for picture, count in enumerate(counts):
        step, places = int(canvases.steps[picture]), canvases.places[picture, :count].long()
        total = torch.zeros(count, inputs)
        for row, weight in zip(canvases.rows[picture].tolist(), schedules.weights[picture, step], strict=True):
            total = total + weight * batch.hidden[row, places].float() if weight else total
        exact = total.to(dtype).double() @ batch.weight.double().T + batch.bias.double()
        seeds = canvases.seeds[picture].expand(count)
        noise = sampling.token_gumbel(codes, seeds, torch.full((count,), step), places).double()
        noisy = exact + schedules.token_temperature[picture, step].double() * noise
        scale = float(total.norm(dim=1).max() * batch.weight.float().norm(dim=1).max())
        close = {"rtol": 0.0, "atol": TOLERANCE[dtype] * scale + 4e-6 * 17}
        for span in range(2):
            part = slice(span * SPAN, min((span + 1) * SPAN, codes))
            chosen = code[picture, span, :count].long()
            assert ((chosen >= part.start) & (chosen < part.stop)).all()
            for found, expected in (
                (value[picture, span, :count], noisy[:, part].amax(1)),
                (value[picture, span, :count], noisy.gather(1, chosen[:, None])[:, 0]),
                (logit[picture, span, :count], exact.gather(1, chosen[:, None])[:, 0]),
                (log_mass[picture, span, :count], exact[:, part].logsumexp(1)),
            ):
                torch.testing.assert_close(found.double(), expected, **close)
        assert value[picture, :, count:].isnan().all(), "a position that is known was drawn"


def test_a_picture_does_not_notice_its_neighbours() -> None:
    """Bitwise: alone, in another order, and with as many branches as it has."""
    batch = random_batch([35, 0, 20, 9], positions=35, codes=SPAN + 10, inputs=30, branches=3).to(DEVICE)
    partials = drawn(batch)
    for picture, branches in ((0, 3), (2, 3), (2, 1), (3, 3)):
        alone = batch.pick([picture], branches)
        assert torch.equal(drawn(alone).nan_to_num(7.0), partials[:, [picture]].nan_to_num(7.0))
    order = [3, 0, 2, 1]
    shuffled, together = batch.pick(order), batch.copy()
    shuffled.step(KERNELS)
    together.step(KERNELS)
    for name, value in together.state().items():
        assert torch.equal(value if name == "inputs" else value[order], shuffled.state()[name]), name


def test_tokens_follow_softmax() -> None:
    """Equal logits everywhere, one position a draw; tau = 0.7."""
    codes, draws, tau = 7, 1024, 0.7
    batch = random_batch([draws], positions=draws, codes=codes, inputs=3, branches=1, steps=1)
    batch.hidden[:] = torch.tensor([0.3, -0.4, 0.5])
    batch.schedules.weights[:], batch.schedules.token_temperature[:] = 1.0, tau
    batch = batch.to(DEVICE)
    batch.step(KERNELS)
    logits = batch.hidden[0, 0].double() @ batch.weight.double().T
    expected = (logits / tau).softmax(-1).cpu() * draws
    assert expected.min() > 5
    assert chisquare(batch.canvases.tokens[0].cpu().bincount(minlength=codes), expected).pvalue > 1e-4


def test_ties_and_excluded_codes() -> None:
    """The lowest of equal codes; a code whose bias is -inf never, even where a whole span has none other."""
    codes = 2 * SPAN
    batch = random_batch([9], positions=9, codes=codes, inputs=4, branches=1, steps=1, bias=True)
    batch.hidden[:], batch.schedules.token_temperature[:] = 0.0, 0.0
    batch.bias[:], batch.bias[[SPAN + 7, SPAN + 90, SPAN + 5]] = -torch.inf, torch.tensor([2.0, 2.0, 1.0])
    ours = batch.to(DEVICE)
    batch.step()
    ours.step(KERNELS)
    same(ours, batch)
    assert (batch.canvases.tokens == SPAN + 7).all()


def levels(rows: list[list[float]], counts: list[int], after: list[int]) -> Batch:
    """Pictures whose confidences are given: one code, whose raw logit is the hidden state."""
    size, pictures = len(rows[0]), len(rows)
    zeros = torch.zeros(pictures, 1)
    canvases = Canvases(
        seeds=torch.arange(pictures),
        rows=torch.arange(pictures, dtype=torch.int32)[:, None],
        steps=torch.zeros(pictures, dtype=torch.int32),
        counts=torch.tensor(counts, dtype=torch.int32),
        places=torch.arange(size, dtype=torch.int32).expand(pictures, -1).clone(),
        tokens=torch.full((pictures, size), -1),
        inputs=torch.full((pictures, size), 1),
    )
    masked = torch.tensor(after, dtype=torch.int32)[:, None]
    schedules = Schedules(masked, zeros, zeros, zeros[..., None] + 1.0, torch.ones(pictures, dtype=torch.bool))
    return Batch(torch.tensor(rows)[..., None], torch.ones(1, 1), None, canvases, schedules)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_exactly_the_least_confident_are_masked_again(data: st.DataObject) -> None:
    """Many ties, both zeros, the ends of fp32: as sorting (confidence, place) by hand."""
    pictures, size = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 40))
    number = st.sampled_from([-3e38, -2.0, -1.0, -1e-40, -0.0, 0.0, 1e-40, 1.0, 3e38])
    rows = [[data.draw(number) for _ in range(size)] for _ in range(pictures)]
    counts = [data.draw(st.integers(0, size)) for _ in range(pictures)]
    after = [data.draw(st.integers(0, count)) for count in counts]
    batch = levels(rows, counts, after).to(DEVICE)
    batch.step(KERNELS)
    for row, count, masked, found in zip(rows, counts, after, batch.canvases.places.tolist(), strict=True):
        by_hand = sorted(sorted(range(count), key=lambda place, row=row: (row[place], place))[:masked])
        assert found[:masked] == by_hand
    assert batch.canvases.counts.tolist() == after
    seen, drawn_at = batch.canvases.inputs.cpu(), batch.canvases.tokens.cpu()
    for picture, (count, places) in enumerate(zip(counts, batch.canvases.places.tolist(), strict=True)):
        known = set(range(count)) - set(places[: after[picture]])
        assert {place for place in range(size) if drawn_at[picture, place] == 0} == set(range(count))
        assert {place for place in range(size) if seen[picture, place] == 0} == known


@settings(max_examples=10, deadline=None)
@given(
    counts=st.lists(st.integers(0, 21), min_size=1, max_size=3),
    codes=st.integers(1, SPAN + 20),
    inputs=st.integers(1, 70),
    branches=st.integers(1, 4),
    seed=st.integers(0, 10**6),
)
def test_any_shape(counts: list[int], codes: int, inputs: int, branches: int, seed: int) -> None:
    batch = random_batch(counts, positions=21, codes=codes, inputs=inputs, branches=branches, seed=seed)
    ours = batch.to(DEVICE)
    batch.step()
    ours.step(KERNELS)
    same(ours, batch)


def test_the_operator_says_what_it_changes() -> None:
    batch = random_batch([5], positions=6, codes=9, inputs=4, branches=1).to(DEVICE)
    state = [getattr(each, name) for each in batch[3:] for name in each.__dataclass_fields__]
    operator = torch.ops.stylemuse.decoding_step.default
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(operator, (*batch[:3], 9, *state), test_utils=checks)
