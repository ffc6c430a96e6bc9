"""Rows of the extra tables, one function each, from a cell of a run to rows.

>>> rows = overlap_rows(Cell(RunFolder(Path("runs/tiny-math")), recipe, pair, "tiny-math", 0.5))
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import numpy as np

from probe import mass
from probe.control import SIDES, cross_text
from probe.edges import EdgeScores
from probe.extra_passes import TEXTS, states_file, weights_file
from probe.graph import Graph
from probe.metrics import TOKEN_METRICS, Array, metric_named, strengths
from probe.overlap import compare_circuits
from probe.recipe import Pair, Recipe
from probe.run_folder import Damaged, RunFolder, cell_name
from probe.statistics import interval_of, resample_means
from probe.weights import WeightChange, by_kind

Row = tuple[str | float | None, ...]


class Cell(NamedTuple):
    """What a table may have rows for: one pair on one benchmark at one alpha."""

    folder: RunFolder
    """The run."""

    recipe: Recipe
    """Its recipe."""

    pair: Pair
    """The pair."""

    benchmark: str
    """The benchmark's name."""

    alpha: float
    """Scored length as a share of the reference length."""

    @property
    def name(self) -> str:
        """Its part of file names."""
        return cell_name(self.pair, self.benchmark, self.alpha)

    def sides(self, *names: str) -> list[EdgeScores]:
        """Edges of the same questions.

        Raises:
            Missing: A side is not there, or of other questions.
        """
        files = [self.folder.edges_file(self.name, name) for name in names]
        try:
            sides = [self.folder.read_edges(file) for file in files]
            questions = [self.folder.sequence_ids(file) for file in files if file.exists()]
        except Damaged as error:
            raise Missing(str(error)) from error
        if None in sides:
            raise Missing("not computed yet")
        if questions.count(questions[0]) < len(names):
            raise Missing("of different questions")
        return [side for side in sides if side]

    def measured(self, file: str) -> dict[str, object]:
        """What an extra pass has left.

        Raises:
            Missing: Nothing, or something damaged.
        """
        try:
            table = self.folder.read_json(file)
        except Damaged as error:
            raise Missing(str(error)) from error
        if table is None:
            raise Missing("not measured yet; run the recipe again")
        return table


class Missing(Exception):
    """What a table needs is not there; the message says why."""


def overlap_rows(cell: Cell) -> list[Row]:
    """How much the circuits of both models have in common."""
    before, after = cell.sides("before", "after")
    found = compare_circuits(before.scores, after.scores, before.graph)
    row: list[float | None] = []
    for name in found.models._fields:
        row += [part and getattr(part, name) for part in found]
    return [tuple(row)]


def concentration_rows(cell: Cell) -> list[Row]:
    """How concentrated the scores of real edges are, question by question."""
    sides = cell.sides("before", "after")
    values = [strengths(side.scores, side.graph.mask) for side in sides]
    measures = {"Gini coefficient": mass.gini, "effective edges": mass.effective_edges}
    return [
        (name, *_paired(np.stack([measure(side) for side in values]), cell.recipe, relative=True))
        for name, measure in measures.items()
    ]


def mass_rows(groups: Callable[[Graph], mass.Groups]) -> Callable[[Cell], list[Row]]:
    """How much of the mass each group of edges holds."""

    def rows(cell: Cell) -> list[Row]:
        sides = cell.sides("before", "after")
        parts = groups(sides[0].graph)
        before, after = (
            mass.shares(strengths(side.scores, side.graph.mask), parts) for side in sides
        )
        return [
            (
                name,
                float(chosen.mean()),
                *_paired(np.stack([old, new]), cell.recipe, relative=False),
            )
            for (name, chosen), old, new in zip(parts, before, after, strict=True)
        ]

    return rows


def control_rows(cell: Cell) -> list[Row]:
    """How much of each metric's change is the model, and how much the text."""
    options = cell.recipe.report
    sides = cell.sides(*(side for row in SIDES for side in row))
    of_edges, of_tokens = [s.scores for s in sides], [s.entropies for s in sides]
    found = cross_text(
        [of_edges[:2], of_edges[2:]], bins=options.bins, resamples=options.resamples
    ) + cross_text(
        [of_tokens[:2], of_tokens[2:]], resamples=options.resamples, metrics=TOKEN_METRICS
    )
    rows: list[Row] = []
    for part in found:
        none = (None, None)
        values = (
            part.change,
            *(part.model, *(part.model_interval or none)),
            *(part.text, *(part.text_interval or none)),
            part.interaction,
        )
        percent = (None if value is None else 100 * value for value in values)
        rows.append((metric_named(part.metric).label, *percent))
    return rows


def divergence_rows(cell: Cell) -> list[Row]:
    """How far the next token's probabilities of both models are apart on the same answers."""
    selection = cell.folder.read_selection(cell.name)
    if selection is None:
        raise Missing("not selected yet")
    row: Row = ()
    for text in TEXTS:
        table = cell.measured(states_file(cell.pair, cell.benchmark, text))
        tokens = cast(list[list[float]], table["divergences"])
        values = np.array([np.mean(line[: selection.cut_length]) for line in tokens])
        drawn = resample_means(values[None], cell.recipe.report.resamples)[0]
        row += (float(values.mean()), *(interval_of(drawn) or (None, None)))
    return [row]


def similarity_rows(cell: Cell) -> list[Row]:
    """How alike the residual streams of both models are on the same answers."""
    tables = [cell.measured(states_file(cell.pair, cell.benchmark, text)) for text in TEXTS]
    values = [cast(list[float], table[name]) for name in ("cosines", "cka") for table in tables]
    layers = len(values[0]) - 1
    names = [f"layer {layer}" for layer in range(layers)] + ["logits"]
    return [(name, *row) for name, row in zip(names, zip(*values, strict=True), strict=True)]


def weight_rows(cell: Cell) -> list[Row]:
    """How far each kind of matrix moved."""
    table = cell.measured(weights_file(cell.pair))
    matrices = cast(list[dict[str, Any]], table["matrices"])
    changes = [WeightChange(**matrix) for matrix in matrices]
    return [tuple(vars(kind).values()) for kind in by_kind(changes)]


def _paired(values: Array, recipe: Recipe, relative: bool) -> Row:
    """Means before and after; their change in percent, of the mean before or in points; interval.

    Args:
        values: A value of each question on each side, [side, question].
        recipe: How often to resample.
        relative: Whether the change is beside the mean before.
    """
    old, new = (float(mean) if np.isfinite(mean) else None for mean in values.mean(1))
    if old is None or new is None or (relative and old == 0):
        return (old, new, None, None, None)
    olds, news = resample_means(values, recipe.report.resamples)
    drawn = 100 * (news - olds) / (np.abs(olds) if relative else 1)
    change = 100 * (new - old) / (abs(old) if relative else 1)
    return (old, new, change, *(interval_of(drawn) or (None, None)))
