"""A run folder that an early version wrote: it opens, reports the same numbers, and can go on."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from conftest import run_recorded

from probe.report import build_report

OLD = Path(__file__).parents[1] / "data" / "old-run"
WROTE = json.loads((OLD / "report.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def report():
    return build_report(OLD)


def test_nothing_is_missing(report):
    assert WROTE["complete"]
    assert report.missing == ()


def test_cells_hold_the_same_numbers(report):
    """Those of the paper's metrics, but for the order of sums; how they are tested may change."""
    found = {
        (cell.pair, cell.benchmark, cell.alpha, cell.metric): cell
        for cell in report.cells
        if not cell.control
    }
    assert len(WROTE["cells"]) == 12
    for old in WROTE["cells"]:
        cell = found[old["pair"], old["benchmark"], old["alpha"], old["metric"]]
        for numbers, change in ((old, cell.paper), (old["real_edges"], cell.real_edges)):
            for name in ("before", "after", "change"):
                expected = pytest.approx(numbers[name], rel=1e-12)
                assert getattr(change, name) == expected, (old["metric"], name)
        assert cell.paper_direction == old["paper_direction"]


def test_accuracies_hold_the_same_numbers(report):
    rows = [(row.pair, row.before, row.after, row.questions) for row in report.accuracy]
    assert rows == [
        (row["pair"], row["before"], row["after"], row["questions"]) for row in WROTE["accuracy"]
    ]
    assert {row[3] for row in rows} == {16}


def test_faithfulness_holds_the_same_numbers(report):
    assert [row.table for row in report.faithfulness] == WROTE["faithfulness"]
    assert len(WROTE["faithfulness"]) == 9  # three models, three methods


def test_tables_that_were_measured_hold_the_same_numbers(report):
    """What needs no statistics: weights and residual streams."""
    old = {table["title"]: table for table in WROTE["extras"]}
    new = {table.title: table for table in report.extras}
    assert old.keys() == new.keys()
    for title in ("Change of the weights", "Similarity of the residual streams"):
        assert [list(row) for row in new[title].rows] == old[title]["rows"]


def test_it_goes_on_and_computes_nothing_again(tmp_path, monkeypatch):
    copy = tmp_path / "run"
    shutil.copytree(OLD, copy)
    for step in ("_solving.solve", "_attributing.attribute", "_measuring.measure"):
        monkeypatch.setattr(f"probe.run.{step}", None)
    monkeypatch.setattr("probe.run._measuring.draw_scatter", lambda *arguments: None)
    before = digests(copy)
    options = json.loads((OLD / "run.json").read_text(encoding="utf-8"))["recipe"]
    run_recorded(
        {
            "solutions.questions": options["solutions"]["questions"],
            "solutions.batch_size": options["solutions"]["batch_size"],
            "selection.samples": 3,
            "selection.alpha": "[0.3]",
            "attribution.control": "none",
        },
        copy,
    )
    assert digests(copy) == before


def digests(folder):
    """What solutions, selections and edges are, to the last bit."""
    parts = [path for part in ("solutions", "edges") for path in sorted((folder / part).glob("*"))]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in parts}
