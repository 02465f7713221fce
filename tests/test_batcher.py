"""The order of turns: shares by weight, nobody waits for ever, never more than a pass holds."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, cast

import pytest

from stylemuse.decoding.canvas import Canvas
from stylemuse.engine.batcher import QUANTUM, Batcher, Entry, Turn


@dataclass
class Picture:
    """A canvas as far as the batcher looks at it."""

    count: int
    step: int = 0

    @property
    def steps(self) -> range:
        return range(self.count)

    @property
    def finished(self) -> bool:
        return self.step == self.count


def submit(batcher: Batcher, demand: int = 1, pictures: int = 1, steps: int = 4, weight: float = 1.0) -> Entry:
    entry = Entry(demand, pictures, steps, weight)
    batcher.wait(entry)
    return entry


def prepare(batcher: Batcher) -> None:
    while entries := batcher.to_prepare(3, lambda _: True):
        for entry in entries:
            batcher.ready(entry, [cast(Canvas, Picture(entry.steps)) for _ in range(entry.pictures)])


def step(batcher: Batcher) -> tuple[list[Turn], list[Entry]]:
    """Everything that can be prepared is, then one step."""
    prepare(batcher)
    turns = batcher.next()
    assert sum(turn.entry.demand for turn in turns) <= batcher.capacity
    for turn in turns:
        cast(Any, turn.canvas).step += 1
    return turns, batcher.stepped(turns)


def run(batcher: Batcher) -> list[Entry]:
    """Entries in the order they finish."""
    finished: list[Entry] = []
    while (done := step(batcher))[0]:
        finished += done[1]
    return finished


def test_equal_requests_finish_as_they_came() -> None:
    batcher = Batcher(3)
    entries = [submit(batcher) for _ in range(10)]
    assert run(batcher) == entries


def test_a_newcomer_joins_at_the_next_step_and_a_finished_one_leaves() -> None:
    batcher = Batcher(4)
    first = submit(batcher, steps=3)
    assert [turn.entry for turn in step(batcher)[0]] == [first]
    second = submit(batcher, steps=3)
    assert [turn.entry for turn in step(batcher)[0]] == [first, second]
    assert step(batcher)[1] == [first]
    assert [turn.entry for turn in step(batcher)[0]] == [second]


def test_quick_ones_are_prepared_together_and_others_alone() -> None:
    batcher = Batcher(8)
    quick = [submit(batcher) for _ in range(4)]
    slow = submit(batcher)
    last = [submit(batcher) for _ in range(3)]
    found = []
    while entries := batcher.to_prepare(3, lambda entry: entry is not slow):
        found.append(entries)
        for entry in entries:
            batcher.ready(entry, [cast(Canvas, Picture(entry.steps))])
    assert found == [quick[:3], quick[3:], [slow], last]


def test_those_being_prepared_count_as_prepared() -> None:
    """No more are taken at once than one after the other: a pass's worth of those that come first."""
    batcher = Batcher(2)
    entries = [submit(batcher) for _ in range(9)]
    assert batcher.to_prepare(8, lambda _: True) == entries[:2]


def test_a_small_request_overtakes_the_later_pictures_of_a_large_one() -> None:
    batcher = Batcher(4)
    large = submit(batcher, demand=2, pictures=100)
    for _ in range(3):
        step(batcher)
    small = submit(batcher)
    finished = run(batcher)
    assert finished == [small, large]


def test_a_long_one_steps_aside() -> None:
    """One row, a thousand steps: a short one waits for one turn of it, not for all."""
    batcher = Batcher(1)
    long = submit(batcher, steps=1000)
    step(batcher)
    short, count = submit(batcher), 0
    while not short.left or short.left:
        finished = step(batcher)[1]
        count += 1
        if short in finished:
            break
    assert count <= QUANTUM + 4
    assert run(batcher) == [long]


@pytest.mark.parametrize("priority", [1, 3])
def test_shares_follow_the_weights(priority: int) -> None:
    """Two large requests on one row: steps done go by the weights."""
    batcher, done = Batcher(1), {1.0: 0, 2.0**priority: 0}
    for weight in done:
        submit(batcher, pictures=200, steps=4, weight=weight)
    for _ in range(400):
        for turn in step(batcher)[0]:
            done[turn.entry.weight] += 1
    assert done[2.0**priority] / done[1.0] == pytest.approx(2.0**priority, rel=0.1)


def test_none_waits_for_ever_behind_a_stream_of_others() -> None:
    """A large, unimportant one against an endless stream of small, important ones."""
    batcher = Batcher(4)
    large, finished = submit(batcher, demand=4, weight=2.0**-4), list[Entry]()
    while large not in finished:
        assert len(finished) < 5000
        submit(batcher, weight=16.0)
        finished += step(batcher)[1]
    assert len(finished) > 4, "and yet behind them"


def test_an_ended_request_leaves_at_once() -> None:
    batcher = Batcher(1)
    entries = [submit(batcher, pictures=2) for _ in range(3)]
    step(batcher)
    assert batcher.end(entries[0])
    assert not batcher.end(entries[1])
    assert batcher.purge() == [entries[0]]
    assert {id(turn.entry) for turn in step(batcher)[0]} == {id(entries[2])}
    assert run(batcher) == [entries[2]]
    assert batcher.load == batcher.waiting == 0


@pytest.mark.parametrize("seed", range(5))
def test_every_request_finishes_exactly_once(seed: int) -> None:
    choice, batcher, entries, finished = random.Random(seed), Batcher(12), list[Entry](), list[Entry]()
    ended: set[int] = set()
    for _ in range(300):
        if choice.random() < 0.5:
            pick = choice.randint
            entries.append(submit(batcher, pick(1, 12), pick(1, 5), pick(1, 70), 2.0 ** pick(-4, 4)))
        if entries and choice.random() < 0.1:
            entry = choice.choice(entries)
            if entry not in finished:
                batcher.end(entry)
                ended.add(id(entry))
                batcher.purge()
        finished += step(batcher)[1]
    finished += run(batcher)
    assert len(finished) == len({id(entry) for entry in finished})
    assert {id(entry) for entry in finished} == {id(entry) for entry in entries} - ended
