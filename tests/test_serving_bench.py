"""``stylemuse bench serve`` and ``bench soak``: their counts are right, and a fault is found."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from command_line import Run
from live_server import ADMIN_TOKEN, serving

from stylemuse.bench import client, measure, soak
from stylemuse.bench import serving as bench


def test_the_document(run: Run) -> None:
    arguments = "--dtype float32 --requests 4 --steps 2 --styles 2 --loads 1 20 --max-requests 3 --bound 60"
    ran = run("bench", "serve", *arguments.split())
    assert ran.code == 0, ran.error
    document: dict[str, Any] = json.loads(ran.out.splitlines()[-1])
    measure.check(document)
    rows = document["serve"]
    assert [row["name"] for row in rows] == ["SingleStream", "Offline", "Server, 1 x capacity", "Server, 20 x capacity"]
    assert [row["requests"] for row in rows] == [4, 4, 4, 80]
    assert all(sum(row["outcomes"].values()) == row["requests"] for row in rows)
    assert rows[-1]["outcomes"]["refused"] == len(rows[-1]["refusal"]["seconds"]) > 0
    assert max(row["to_peak"] for row in rows[2:]) == 1.0


def test_a_server_is_measured_too(tiny_model: Path) -> None:
    with serving(tiny_model) as live:
        draw = bench.on_server(live.url, [None, "ink", "nope"], 2, 0, None)
        ends, _ = asyncio.run(bench.closed(draw, 6, 2))
    assert sorted(outcome for outcome, _ in ends) == ["done"] * 4 + ["failed"] * 2


def test_goodput_counts_what_is_done_in_time() -> None:
    ends = [("done", 0.1), ("done", 0.3), ("refused", 0.001), ("failed", 0.1)]
    row = bench.row("Server", ends, 2.0, 0.2)
    assert (row["throughput"], row["goodput"]) == (1.0, 0.5)
    assert row["outcomes"] == {"done": 2, "refused": 1, "failed": 1}
    assert "skipped" in bench.row("Server", [("failed", 0.1)], 1.0, None)


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

        ends, _ = await asyncio.wait_for(bench.opened(draw, 20, 1000.0, 0), 60)
        assert len(ends) == 20

    asyncio.run(run())


def test_a_soak_finds_faults(tiny_model: Path) -> None:
    with serving(tiny_model) as live:
        process = client.Process(live.url, live.admin, ADMIN_TOKEN, 1)
        run = soak.Soak(process, ["ink", "nope"], 2, 0)
        run.outcomes["drawn"] = 1
        row = run.report(60.0)
        assert row["problems"] == ["1 requests were sent, 0 ended, 0.0 are still in"]
        bad = client.Answer(200, b'{"data": [{"seed": 3}]}')
        assert run._judge("drawn", bad, 3) is None
        assert run._judge("drawn", bad, 4) == "drawn: pictures of seeds [3] for 4"
        assert run._judge("malformed", client.Answer(500, b""), 0) == "malformed: answered 500"
        for body in soak.MALFORMED_BODIES:
            answer = client.send(live.url, "POST", client.GENERATIONS, body)
            assert run._judge("malformed", answer, 0) is None, (body, answer)


@pytest.mark.slow
def test_a_short_soak(run: Run) -> None:
    ran = run("bench", "soak", *["--minutes", "0.2", "--clients", "3", "--steps", "2", "--dtype", "float32"])
    assert ran.code == 0, ran.error
    document: dict[str, Any] = json.loads(ran.out.splitlines()[-1])
    measure.check(document)
    (row,) = document["serve"]
    assert row["problems"] == []
    assert row["swaps"] >= 5
    # "gone": its style was unloaded between the client's choice and the request; whether that happens is chance.
    assert set(row["outcomes"]) - {"gone"} == {"drawn", "cancelled", "malformed"}
