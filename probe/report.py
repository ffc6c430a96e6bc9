"""The report: each metric before and after, and whether it moved as the paper says RL moves it.

A cell is one metric of one pair on one benchmark at one alpha, with what `probe.statistics` says
about its change. Cells are computed from the edges in a run folder, so a finished or half-finished
run can be reported again at any time; `probe.rendering` prints them.

    >>> report = build_report(Path("runs/tiny-math"))
    >>> report.cells[0].metric
    'activation_intensity'
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

from probe.agreement import Agreement, agreement_from
from probe.edges import EdgeScores
from probe.extras import ExtraTable as ExtraTable
from probe.extras import extra_tables
from probe.metrics import METRICS, TOKEN_METRICS, compute_metric, metric_named
from probe.recipe import Pair, Recipe, ReportOptions, recipe_from
from probe.run_folder import (
    SCHEMA,
    Damaged,
    RunFolder,
    cell_name,
    faithfulness_file,
    first_names,
    model_names,
    run_path,
)
from probe.statistics import LEVEL, Statistics, compare_sides, holm, permutations_for

_SIGNS = {"up": 1, "down": -1}


@dataclass(frozen=True)
class Change:
    """One value of two models."""

    before: float | None
    """The model before; None where the metric is not defined (diversity of one sample)."""

    after: float | None
    """The model after."""

    change: float | None
    """(after - before) / |before|; None where that is not defined."""


@dataclass(frozen=True)
class Cell:
    """One metric of one pair on one benchmark at one alpha."""

    pair: str
    """The pair's name."""

    benchmark: str
    """The benchmark's name."""

    alpha: float
    """Scored length as a share of the reference length."""

    metric: str
    """A name in `probe.metrics.METRICS`, or in `TOKEN_METRICS`."""

    before: float | None
    """The model before, over the dense matrix with its structural zeros."""

    after: float | None
    """The model after."""

    change: float | None
    """(after - before) / |before|, a fraction."""

    samples: int
    """How many questions it is computed from."""

    paper_direction: Literal["up", "down"] | None
    """How the paper reports that online RL moves this metric; None where it has no such metric."""

    as_in_paper: bool | None
    """Whether it moved that way; None where the change or the way is not defined."""

    real_edges: Change
    """The same over real edges only; of a metric that is of no edges, the same again."""

    interval: tuple[float, float] | None = None
    """95 % bootstrap interval of the change over questions. This and what follows is over the dense
    matrix, and None where it is not defined or the recipe leaves statistics out."""

    p_value: float | None = None
    """How often a change of this size comes about by exchanging questions' two sides at random."""

    p_holm: float | None = None
    """The same, adjusted by Holm's method for all cells of the report."""

    effect_size: float | None = None
    """after - before in standard deviations of a question's contribution to it."""

    noise_floor: float | None = None
    """The |change|, in this direction, that random halves of one model's questions differ by in
    95 % of all splits."""

    significant: bool | None = None
    """Whether p_holm is below 0.05."""

    above_noise: bool | None = None
    """Whether |change| is above the noise floor."""

    published: Change | None = None
    """What was printed elsewhere for this cell, where the recipe says."""

    as_published: bool | None = None
    """Whether it moved the way that the published value did."""


@dataclass(frozen=True)
class Accuracy:
    """How many questions a model solved."""

    pair: str
    """The pair's name."""

    benchmark: str
    """The benchmark's name."""

    before: float
    """Share of right answers of the model before."""

    after: float
    """Share of right answers of the model after."""

    questions: int
    """How many were asked."""

    published: Change | None = None
    """What was printed elsewhere, where the recipe says."""

    as_published: bool | None = None
    """Whether it moved the way that the published value did."""


Row = TypeVar("Row", Cell, Accuracy)


@dataclass(frozen=True)
class Report:
    """Everything a run has to say."""

    recipe: Recipe
    """What was run."""

    cells: tuple[Cell, ...]
    """The cells whose edges are there."""

    accuracy: tuple[Accuracy, ...]
    """The accuracies whose solutions are there."""

    missing: tuple[str, ...]
    """What is not computed yet, or damaged."""

    faithfulness: tuple[Agreement, ...] = ()
    """How near each method comes to the exact effects of some edges, model by model."""

    extras: tuple[ExtraTable, ...] = ()
    """What else was asked for, a table each."""

    path: Path = Path()
    """The run folder that it was computed from."""

    @property
    def table(self) -> dict[str, object]:
        """The report as plain data, as report.json holds it."""
        return {
            "schema": SCHEMA,
            "recipe": self.recipe.name,
            "complete": not self.missing,
            "cells": [asdict(cell) for cell in self.cells],
            "accuracy": [asdict(row) for row in self.accuracy],
            "faithfulness": [agreement.table for agreement in self.faithfulness],
            "extras": [asdict(table) for table in self.extras],
            "missing": list(self.missing),
        }


def build_report(path: str | Path) -> Report:
    """Compute a run's report from what its folder holds.

    Args:
        path: The run folder, or any file in it.

    Raises:
        ProbeError: The folder is not a run's.
    """
    folder = RunFolder(run_path(path))
    recipe = recipe_from(folder.read_record()["recipe"], str(folder.record))
    cells: list[Cell] = []
    missing: list[str] = []
    planned = len(recipe.pairs) * len(recipe.benchmarks) * len(recipe.selection.alpha)
    permutations = permutations_for(planned * len(METRICS | TOKEN_METRICS))
    accuracy = []
    for benchmark in (choice.name for choice in recipe.benchmarks):
        for pair in recipe.pairs:
            accuracy.append(_accuracy(folder, recipe, pair, benchmark))
            for alpha in recipe.selection.alpha:
                name = cell_name(pair, benchmark, alpha)
                files = [folder.edges_file(name, side) for side in ("before", "after")]
                try:
                    before, after = (folder.read_edges(file) for file in files)
                except Damaged as error:
                    missing.append(f"{name}: {error}")
                    continue
                if before is None or after is None:
                    missing.append(f"{name}: {folder.left_out(name) or 'not computed yet'}")
                    continue
                if before.ids != after.ids:
                    missing.append(f"{name}: before and after are of different questions")
                    continue
                where = pair.name, benchmark, alpha
                cells += _cells(where, before, after, recipe.report, permutations)
    faithfulness, unmeasured = _faithfulness(folder, recipe)
    known = tuple(_beside_published(row, recipe) for row in accuracy if row)
    judged = tuple(_beside_published(cell, recipe) for cell in _judged(cells))
    extras, lacking = extra_tables(folder, recipe)
    missing = [*missing, *unmeasured, *lacking]
    return Report(recipe, judged, known, tuple(missing), faithfulness, extras, path=folder.path)


def _faithfulness(folder: RunFolder, recipe: Recipe) -> tuple[tuple[Agreement, ...], list[str]]:
    """How near each method came, model by model; and a line for each model that is missing."""
    found: list[Agreement] = []
    missing: list[str] = []
    for name in first_names(recipe).values():
        try:
            table = folder.read_json(faithfulness_file(name))
            if table is None and not recipe.faithfulness.edges:
                continue
            rows = (table or {}).get("agreement")
            if not isinstance(rows, list):
                raise Damaged("not computed yet")
            found += [agreement_from(row) for row in rows]
        except (Damaged, TypeError) as error:
            missing.append(f"faithfulness of {name}: {error}")
    return tuple(found), missing


def _accuracy(folder: RunFolder, recipe: Recipe, pair: Pair, benchmark: str) -> Accuracy | None:
    names = model_names(recipe)
    sides = []
    for asked in pair.asked():
        solutions, _ = folder.read_solutions(folder.solutions_file(names[asked], benchmark))
        sides.append([solution.correct for solution in solutions])
    if not sides[0] or len(sides[0]) != len(sides[1]):
        return None
    before, after = (sum(side) / len(side) for side in sides)
    return Accuracy(pair.name, benchmark, before, after, len(sides[0]))


def _cells(
    where: tuple[str, str, float],
    before: EdgeScores,
    after: EdgeScores,
    options: ReportOptions,
    permutations: int,
) -> list[Cell]:
    """The cells of a pair on a benchmark at an alpha, a metric each."""
    sides = (before, after)
    masks = None, before.graph.mask
    values = {
        metric: [
            _change(*(compute_metric(metric, e.scores, mask, bins=options.bins) for e in sides))
            for mask in masks
        ]
        for metric in METRICS
    }
    for metric, entry in TOKEN_METRICS.items():
        # It is of no edges, so it is the same over all of them and over real ones.
        values[metric] = 2 * [_change(*(entry.function(e.entropies) for e in sides))]
    statistics = dict.fromkeys(values, Statistics())
    if options.resamples:
        statistics |= compare_sides(
            before.scores,
            after.scores,
            bins=options.bins,
            resamples=options.resamples,
            permutations=permutations,
        )
        statistics |= compare_sides(
            before.entropies,
            after.entropies,
            resamples=options.resamples,
            permutations=permutations,
            metrics=TOKEN_METRICS,
        )
    cells = []
    for metric, (dense, real) in values.items():
        direction, agrees = metric_named(metric).direction, None
        if dense.change is not None and direction:
            agrees = dense.change * _SIGNS[direction] > 0
        cells.append(
            Cell(
                *where,
                metric=metric,
                before=dense.before,
                after=dense.after,
                change=dense.change,
                samples=len(before.scores),
                paper_direction=direction,
                as_in_paper=agrees,
                real_edges=real,
                **vars(statistics[metric]),
            )
        )
    return cells


def _beside_published(row: Row, recipe: Recipe) -> Row:
    """The row with the value that the recipe publishes for it, if it does."""
    metric, alpha = (row.metric, row.alpha) if isinstance(row, Cell) else ("accuracy", None)
    where = (row.pair, row.benchmark, metric, alpha)
    for value in recipe.published:
        if (value.pair, value.benchmark, value.metric, value.alpha) == where:
            same = None
            if row.before is not None and row.after is not None:
                same = np.sign(row.after - row.before) == np.sign(value.after - value.before)
            return replace(
                row,
                published=_change(value.before, value.after),
                as_published=None if same is None else bool(same),
            )
    return row


def _judged(cells: Sequence[Cell]) -> list[Cell]:
    """The cells with what depends on all of them, and on their own noise."""
    tested = [cell.p_value for cell in cells if cell.p_value is not None]
    adjusted = iter(holm(tested))
    judged = []
    for cell in cells:
        if cell.p_value is not None:
            p_holm = next(adjusted)
            cell = replace(cell, p_holm=p_holm, significant=p_holm < LEVEL)
        if cell.change is not None and cell.noise_floor is not None:
            cell = replace(cell, above_noise=abs(cell.change) > cell.noise_floor)
        judged.append(cell)
    return judged


def _change(before: float, after: float) -> Change:
    finite = [value if math.isfinite(value) else None for value in (before, after)]
    defined = None not in finite and before != 0
    return Change(finite[0], finite[1], (after - before) / abs(before) if defined else None)
