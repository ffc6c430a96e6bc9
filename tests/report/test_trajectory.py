"""The table of a training, on planted scores."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch

from probe.attribution import EdgeScores
from probe.checkpoints import WeightChange
from probe.models import Graph
from probe.recipe import recipe_from
from probe.report import extra_tables
from probe.report._trajectory import SEED_COLUMNS, seed_rows
from probe.solutions import Selection
from probe.store import states_file, weights_file

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
        if table.title == "Along the training"
        for row in table.rows
    }


def test_every_checkpoint_has_a_row(half_run):
    """The circuit stays while its size falls, and the last checkpoint has another one."""
    plant(half_run, lambda row: -0.5, ids={1: IDS, 10: IDS, 100: IDS, 1000: IDS[:5]}.get)
    after = half_run.edges_file("rl-step-1000.tiny-math.alpha-0.5", "after")
    edges = half_run.read_edges(after)
    turned = edges.scores.flip(1, 2).masked_fill(~edges.graph.mask, 0)
    half_run.write_edges(after, replace(edges, scores=turned), list(IDS[:5]), "key")
    tables, _ = extra_tables(half_run, training())
    (table,) = (table for table in tables if table.title == "Every checkpoint")
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    assert [row["step"] for row in rows] == [0, *STEPS]
    assert [row["intensity %"] for row in rows[:4]] == [
        None,
        pytest.approx(0, abs=1e-4),
        pytest.approx(100 * (10**-0.5 - 1), abs=1e-4),
        pytest.approx(-90, abs=1e-4),
    ]
    assert [row["overlap base"] for row in rows[:4]] == [None, 1, 1, 1]
    assert [row["overlap previous"] for row in rows[:4]] == [None, None, 1, 1]
    assert rows[4]["overlap previous"] == rows[4]["overlap base"] < 0.5
    assert [row["questions"] for row in rows] == [8, 8, 8, 8, 5]
    assert [row["loss"] for row in rows] == [1] * 5
    assert [row["accuracy"] for row in rows] == [None] * 5  # there are no solutions


def test_what_was_measured_beside_the_edges_is_in_the_row_of_its_checkpoint(half_run):
    """KL and weights of some checkpoints; what was not measured is left open."""
    recipe = training()
    plant(half_run, lambda row: -0.5)
    for step in STEPS:  # on the base's answers all scores double
        edges = half_run.edges_file(f"rl-step-{step}.tiny-math.alpha-0.5", "before")
        base = half_run.read_edges(edges)
        twice = replace(base, scores=2 * base.scores)
        other = half_run.edges_file(f"rl-step-{step}.tiny-math.alpha-0.5", "after-on-before")
        half_run.write_edges(other, twice, list(IDS), "key")
    pair = recipe.pairs[1]
    lengths = Selection(tuple(IDS), 9, 3, 1, 9, 8, 8)  # three tokens are scored
    half_run.write_selection(f"{pair.name}.tiny-math.alpha-0.5", lengths)
    tokens = np.random.default_rng(3).random((8, 5))
    for text, values in (("before", tokens), ("after", 7 * tokens)):
        table = {"key": "k", "ids": list(IDS), "divergences": values.tolist()}
        half_run.write_json(states_file(pair, "tiny-math", text), table)
    matrices = [("a", 4, 3.0, 1.0, 0), ("b", 4, 4.0, 2.0, 1)]  # name, entries, size, moved, equal
    moved = [vars(WeightChange(*matrix)) for matrix in matrices]
    half_run.write_json(weights_file(pair), {"key": "k", "matrices": moved})
    tables, _ = extra_tables(half_run, recipe)
    (table,) = (table for table in tables if table.title == "Every checkpoint")
    rows = {
        row["step"]: row for row in (dict(zip(table.columns, r, strict=True)) for r in table.rows)
    }
    means = tokens[:, :3].mean(1)
    half = scipy.stats.t.ppf(0.975, 7) * means.std(ddof=1) / 8**0.5
    row = rows[10]
    assert [row["KL"], row["KL low"], row["KL high"]] == pytest.approx(
        [means.mean(), means.mean() - half, means.mean() + half]
    )
    assert row["moved"] == pytest.approx(5**0.5 / 5)
    assert row["on base text %"] == pytest.approx(100, abs=1e-4)
    for step in (0, 1, 100):
        assert [rows[step][name] for name in ("KL", "KL low", "KL high", "moved")] == [None] * 4
    assert rows[0]["on base text %"] is None


def test_a_planted_drift_is_found(half_run):
    plant(half_run, lambda row: -0.5 + (row - 3.5) / 100)
    rows = rows_of(half_run, training())
    row = rows["own", "intensity"]
    assert row["slope"] == pytest.approx(-0.5, abs=1e-6)
    assert row["low"] < -0.5 < row["high"] < 0
    assert row["p"] == 2 / 2**8  # all eight questions agree
    assert (row["questions"], row["checkpoints"], row["Spearman"]) == (8, 4, -1)
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


REST = (None, None, 1.0, 1.0, 9, 4)


def slopes_of(values, stem="grpo"):
    return [
        (
            "tiny-math",
            f"{stem}-seed-{seed}",
            0.5,
            "own",
            "intensity",
            value,
            None,
            None,
            1.0,
            1,
            9,
            4,
        )
        for seed, value in enumerate(values)
    ]


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ([-0.5, -0.4, -0.6, -0.5, -0.45], "down"),
        ([0.5, 0.4, 0.6, 0.5, 0.45], "up"),
        ([-0.5, 0.4, -0.6, 0.5, 0.1], "no sign"),
        ([-0.5, -0.5, -0.5, -0.5], "4 of 5 seeds"),
    ],
)
def test_seeds_are_replicates(values, verdict):
    plain = ("tiny-math", "dpo", 0.5, "own", "intensity", -9.0, *REST)
    alone = slopes_of([1.0], "ppo")
    (row,) = seed_rows([*slopes_of(values), plain, *alone])
    found = dict(zip(SEED_COLUMNS, row, strict=True))
    assert (found["training"], found["seeds"], found["drift"]) == ("grpo", len(values), verdict)
    assert found["slope"] == pytest.approx(np.mean(values))
    error = scipy.stats.sem(values) if np.ptp(values) else 0
    reach = scipy.stats.t.ppf(0.975, len(values) - 1) * error
    ends = np.mean(values) - reach, np.mean(values) + reach
    assert (found["low"], found["high"]) == pytest.approx(ends)
    assert (found["least"], found["most"]) == (min(values), max(values))
