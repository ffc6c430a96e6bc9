"""Extras: what else users of a model pair expect, one table each.

A recipe chooses them, `report.extra = ["overlap", "mass"]`. Those of a run's edges cost next to
nothing, and two of them are in every report; the others cost a pass, and are on request. The
cross-text control has its table where the recipe asks for it (`attribution.control`).

An extra is a row of `EXTRAS`: columns, and a function of a cell's two sides to rows.

    >>> extra_tables(RunFolder(Path("runs/tiny-math")), read_recipe("tiny-math"), [])[0].title
    'Overlap of the circuits'
"""

import difflib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from probe import mass
from probe.attribution import EdgeScores
from probe.control import SIDES, cross_text
from probe.errors import ProbeError
from probe.graph import Graph
from probe.metrics import METRICS, Array, strengths
from probe.overlap import compare_circuits
from probe.recipe import Recipe
from probe.report import ExtraTable
from probe.run_folder import Damaged, RunFolder, cell_name
from probe.statistics import interval_of, resample_means

Row = tuple[str | float | None, ...]
Rows = Callable[[list[EdgeScores], Recipe], list[Row]]
"""Rows of one cell, from the edges of its sides, `SIDES` of the extra."""

PLACE = ("benchmark", "pair", "alpha")
RANGE = ("low", "high")


class Extra(NamedTuple):
    """A table beside the cells."""

    title: str
    """What it shows."""

    note: str
    """How to read it."""

    columns: tuple[str, ...]
    """Its columns, behind those that say which cell it is."""

    rows: Rows
    """The rows of one cell."""

    sides: tuple[str, ...] = ("before", "after")
    """Which edges of the cell it takes."""


def overlap_rows(sides: list[EdgeScores], recipe: Recipe) -> list[Row]:
    """How much the circuits of both models have in common."""
    del recipe
    before, after = sides
    found = compare_circuits(before.scores, after.scores, before.graph)
    row: list[float | None] = []
    for name in found.models._fields:
        row += [part and getattr(part, name) for part in found]
    return [tuple(row)]


def concentration_rows(sides: list[EdgeScores], recipe: Recipe) -> list[Row]:
    """How concentrated the scores of real edges are, question by question."""
    values = [strengths(side.scores, side.graph.mask) for side in sides]
    row: Row = ()
    for measure in (mass.gini, mass.effective_edges):
        row += _paired(np.stack([measure(side) for side in values]), recipe, relative=True)
    return [row]


def _mass_rows(groups: Callable[[Graph], mass.Groups]) -> Rows:
    """How much of the mass each group of edges holds."""

    def rows(sides: list[EdgeScores], recipe: Recipe) -> list[Row]:
        parts = groups(sides[0].graph)
        before, after = (
            mass.shares(strengths(side.scores, side.graph.mask), parts) for side in sides
        )
        return [
            (name, float(chosen.mean()), *_paired(np.stack([old, new]), recipe, relative=False))
            for (name, chosen), old, new in zip(parts, before, after, strict=True)
        ]

    return rows


def control_rows(sides: list[EdgeScores], recipe: Recipe) -> list[Row]:
    """How much of each metric's change is the model, and how much the text."""
    scores = [side.scores for side in sides]
    options = recipe.report
    return [
        (
            METRICS[part.metric].label,
            part.change,
            part.model,
            *(part.model_interval or (None, None)),
            part.text,
            *(part.text_interval or (None, None)),
            part.interaction,
        )
        for part in cross_text(
            [scores[:2], scores[2:]], bins=options.bins, resamples=options.resamples
        )
    ]


_MASS = ("edges", "before", "after", "change", *RANGE)
_MASS_NOTE = (
    "Share of each question's sum of |score| over real edges, averaged over questions; edges: the "
    "group's share of the edges themselves. From low to high: 95 % of the change of resampled "
    "questions."
)

EXTRAS: dict[str, Extra] = {
    "overlap": Extra(
        "Overlap of the circuits",
        "1 is the same circuit. Edges, nodes: Jaccard index of the strongest tenth of edges (by "
        "mean |score|) and of their ends; ranks: rank-biased overlap (p = 0.9). Halves: one half "
        "of the questions before, the other after. Null: 95 % of the halves of one model agree "
        "better; where halves is below null, the circuits differ by more than noise.",
        tuple(
            f"{name}{kind}"
            for name in ("edges", "ranks", "nodes")
            for kind in ("", " halves", " null")
        ),
        overlap_rows,
    ),
    "concentration": Extra(
        "Concentration of the scores",
        "Of |score| over real edges, question by question: Gini coefficient (0: all edges alike), "
        "and how many equal edges would be as spread out, exp(entropy). Change: as a fraction of "
        "the value before; from low to high: 95 % of it with resampled questions.",
        tuple(
            f"{name} {part}"
            for name in ("Gini", "edges")
            for part in ("before", "after", "change", "low", "high")
        ),
        concentration_rows,
    ),
    "mass": Extra(
        "Mass by attention and FFN", _MASS_NOTE, ("group", *_MASS), _mass_rows(mass.kinds)
    ),
    "layers": Extra("Mass by layer", _MASS_NOTE, ("group", *_MASS), _mass_rows(mass.layers)),
    "distances": Extra(
        "Mass by distance",
        "Layers from writer to reader; the input counts as layer -1, the logits as the layer "
        f"behind the last. {_MASS_NOTE}",
        ("layers", *_MASS),
        _mass_rows(mass.distances),
    ),
}
"""Every further table by its name; the one place to add one."""

CONTROL = Extra(
    "Cross-text control",
    "Each model is also scored on the other's answers. Model and text sum to the change; all are "
    "fractions of the value before, from low to high with 95 % of resampled questions. Both: what "
    "depends on model and text together, shared half and half; where large, the split says little.",
    (
        "metric",
        "change",
        *(f"{part}{end}" for part in ("model", "text") for end in ("", " low", " high")),
        "both",
    ),
    control_rows,
    tuple(side for row in SIDES for side in row),
)


def check_extras(recipe: Recipe) -> None:
    """Check that the tables that a recipe asks for are known.

    Raises:
        ProbeError: One is not.
    """
    for name in recipe.report.extra:
        if name not in EXTRAS:
            close = difflib.get_close_matches(name, EXTRAS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(EXTRAS)}"
            raise ProbeError(f"report.extra: there is no table {name!r}; {hint}")


def extra_tables(folder: RunFolder, recipe: Recipe, missing: list[str]) -> tuple[ExtraTable, ...]:
    """Compute the tables that a recipe asks for, from what the run folder holds.

    Args:
        folder: The run.
        recipe: Its recipe.
        missing: Gets a line for each cell of which edges are there, but not those of the control.
    """
    chosen = [CONTROL] if recipe.attribution.control == "cross-text" else []
    chosen += [EXTRAS[name] for name in dict.fromkeys(recipe.report.extra)]
    tables = []
    for extra in chosen:
        rows: list[Row] = []
        for choice in recipe.benchmarks:
            for pair in recipe.pairs:
                for alpha in recipe.selection.alpha:
                    cell = cell_name(pair, choice.name, alpha)
                    sides = _read_sides(folder, cell, extra.sides)
                    if sides:
                        place = (choice.name, pair.name, alpha)
                        rows += [(*place, *row) for row in extra.rows(sides, recipe)]
                    elif extra is CONTROL and _read_sides(folder, cell, ("before", "after")):
                        missing.append(f"{cell}: the cross-text control is not computed yet")
        if rows:
            tables.append(ExtraTable(extra.title, extra.note, PLACE + extra.columns, tuple(rows)))
    return tuple(tables)


def _read_sides(folder: RunFolder, cell: str, names: tuple[str, ...]) -> list[EdgeScores]:
    """Sides of a cell of the same questions; none where one is missing, which the cell says."""
    files = [folder.edges_file(cell, name) for name in names]
    try:
        sides = [folder.read_edges(file) for file in files]
        questions = [folder.sequence_ids(file) for file in files if file.exists()]
    except Damaged:
        return []
    if len(questions) < len(names) or questions.count(questions[0]) < len(names):
        return []
    return [side for side in sides if side]


def _paired(values: Array, recipe: Recipe, relative: bool) -> Row:
    """Means before and after, their change, and its interval; values are [side, question]."""
    old, new = (float(mean) if np.isfinite(mean) else None for mean in values.mean(1))
    if old is None or new is None or (relative and old == 0):
        return (old, new, None, None, None)
    olds, news = resample_means(values, recipe.report.resamples)
    scale = np.abs(olds) if relative else 1.0
    low, high = interval_of((news - olds) / scale) or (None, None)
    return (old, new, (new - old) / (abs(old) if relative else 1), low, high)
