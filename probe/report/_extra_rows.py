"""Rows of the extra tables, one function each, from a case of a run to rows.

>>> rows = overlap_rows(Case(RunFolder(Path("runs/tiny-math")), recipe, comparison))
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import numpy as np

from probe.attribution import EdgeScores
from probe.checkpoints import WeightChange, by_kind
from probe.metrics import METRICS, TOKEN_METRICS, Array, Entries, metric_named
from probe.models import Graph
from probe.recipe import Comparison, Recipe
from probe.report._matched import matched_questions, temperatures_of
from probe.stats import (
    SIDES,
    Interval,
    Units,
    compare_circuits,
    contributions,
    cross_text,
    t_interval,
    units_of,
)
from probe.stats import _mass as mass
from probe.store import TEXTS, Missing, RunFolder, states_file, tokens_file, weights_file

Row = tuple[str | float | None, ...]


class Case(NamedTuple):
    """What a table may have rows for: one comparison of a run."""

    folder: RunFolder
    """The run."""

    recipe: Recipe
    """Its recipe."""

    comparison: Comparison
    """Which pair, on which benchmark, at which alpha."""

    @property
    def name(self) -> str:
        """Its part of file names."""
        return self.comparison.name

    def sides(self, *names: str) -> list[EdgeScores]:
        """Edges of the same questions.

        Raises:
            Missing: A side is not there, or of other questions.
        """
        return self.folder.read_sides(self.name, *names)

    def clusters(self, questions: Sequence[str]) -> list[str | None]:
        """The cluster of each of these questions; None: of one that is alone."""
        known = self.folder.read_clusters(self.comparison.benchmark)
        return [known.get(question) for question in questions]

    @property
    def units(self) -> Units:
        """The cluster of each question of its edges, as a number."""
        (before,) = self.sides("before")
        questions = before.ids
        return units_of(self.clusters(questions), len(questions))

    def measured(self, file: str) -> dict[str, object]:
        """What an extra pass has left.

        Raises:
            Missing: Nothing, or something damaged.
        """
        return self.folder.read_measured(file)


def overlap_rows(case: Case) -> list[Row]:
    """How much the circuits of both models have in common."""
    before, after = case.sides("before", "after")
    tested = case.recipe.report.resamples > 0
    units = case.units if tested else None
    found = compare_circuits(before.scores, after.scores, before.graph, units)
    row: list[float | None] = []
    for name in found.models._fields:
        row += [part and getattr(part, name) for part in found]
    return [tuple(row)]


def concentration_rows(case: Case) -> list[Row]:
    """How concentrated the scores of real edges are, question by question."""
    sides = case.sides("before", "after")
    values = [mass.gini(np.abs(edges_of(side).values)) for side in sides]
    return [("Gini coefficient", *_paired(np.stack(values), case, relative=True))]


def mass_rows(groups: Callable[[Graph], mass.Groups]) -> Callable[[Case], list[Row]]:
    """How much of the mass each group of edges holds."""

    def rows(case: Case) -> list[Row]:
        sides = case.sides("before", "after")
        parts = groups(sides[0].graph)
        before, after = (mass.shares(edges_of(side).strengths, parts) for side in sides)
        return [
            (
                name,
                float(chosen.mean()),
                *_paired(np.stack([old, new]), case, relative=False),
            )
            for (name, chosen), old, new in zip(parts, before, after, strict=True)
        ]

    return rows


def control_rows(case: Case) -> list[Row]:
    """How much of each metric's change is the model, and how much the text."""
    scored = case.sides(*(side for row in SIDES for side in row))
    sides = [edges_of(side) for side in scored]
    found = cross_text(
        [sides[:2], sides[2:]],
        clusters=case.clusters(scored[0].ids),
        metrics=METRICS | TOKEN_METRICS,
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
        estimand = metric_named(part.metric).estimand
        rows.append((estimand.label if estimand else part.metric, *percent))
    return rows


def split_rows(case: Case) -> list[Row]:
    """How much of each change by ratios is sharpness, and how much is left at equal loss."""
    names = ("before", "before-matched", "after-matched", "after")
    scored = case.sides(*names)
    sides, ids = [edges_of(side) for side in scored], scored[0].ids
    units = units_of(case.clusters(ids), len(ids))
    counted = np.array(matched_questions(case.folder, case.name, "loss-matched", ids))
    old, new = (temperatures_of(case.folder, case.name, side) for side in names[1:3])
    ratios = [(new[name] or 1) / (old[name] or 1) for name in np.array(ids)[counted]]
    temperature = float(np.exp(np.log(ratios).mean())) if ratios else None
    rows: list[Row] = []
    for metric in METRICS.values():
        if metric.estimand is None or metric.estimand.form != "ratio":
            continue
        values = [side.parts(metric.estimand.values) for side in sides]
        known = np.all([side > 0 for side in values], axis=0) & counted
        if known.sum() < 2:
            continue
        raw, before, after, end = (np.log(side[known]) for side in values)
        rest = after - before
        row: list[float | None] = [100 * float(np.expm1((end - raw).mean()))]
        for part in (end - raw - rest, rest):
            ends = t_interval(part, units[known])
            row += [100 * float(np.expm1(x)) for x in (part.mean(), *(ends or ()))]
            row += [None] * (0 if ends else 2)
        rows.append((metric.estimand.label, *row, temperature))
    return rows


def divergence_rows(case: Case) -> list[Row]:
    """How far the next token's probabilities of both models are apart on the same answers."""
    selection = case.folder.read_selection(case.name)
    if selection is None:
        raise Missing("not selected yet")
    row: Row = ()
    for text in TEXTS:
        table = case.measured(states_file(case.comparison.pair, case.comparison.benchmark, text))
        tokens = cast(list[list[float]], table["divergences"])
        values = np.array([np.mean(line[: selection.cut_length]) for line in tokens])
        units = units_of(case.clusters(selection.ids), len(values))
        row += (float(values.mean()), *_ends(t_interval(values, units), case))
    return [row]


def similarity_rows(case: Case) -> list[Row]:
    """How alike the residual streams of both models are on the same answers."""
    tables = [
        case.measured(states_file(case.comparison.pair, case.comparison.benchmark, text))
        for text in TEXTS
    ]
    values = [cast(list[float], table[name]) for name in ("cosines", "cka") for table in tables]
    layers = len(values[0]) - 1
    names = [f"layer {layer}" for layer in range(layers)] + ["logits"]
    return [(name, *row) for name, row in zip(names, zip(*values, strict=True), strict=True)]


def token_rows(case: Case) -> list[Row]:
    """Which part of the scores lies at the question, at the answer, and at one token."""
    sides = []
    for side in TEXTS:
        name = tokens_file(case.comparison.pair, case.comparison.benchmark, side)
        found = cast(list[dict[str, Any]], case.measured(name)["questions"])
        (edges,) = case.sides(side)
        if tuple(row["id"] for row in found) != edges.ids:
            raise Missing(f"{name}: of other questions; run the recipe again")
        prompt = [sum(row["shares"][: row["prompt"]]) for row in found]
        sides.append([prompt, [1 - share for share in prompt], [max(r["shares"]) for r in found]])
    values = np.array(sides).transpose(1, 0, 2)  # [part, side, question]
    names = ("question", "answer", "strongest token")
    return [
        (name, *_paired(part, case, relative=False))
        for name, part in zip(names, values, strict=True)
    ]


def weight_rows(case: Case) -> list[Row]:
    """How far each kind of matrix moved."""
    return [tuple(vars(kind).values()) for kind in by_kind(moved_matrices(case))]


def moved_matrices(case: Case) -> list[WeightChange]:
    """How far each matrix of a pair moved.

    Raises:
        Missing: That was not measured.
    """
    table = case.measured(weights_file(case.comparison.pair))
    return [WeightChange(**matrix) for matrix in cast(list[dict[str, Any]], table["matrices"])]


def edges_of(side: EdgeScores) -> Entries:
    """The scores of a side, for the metrics."""
    return Entries(side.scores, side.graph.mask, dense=True, entropies=side.entropies)


def _paired(values: Array, case: Case, relative: bool) -> Row:
    """Means before and after; their change in percent, of the mean before or in points; interval.

    Args:
        values: A value of each question on each side, [side, question].
        case: Where they are from.
        relative: Whether the change is beside the mean before.
    """
    old, new = (float(mean) if np.isfinite(mean) else None for mean in values.mean(1))
    if old is None or new is None or (relative and old == 0):
        return (old, new, None, None, None)
    found = contributions("mean", *values) if relative else None
    change = (new - old) / (abs(old) if relative else 1)
    ends = t_interval(found.to_change if found else values[1] - values[0], case.units)
    return (old, new, 100 * change, *_ends(ends, case, 100))


def _ends(interval: Interval | None, case: Case, scale: float = 1) -> Row:
    """The two ends of an interval, unless the recipe leaves statistics out."""
    if interval is None or not case.recipe.report.resamples:
        return (None, None)
    return tuple(scale * end for end in interval)
