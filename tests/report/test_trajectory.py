"""The table of a training, on planted scores."""

import pytest
import torch

from probe.attribution import EdgeScores
from probe.models import Graph
from probe.recipe import recipe_from
from probe.report import extra_tables

STEPS = (1, 10, 100, 1000)
IDS = "abcdefgh"


def training(**changes):
    checkpoints = [f"a/rl@step_{step}" for step in STEPS]
    table = {
        "name": "x",
        "trajectories": [{"name": "rl", "base": "a/b", "checkpoints": checkpoints} | changes],
        "benchmarks": [{"name": "tiny-math"}],
        "selection": {"alpha": [0.5]},
        "report": {"extra": []},
        "attribution": {"control": "none"},
    }
    return recipe_from(table, "here")


def plant(run, power, side="after", ids=lambda step: IDS):
    """Let the scores of each question grow as a power of the step that is its own."""
    graph = Graph.build(2, "qkv")
    torch.manual_seed(5)
    base = torch.randn(len(IDS), *graph.mask.shape) * graph.mask
    for step in STEPS:
        chosen = ids(step)
        rows = [IDS.index(name) for name in chosen]
        grown = base * torch.tensor([step ** power(row) for row in range(len(IDS))])[:, None, None]
        for name, scores in (("before", base), (side, grown)):
            ones, more = torch.ones(len(rows)), torch.ones(len(rows))
            file = run.edges_file(f"rl-step-{step}.tiny-math.alpha-0.5", name)
            run.write_edges(file, EdgeScores(scores[rows], ones, more, graph), list(chosen), "key")


def rows_of(run, recipe):
    tables, _ = extra_tables(run, recipe)
    return {
        (row[3], row[4]): dict(zip(table.columns, row, strict=True))
        for table in tables
        for row in table.rows
    }


def test_a_planted_drift_is_found(half_run):
    plant(half_run, lambda row: -0.5 + (row - 3.5) / 100)
    rows = rows_of(half_run, training())
    row = rows["own", "intensity"]
    assert row["slope"] == pytest.approx(-0.5, abs=1e-6)
    assert row["low"] < -0.5 < row["high"] < 0
    assert row["p"] == 2 / 2**8  # all eight questions agree
    assert (row["questions"], row["checkpoints"]) == (8, 4)
    assert rows["own", "kurtosis"]["slope"] == 0  # a scale does not change it


def test_the_same_model_again_does_not_drift(half_run):
    plant(half_run, lambda row: 0.0)
    for row in rows_of(half_run, training()).values():
        assert (row["slope"], row["low"], row["high"], row["p"]) == (0, 0, 0, 1)


def test_only_shared_questions_count_in_whatever_order(half_run):
    orders = {1: "hgfedcba", 10: "abcdef", 100: "cabdefgh", 1000: "abcdeh"}
    plant(half_run, lambda row: row / 10, ids=orders.get)
    row = rows_of(half_run, training())["own", "intensity"]
    assert row["questions"] == 5
    assert row["slope"] == pytest.approx(0.2, abs=1e-6)  # the mean of a to e


def test_the_answers_of_the_base_are_a_row_of_their_own(half_run):
    plant(half_run, lambda row: 0.25, side="after-on-before")
    rows = rows_of(half_run, training())
    assert {text for text, _ in rows} == {"of the base"}
    assert rows["of the base", "intensity"]["slope"] == pytest.approx(0.25, abs=1e-6)


def test_two_checkpoints_have_no_slope(half_run):
    plant(half_run, lambda row: 1.0)
    assert rows_of(half_run, training(steps=[1, 10, 0, 5])) == {}
