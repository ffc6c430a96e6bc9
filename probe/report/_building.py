"""The report: each metric before and after, and whether it moved as the paper says RL moves it.

A cell is one metric of one pair on one benchmark at one alpha, with what `probe.stats` says
about its change. Cells are computed from the edges in a run folder, so a finished or half-finished
run can be reported again at any time; `_rendering` prints them.

    >>> report = build_report(Path("runs/tiny-math"))
    >>> report.cells[0].metric
    'activation_intensity'
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from probe.metrics import METRICS, TOKEN_METRICS
from probe.recipe import Pair, Recipe, recipe_from
from probe.report._causal import causal_tables
from probe.report._extras import extra_tables
from probe.report._matched import matched_questions
from probe.report._report import Report
from probe.solutions import cut_off
from probe.stats import (
    CONTROLS,
    Accuracy,
    Agreement,
    Cell,
    agreement_from,
    change_of,
    flips_for,
    judged_accuracy,
    judged_cells,
    make_accuracy,
    make_cells,
)
from probe.store import (
    Damaged,
    Missing,
    RunFolder,
    faithfulness_file,
    first_names,
    model_names,
    run_path,
    version_lines,
)

Judged = TypeVar("Judged", Cell, Accuracy)


def build_report(path: str | Path) -> Report:
    """Compute a run's report from what its folder holds.

    Args:
        path: The run folder, or any file in it.

    Raises:
        ProbeError: The folder is not a run's.
    """
    folder = RunFolder(run_path(path))
    recipe = recipe_from(folder.read_record()["recipe"], str(folder.record))
    compared = 1 + sum(len(CONTROLS[name].compared) for name in recipe.attribution.control)
    planned = compared * len(recipe.comparisons()) * len(METRICS | TOKEN_METRICS)
    flips = flips_for(planned) if recipe.report.resamples else 0
    flips = max(flips, recipe.report.resamples) if flips else 0
    cells, absent = _cells(folder, recipe, flips)
    accuracies, unsolved = _accuracies(folder, recipe, flips)
    rows = judged_accuracy(accuracies)
    faithfulness, unmeasured = _faithfulness(folder, recipe)
    extras, lacking = extra_tables(folder, recipe)
    tests, damaged = causal_tables(folder, recipe)
    return Report(
        recipe,
        tuple(_beside_published(cell, recipe) for cell in judged_cells(cells)),
        tuple(_beside_published(row, recipe) for row in rows),
        (*absent, *unsolved, *unmeasured, *lacking, *damaged),
        faithfulness,
        (*extras, *tests),
        version_lines(folder.read_record()),
        path=folder.path,
    )


def _cells(folder: RunFolder, recipe: Recipe, flips: int) -> tuple[list[Cell], list[str]]:
    """The cells of every comparison; and a line for each comparison that is missing."""
    cells: list[Cell] = []
    missing: list[str] = []
    for comparison in recipe.comparisons(by="benchmark"):
        clusters = folder.read_clusters(comparison.benchmark)
        try:
            before, after = folder.read_sides(comparison.name, "before", "after")
        except Missing as error:
            missing.append(f"{comparison.name}: {error}")
            continue
        make = partial(
            make_cells,
            comparison.key,
            bins=recipe.report.bins,
            flips=flips,
            clusters=[clusters.get(question) for question in before.ids],
        )
        controlled, lacking = _controlled(folder, recipe, comparison.name, make)
        cells += _by_metric([*make(before, after), *controlled])
        missing += lacking
    return cells, missing


def _accuracies(folder: RunFolder, recipe: Recipe, flips: int) -> tuple[list[Accuracy], list[str]]:
    """The accuracies of every pair on every benchmark whose solutions are there.

    And a line for each file of solutions of which some are damaged, or lost since it was whole.
    """
    found: list[Accuracy] = []
    missing: dict[str, None] = {}
    for benchmark in (choice.name for choice in recipe.benchmarks):
        clusters = folder.read_clusters(benchmark)
        for pair in recipe.pairs:
            try:
                row = _accuracy(folder, recipe, pair, benchmark, clusters, flips)
            except Missing as error:
                missing[str(error)] = None
                continue
            found += [row] if row else []
    return found, list(missing)


def _controlled(
    folder: RunFolder, recipe: Recipe, name: str, make: Callable[..., list[Cell]]
) -> tuple[list[Cell], list[str]]:
    """The cells of each control of a comparison; and a line for each that is missing."""
    cells: list[Cell] = []
    missing: list[str] = []
    # Sides of other temperatures and targets keep the entropy of their model, so they have none.
    metrics = {key: metric for key, metric in METRICS.items() if metric.estimand}
    for control in recipe.attribution.control:
        for label, first, second in CONTROLS[control].compared:
            try:
                before, after = folder.read_sides(name, first, second)
            except Missing as error:
                missing.append(f"{label} of {name}: {error}")
                continue
            as_here = partial(make, before, after, control=label, metrics=metrics)
            try:
                cells += as_here(counted=matched_questions(folder, name, control, before.ids))
            except Missing as error:
                missing.append(f"statistics of {label} of {name}: {error}")
                cells += as_here(flips=0)
    return cells, missing


def _by_metric(cells: Sequence[Cell]) -> list[Cell]:
    """Cells of one comparison, those of a control below the raw ones of the same metric."""
    order = [*METRICS, *TOKEN_METRICS]
    return sorted(cells, key=lambda cell: order.index(cell.metric))


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


def _accuracy(
    folder: RunFolder,
    recipe: Recipe,
    pair: Pair,
    benchmark: str,
    clusters: Mapping[str, str],
    flips: int,
) -> Accuracy | None:
    names = model_names(recipe)
    before, after = (
        {solution.id: solution for solution in folder.read_whole(names[asked], benchmark)}
        for asked in pair.asked()
    )
    if not before or before.keys() != after.keys():
        return None
    sides = [[side[name].correct for name in before] for side in (before, after)]
    groups = [clusters.get(name) for name in before]
    first, second = (
        cut_off(side.values(), pair.max_new_tokens) if asked.file is None else 0
        for asked, side in zip(pair.asked(), (before, after), strict=True)
    )
    row = make_accuracy(pair.name, benchmark, *sides, clusters=groups, flips=flips)
    return replace(row, cut_off=(first, second))


def _beside_published(row: Judged, recipe: Recipe) -> Judged:
    """The row with the value that the recipe publishes for it, if it does."""
    cell = row if isinstance(row, Cell) else None
    if cell and cell.control:
        return row
    metric, alpha = (cell.metric, cell.alpha) if cell else ("accuracy", None)
    where = (row.pair, row.benchmark, metric, alpha)
    ours = cell.paper if cell else row
    for value in recipe.published:
        if (value.pair, value.benchmark, value.metric, value.alpha) == where:
            same = None
            if ours.before is not None and ours.after is not None:
                same = np.sign(ours.after - ours.before) == np.sign(value.after - value.before)
            return replace(
                row,
                published=change_of(value.before, value.after),
                as_published=None if same is None else bool(same),
            )
    return row
