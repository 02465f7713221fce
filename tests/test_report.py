"""``stylemuse bench report`` and ``tables``: what is shown is what was measured, and nothing comes from a network."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Run

import stylemuse as sm
from stylemuse.bench.harness import comparison, measure, plots, report, tables

ROOT = Path(__file__).resolve().parent.parent


def document(step: float = 0.2) -> dict[str, Any]:
    """One row of each kind that a plot shows, and one that could not be measured."""
    series = measure.series([step, 1.1 * step, 0.9 * step])
    parts = {part: measure.series([step / 8]) for part in plots.PARTS}
    facts = {"dtype": "float32", "batch": 1, "branches": 2}
    rows = [
        {"name": "demo, <b>batch 1</b>", **facts, "step": series, "share_of_floor": 0.5, **parts},
        {"name": "demo, many", **facts, "step": series, "share_of_floor": 0.4, "to_base": 1.03, **parts},
        {"name": "diffusers, float32", **facts, "who": "diffusers", "step": series},
        {"name": "demo, batch 64", "skipped": "no memory for it"},
    ]
    swap = {"name": "from disk", "from": "disk", "registered": 1, "wall": measure.series([0.01, 0.02])}
    return measure.document("a command", 1, torch.device("cpu"), {"bytes": 1e9}, step=rows, adapter_swap=[swap])


def write(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def test_the_page_shows_all_and_fetches_nothing() -> None:
    page = report.page({"one.json": document()})
    assert page.count("data:image/png;base64,") == len(plots.PLOTS)
    assert not re.search(r"(src|href)=.?(?!.?data:)", page), "an address"
    assert "demo, &lt;b&gt;batch 1&lt;/b&gt;" in page
    assert "<b>" not in page
    assert "no memory for it" in page
    assert "200.000" in page, "the median in milliseconds"


def test_every_plot_is_a_picture_or_nothing() -> None:
    assert [name for name, _, _ in plots.drawn([document()])] == list(plots.PLOTS)
    empty = measure.document("a command", 1, torch.device("cpu"), {}, load=[])
    assert not list(plots.drawn([empty]))
    one, again = (report.png(plots.steps([document()])) for _ in range(2))
    assert one.startswith(b"\x89PNG")
    assert one == again


def test_rows_of_one_name_stand_apart() -> None:
    axes = plots.peers([document(), document(0.3)]).axes[0]
    assert len({bar.get_y() for bar in axes.patches}) == len(axes.patches) == 2
    assert [text.get_text() for text in axes.get_yticklabels()] == ["diffusers, float32"] * 2


def test_differences_beyond_the_spread() -> None:
    rows = comparison.compare(document(0.4), document(0.2))
    verdicts = {row["name"]: row["verdict"] for row in rows if row["part"] == "step"}
    assert set(verdicts.values()) == {"slower"}
    assert {row["verdict"] for row in rows if row["kind"] == "adapter_swap"} == {"within the spread"}
    faster = comparison.compare(document(0.1), document(0.2))
    assert next(row for row in faster if row["part"] == "step")["verdict"] == "faster"
    assert {row["verdict"] for row in comparison.compare(document(), document())} == {"within the spread"}


def test_what_only_one_has_is_named() -> None:
    less = copy.deepcopy(document())
    del less["step"][0]["head"]
    assert comparison.only_in_one(less, document()) == ["step: demo, <b>batch 1</b>, head"]
    assert len(comparison.compare(less, document())) == len(comparison.compare(document(), document())) - 1


def test_the_command(run: Run, tmp_path: Path) -> None:
    write(tmp_path / "new.json", document(0.4))
    write(tmp_path / "old.json", document(0.2))
    ran = run("bench", "report", "new.json", "--against", "old.json", "--out", "seen")
    assert ran.code == 0, ran.error
    last = json.loads(ran.out.splitlines()[-1])
    assert {Path(name).name for name in last["written"]} == {"index.html", *(f"{name}.png" for name in plots.PLOTS)}
    assert all((tmp_path / name).stat().st_size > 1000 for name in last["written"])
    assert "new.json against old.json" in (tmp_path / "seen/index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("content", ["{", "[]", '{"schema": 1}', '{"schema": 99}'])
def test_what_is_no_document_is_one_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "odd.json").write_text(content, encoding="utf-8")
    with pytest.raises(sm.StylemuseError, match=r"odd\.json: not a document") as raised:
        report.read(tmp_path / "odd.json")
    assert "\n" not in str(raised.value)


def test_the_readme_agrees_with_the_results() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert tables.rendered(text) == text, "run `stylemuse bench tables`"
    assert set(re.findall(r"<!-- table: (\S+) -->", text)) == set(tables.TABLES)


def test_tables_follow_the_results(tmp_path: Path) -> None:
    found = json.loads((ROOT / "bench/results/parity.json").read_text(encoding="utf-8"))
    found["results"]["amused-256"]["logits"]["relative"] = 0.125
    write(tmp_path / "parity.json", found)
    text = "before\n<!-- table: parity -->\nold\n<!-- end -->\nafter\n"
    made = tables.rendered(text, tmp_path)
    assert "1.2e-1" in made or "1.3e-1" in made
    assert made.startswith("before\n<!-- table: parity -->\n|")
    assert made.endswith("|\n<!-- end -->\nafter\n")
    with pytest.raises(sm.StylemuseError, match="table odd is unknown"):
        tables.rendered("<!-- table: odd -->\n<!-- end -->")


def test_every_result_is_a_document() -> None:
    """But for those with a form of their own."""
    own = {"demo.json", "parity.json", "pictures.json", "compiled.json", "quantization.json"}
    files = [path for path in (ROOT / "bench/results").glob("*.json") if path.name not in own]
    assert files
    for path in files:
        report.read(path)
