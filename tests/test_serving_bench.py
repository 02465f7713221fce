"""``stylemuse bench serve`` and ``bench soak``: their counts are right, and a fault is found."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from command_line import Run
from live_server import ADMIN_TOKEN, serving

from stylemuse.bench.harness import measure, targets
from stylemuse.bench.serving import client, load, soak


@pytest.mark.slow
def test_the_document(run: Run) -> None:
    """All parts, on the smallest numbers: the rows, and that each target that a server has is answered by one."""
    options = "--dtype float32 --requests 4 --clients 4 --steps 2 --styles 2 --loads 1 20 --max-requests 3 --repeats 1"
    ran = run("bench", "serve", *options.split(), "--bound", 60)
    assert ran.code == 0, ran.error
    document: dict[str, Any] = json.loads(ran.out.splitlines()[-1])
    measure.check(document)
    names = ["SingleStream", "Offline", *(f"2 requests at once {how}" for how in ("on the base", "in one style"))]
    names += ["2 requests at once in 2 styles", "Server, 1 x capacity", "Server, 20 x capacity"]
    rows = [row for row in document["serve"] if "where" in row]
    assert [row["name"] for row in rows] == [f"{where}: {name}" for where in ("engine", "server") for name in names]
    for where in ("engine", "server"):
        mine = [row for row in rows if row["where"] == where and "outcomes" in row]
        assert [row["requests"] for row in mine] == [4, 4, 4, 80]
        assert all(sum(row["outcomes"].values()) == row["requests"] for row in mine)
        assert mine[-1]["outcomes"]["refused"] == len(mine[-1]["refusal"]["seconds"]) > 0
        assert max(row["to_peak"] for row in mine[2:]) == 1.0
    law = [row["part"] for row in document["serve"] if row["scenario"] == "law"]
    assert law == ["contexts", "products", "scores", "pixels", "whole"]
    found = {target["what"]: target["value"] for target in targets.reached(targets.CPU, [document])}
    assert found["change to a resident style while an engine draws"] > 0
    assert found["what same request, same bytes costs"] > 0


def test_a_server_is_measured_too(run: Run, tiny_model: Path) -> None:
    with serving(tiny_model, max_requests=2) as live:
        draw = load.on_server(live.url, [None, "ink", "nope"], 2, 0, None)
        ends = asyncio.run(load.closed(draw, 6, 2))
        assert sorted(end.outcome for end in ends) == ["done"] * 4 + ["failed"] * 2
        options = "--requests 4 --clients 2 --steps 2 --styles 2 --loads 4 --bound 60 --repeats 1"
        ran = run("bench", "serve", "--url", live.url, *options.split())
    assert ran.code == 0, ran.error
    rows = json.loads(ran.out.splitlines()[-1])["serve"]
    assert [row["where"] for row in rows] == ["server"] * 6


def test_goodput_counts_what_is_done_in_time() -> None:
    ends = [load.End("done", 0.1, 0.1, 1.0), load.End("done", 0.3, 0.3, 1.5), load.End("refused", 0.5, 0.001, 1.5)]
    ends.append(load.End("failed", 0.1, 0.1, 2.0))
    row = load.row("Offline", ends, 0.2)
    assert (row["throughput"], row["goodput"]) == (1.0, 0.5)
    assert row["outcomes"] == {"done": 2, "refused": 1, "failed": 1}
    assert row["refusal"]["seconds"] == [0.001]
    assert "skipped" in load.row("Offline", [load.End("failed", 0.1, 0.1, 1.0)])


def test_an_open_loop_counts_what_ends_between_filling_and_draining() -> None:
    """Ten a second for ten seconds, each done a second later."""
    ends = [load.End("done", 1.0, 1.0, at / 10 + 1.0) for at in range(101)]
    row = load.row("Server", ends, 1.0)
    assert (row["throughput"], row["goodput"]) == (pytest.approx(10.0, rel=0.02),) * 2


def test_the_places_are_those_that_the_bound_allows() -> None:
    assert (load.places(10.0, 4.0), load.places(0.1, 1.0)) == (20, 1)


def test_open_loops_do_not_wait_for_answers() -> None:
    """All are sent while the first is still under way."""
    sent: list[int] = []

    async def run() -> None:
        all_sent = asyncio.Event()

        async def draw(index: int) -> str:
            sent.append(index)
            if len(sent) == 20:
                all_sent.set()
            await all_sent.wait()
            return "done"

        ends = await asyncio.wait_for(load.opened(draw, 20, 1000.0, 0), 60)
        assert len(ends) == 20

    asyncio.run(run())


def test_a_soak_finds_faults(tiny_model: Path) -> None:
    with serving(tiny_model) as live:
        process = client.Process(live.url, live.admin, ADMIN_TOKEN, 1)
        run = soak.Soak(process, ["ink", "nope"], 2, 0)
        run.outcomes["drawn"] = 1
        row = run.report(60.0)
        assert row["problems"] == ["1 requests were sent, 0 ended, 0 are still in"]
        assert (row["lost"], row["duplicated"], row["hung"]) == (1, 0, 0)
        bad = client.Answer(200, b'{"data": [{"seed": 3}]}')
        assert run._judge("drawn", bad, 3) is None
        assert run._judge("drawn", bad, 4) == "drawn: pictures of seeds [3] for 4"
        twice = client.Answer(200, b'{"data": [{"seed": 3}, {"seed": 3}]}')
        assert run._judge("drawn", twice, 3) == "drawn: pictures of seeds [3, 3] for 3"
        assert run.duplicated == 1
        assert run._judge("malformed", client.Answer(500, b""), 0) == "malformed: answered 500"
        for body in soak.MALFORMED_BODIES:
            answer = client.send(live.url, "POST", client.GENERATIONS, body)
            assert run._judge("malformed", answer, 0) is None, (body, answer)


def test_memory_after_the_warm_up() -> None:
    """What the first fifth takes does not count; then 100 bytes more every second, of 1,000,000."""
    found = soak.memory([(float(at), 10**9 if at < 20 else 10**6 + 100 * (at - 20)) for at in range(101)])
    assert (found["bytes_first"], found["bytes_last"], found["bytes_most"]) == (1_000_400, 1_007_600, 1_008_000)
    assert found["grown"] == pytest.approx(0.0072, rel=0.01)
    assert found["slope"] == pytest.approx(0.008, rel=0.01)
    assert soak.memory([])["grown"] is None


@pytest.mark.slow
def test_a_short_soak(run: Run) -> None:
    ran = run("bench", "soak", *["--minutes", "0.2", "--clients", "3", "--steps", "2", "--dtype", "float32"])
    assert ran.code == 0, ran.error
    document: dict[str, Any] = json.loads(ran.out.splitlines()[-1])
    measure.check(document)
    (row,) = document["serve"]
    assert row["problems"] == []
    assert (row["lost"], row["duplicated"], row["hung"]) == (0, 0, 0)
    assert row["adapters"]["loaded"] >= 5
    assert row["adapters"]["unloaded"] == row["adapters"]["loaded"] - 1
    # "gone": its style was unloaded between the client's choice and the request; whether that happens is chance.
    assert set(row["outcomes"]) - {"gone"} == {"drawn", "cancelled", "malformed"}
