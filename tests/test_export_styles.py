"""The tables of a running export: what a step is given is of one moment."""

from __future__ import annotations

import threading

import numpy as np

from stylemuse.export.run import styles
from stylemuse.export.run.spec import Tensor

SITES = [f"layer{index}.to_q" for index in range(40)]
INPUTS = [
    each
    for site in SITES
    for each in (
        Tensor(f"{site}.down", "float32", ("slots", 24, "lanes_1")),
        Tensor(f"{site}.up", "float32", ("slots", "lanes_1", 24)),
    )
]


def packed(rank: int, value: float) -> dict[str, np.ndarray]:
    shapes = {".down": (24, rank), ".up": (rank, 24)}
    return {f"{site}{side}": np.full(shape, value, np.float32) for site in SITES for side, shape in shapes.items()}


def test_a_step_sees_tables_of_one_rank() -> None:
    """A thread widens them while another asks for them."""
    names, torn = frozenset(each.name for each in INPUTS), list[set[int]]()
    for _ in range(3):
        bank, ended = styles.make("bank", INPUTS, 2, None), threading.Event()

        def look(bank: styles.Styles = bank, ended: threading.Event = ended) -> None:
            while not ended.is_set():
                given = bank.feeds(names, [0], [1.0])
                ranks = {given[f"{site}.up"].shape[1] for site in SITES}
                ranks |= {given[f"{site}.down"].shape[2] for site in SITES}
                if len(ranks) > 1:
                    torn.append(ranks)

        reader = threading.Thread(target=look)
        reader.start()
        for rank in range(2, 40):
            bank.write(0, "ink", packed(rank, rank))
        ended.set()
        reader.join()
    assert not torn


def test_two_threads_write_two_slots() -> None:
    """Each of its own rank: no row of one is lost where the other widens the tables."""
    names = frozenset(each.name for each in INPUTS)
    for _ in range(5):
        bank = styles.make("bank", INPUTS, 8, None)
        writers = [
            threading.Thread(target=bank.write, args=(slot, f"s{slot}", packed(slot + 1, slot + 1)))
            for slot in range(8)
        ]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        given = bank.feeds(names, [0], [1.0])
        for name in names:
            sums = given[name].sum(axis=(1, 2))
            assert sums.tolist() == [0.0] + [24.0 * (slot + 1) ** 2 for slot in range(8)]
