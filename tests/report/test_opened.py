"""Opened runs: what a folder holds, as objects, tables and HTML."""

import pickle
from dataclasses import replace

import pytest
import torch

import probe
from probe.errors import ProbeError
from probe.report._opening import opening
from probe.solutions import Solution


@pytest.fixture
def opened(half_run):
    """The half run, with what two models wrote."""
    for model, right in (("sft", [True, False]), ("grpo", [True, True])):
        solutions = [
            Solution(str(place), [5], [6, 7], correct, f"<i>{place}", str(place), "0")
            for place, correct in enumerate(right)
        ]
        half_run.write_solutions(
            half_run.solutions_file(f"tiny-math--{model}", "tiny-math"), solutions
        )
    return probe.open_run(half_run.path)


def test_cells_are_those_of_the_report(opened):
    assert opened.cells == opened.report.cells
    assert {cell.alpha for cell in opened.cells} == {0.5}
    table = opened.cells.to_pandas()
    assert len(table) == len(opened.cells)
    assert list(table["metric"]) == [cell.metric for cell in opened.cells]
    assert list(table["real_edges.change"].dropna()) == [
        cell.real_edges.change for cell in opened.cells if cell.real_edges.change is not None
    ]


def test_tables_without_rows_have_columns(half_run):
    run = probe.open_run(half_run.path)
    assert len(run.problems) == len(run.accuracy) == 0
    assert {"model", "correct", "text"} <= set(run.problems.to_pandas())
    assert {"pair", "before", "after"} <= set(run.accuracy.to_pandas())
    assert "Table(0 rows of SolvedProblem)" in run.problems._repr_html_()


def test_a_table_is_a_tuple(opened):
    again = pickle.loads(pickle.dumps(opened.problems))
    assert again == opened.problems == tuple(opened.problems)
    assert len(again.to_pandas()) == 4
    assert repr(opened.accuracy) == "Table(1 row of Accuracy)"


def test_accuracy(opened):
    (row,) = opened.accuracy
    assert (row.before, row.after) == (0.5, 1.0)
    assert opened.accuracy.to_pandas().loc[0, "after"] == 1


def test_problems(opened):
    assert len(opened.problems) == 4
    table = opened.problems.to_pandas()
    right = table.groupby("model")["correct"].mean()
    assert right.to_dict() == {"probe:tiny-math/sft": 0.5, "probe:tiny-math/grpo": 1}
    assert set(table["tokens"]) == {2}
    assert set(table["benchmark"]) == {"tiny-math"}
    shown = opened.problems._repr_html_()
    assert "&lt;i&gt;0" in shown
    assert "<i>" not in shown


def test_edges_by_every_name(opened):
    before = opened.edges("before", 0.5)
    assert before.ids == tuple("abcde")
    for name in ("sft", "probe:tiny-math/sft"):
        assert opened.edges(name, 0.5) == before
        assert opened.edges(name, 0.5, "tiny-math", "sft-grpo") == before
    after = opened.edges("grpo", 0.5)
    assert after == opened.edges("after", 0.5) == opened.edges("probe:tiny-math/grpo", 0.5)
    assert torch.allclose((after - before).scores, before.scores)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ppo", 0.5), "has no model 'ppo'; it has: probe:tiny-math/sft, probe:tiny-math/grpo, "),
        (("sft", 0.3), "has no alpha 0.3; it has: 0.1, 0.5"),
        (("sft", 0.5, "gsm8k"), "has no benchmark 'gsm8k'; it has: tiny-math"),
        (("sft", 0.5, None, "b"), "has no pair 'b'; it has: sft-grpo, sft-dpo"),
        (("grpo", 0.5, None, "sft-dpo"), "has no model 'grpo'"),
        (("sft", 0.1), "alpha-0.1.before.safetensors: not computed yet"),
        (("dpo", 0.5), "sft-dpo.tiny-math.alpha-0.5.after.safetensors: not computed yet"),
        (("before-on-after", 0.5), "before-on-after.safetensors: not computed yet"),
    ],
)
def test_edges_that_are_not_there(opened, arguments, message):
    with pytest.raises(ProbeError, match=message):
        opened.edges(*arguments)


def test_a_torn_file(opened):
    path = opened.folder.edges_file("sft-grpo.tiny-math.alpha-0.5", "before")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ProbeError, match=r"before.safetensors: damaged .*; run the recipe again"):
        opened.edges("before", 0.5)


def test_what_is_no_run(tmp_path):
    with pytest.raises(ProbeError, match="is not a run folder"):
        probe.open_run(tmp_path)


def test_any_file_of_a_run_stands_for_it(opened):
    path = opened.folder.edges_file("sft-grpo.tiny-math.alpha-0.5", "before")
    assert probe.open_run(path).path == opened.path


def test_what_is_shown(opened):
    assert repr(opened) == f"OpenRun({str(opened.path)!r}: tiny-math, 2 pairs)"
    report = opened.report
    assert repr(report).startswith(f"Report(tiny-math: 2 pairs, {len(report.cells)} cells, missing")
    foreign = tuple(replace(cell, pair="<b>") for cell in report.cells)
    shown = replace(report, cells=foreign)._repr_html_()
    assert "<td>&lt;b&gt;</td>" in shown
    assert shown.count("<tr>") == len(report.cells) + 1
    begun = opened._repr_html_()
    assert begun.startswith(f"<p><b>{opening([report])[0].subject}</b><br>")
    assert "<br>Inside: " in begun
    assert "<b>How sure, and what next</b><br>Trust: " in begun
    assert begun.endswith(report._repr_html_())
