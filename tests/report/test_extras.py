import math
from dataclasses import replace

import pytest
import torch

from probe.attribution import EdgeScores
from probe.errors import ProbeError
from probe.models import Graph
from probe.recipe import read_recipe
from probe.report import EXTRAS, build_report, check_extras, extra_tables
from probe.stats import _mass as mass

CELL = "sft-grpo.tiny-math.alpha-0.5"


def recipe(*extras, control="none", **changes):
    chosen = read_recipe("tiny-math", {"selection.alpha": "[0.1, 0.5]"} | changes)
    return replace(
        chosen,
        report=replace(chosen.report, extra=extras),
        attribution=replace(chosen.attribution, control=control),
    )


def test_every_table_has_a_row_for_each_column(half_run):
    names = [name for name, extra in EXTRAS.items() if extra.needs == "edges"]
    tables, _ = extra_tables(half_run, recipe(*names))
    assert [table.title for table in tables] == [EXTRAS[name].title for name in names]
    for table in tables:
        assert len(set(table.columns)) == len(table.columns)
        assert table.columns[:3] == ("benchmark", "pair", "alpha")
        for row in table.rows:
            assert len(row) == len(table.columns)
            assert row[:3] == ("tiny-math", "sft-grpo", 0.5)
            assert all(isinstance(value, str) or math.isfinite(value) for value in row)


def test_what_a_scale_does_not_change(half_run):
    """The pair of `half_run` is twice as strong after, and nothing else."""
    names = ("overlap", "concentration", "mass")
    (overlap, concentration, mass), _ = extra_tables(half_run, recipe(*names))
    row = dict(zip(overlap.columns, overlap.rows[0], strict=True))
    assert row["edges"] == row["nodes"] == 1
    assert row["ranks"] == pytest.approx(1)
    for values in concentration.rows:
        row = dict(zip(concentration.columns, values, strict=True))
        assert row["before"] == pytest.approx(row["after"])
        assert row["change %"] == pytest.approx(0, abs=1e-6)
    for values in mass.rows:
        row = dict(zip(mass.columns, values, strict=True))
        assert row["low %"] == pytest.approx(0, abs=1e-6)
    assert sum(row[4] for row in mass.rows) == pytest.approx(2)  # all edges, by writer and reader


def test_intervals_are_of_the_same_questions(half_run):
    """A change that every question shares has no width, however much questions differ."""
    graph = Graph.build(2, "qkv")
    torch.manual_seed(3)
    before = torch.randn(8, *graph.mask.shape) * graph.mask
    after = before.clone()
    after[:, 0] *= 3
    for side, scores in (("before", before), ("after", after)):
        edges = EdgeScores(scores, torch.ones(8), torch.ones(8), graph)
        half_run.write_edges(half_run.edges_file(CELL, side), edges, list("abcdefgh"), "key")
    (table,), _ = extra_tables(half_run, recipe("mass"))
    rows = {row[3]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    row = rows["from input"]
    assert 0 < row["low %"] < row["change %"] < row["high %"]
    parts = [
        [s[0][graph.mask[0]].abs().sum() / s.abs().sum() for s in side] for side in (before, after)
    ]
    means = [float(torch.tensor(side).mean()) for side in parts]
    assert [row["before"], row["after"]] == pytest.approx(means, rel=1e-5)
    assert row["change %"] == pytest.approx(100 * (means[1] - means[0]), rel=1e-5)


def test_the_control_is_shown_where_its_edges_are(half_run):
    asked = recipe(control="cross-text")
    assert extra_tables(half_run, asked) == (
        (),
        (f"cross-text control of {CELL}: not computed yet",),
    )

    before = half_run.read_edges(half_run.edges_file(CELL, "before"))
    after = half_run.read_edges(half_run.edges_file(CELL, "after"))
    for side, edges in (("before-on-after", before), ("after-on-before", after)):
        half_run.write_edges(half_run.edges_file(CELL, side), edges, list("abcde"), "key")
    (table,), missing = extra_tables(half_run, asked)
    assert missing == ()
    row = dict(zip(table.columns, table.rows[0], strict=True))
    assert row["metric"] == "intensity"
    assert row["model %"] == row["change %"] == pytest.approx(100)
    assert row["text %"] == row["both %"] == 0

    half_run.write_edges(half_run.edges_file(CELL, side), edges, list("abcdx"), "key")
    tables, (line,) = extra_tables(half_run, asked)
    assert tables == ()
    assert line.startswith(f"cross-text control of {CELL}: before, before-on-after, ")
    assert line.endswith("and after are of different questions")


def test_a_report_holds_the_tables_of_its_recipe(half_run):
    record = half_run.read_record()
    titles = [extra.title for extra in build_report(half_run.path).extras]
    assert titles == ["Overlap of the circuits"]
    record["recipe"]["report"]["extra"] = ["distances", "distances"]
    half_run.write_json("run.json", record)
    (table,) = build_report(half_run.path).extras
    assert table.title == EXTRAS["distances"].title
    assert [row[3] for row in table.rows] == [
        name for name, _ in mass.distances(Graph.build(2, "qkv"))
    ]


def test_statistics_can_be_left_out(half_run):
    asked = recipe("concentration")
    asked = replace(asked, report=replace(asked.report, resamples=0))
    (table,), _ = extra_tables(half_run, asked)
    row = dict(zip(table.columns, table.rows[0], strict=True))
    assert row["of"] == "Gini coefficient"
    assert row["before"] > 0
    assert row["low %"] is row["high %"] is None


def test_scores_of_zero_are_not_defined(half_run):
    graph = Graph.build(2, "qkv")
    edges = EdgeScores(torch.zeros(3, *graph.mask.shape), torch.ones(3), torch.ones(3), graph)
    for side in ("before", "after"):
        half_run.write_edges(half_run.edges_file(CELL, side), edges, list("abc"), "key")
    (table,), _ = extra_tables(half_run, recipe("concentration"))
    assert set(table.rows[0][4:]) == {None}


def test_an_unknown_table():
    with pytest.raises(ProbeError, match="no table 'overlp'; did you mean 'overlap'"):
        check_extras(recipe("overlp"))
    with pytest.raises(ProbeError, match="known: overlap, concentration"):
        check_extras(recipe("xyz"))
    check_extras(recipe(*EXTRAS))


@pytest.mark.parametrize("name", ["token-kl", "residual", "weights", "tokens"])
def test_what_a_server_does_not_measure_is_refused(name):
    asked = read_recipe(
        "tiny-math", {"report.extra": f'["{name}"]', "compute.remote": "http://127.0.0.1:1"}
    )
    with pytest.raises(ProbeError, match=f"does not measure what the table '{name}' is of"):
        check_extras(asked)
