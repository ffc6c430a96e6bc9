"""Cells: one metric of one pair on one benchmark at one alpha, and what is known of its change.

A cell has two numbers, apart: ours, which is a number of each question and carries all statistics,
and the paper's, for comparison with print, which carries none. A control is a cell more, of the
same metric, with edges that were scored otherwise.

    >>> cells = make_cells(("sft-grpo", "tiny-math", 0.3), before, after, bins=100, flips=20_000)
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

import numpy as np

from probe.attribution import EdgeScores
from probe.metrics import (
    METRICS,
    TOKEN_METRICS,
    Entries,
    Metric,
    metric_named,
    paper_number,
)
from probe.stats._accuracy import compare_accuracy
from probe.stats._results import LEVEL, SMALLEST, Accuracy, Cell, Change, Influence
from probe.stats._statistics import compare_sides, holm, paper_numbers

_SIGNS = {"up": 1, "down": -1}


def make_cells(
    where: tuple[str, str, float],
    before: EdgeScores,
    after: EdgeScores,
    *,
    bins: int,
    flips: int,
    clusters: Sequence[str | None] | None = None,
    control: str = "",
    metrics: Mapping[str, Metric] | None = None,
    counted: Sequence[bool] | None = None,
) -> list[Cell]:
    """The cells of a pair on a benchmark at an alpha, a metric each.

    Args:
        where: The pair's name, the benchmark's, and alpha.
        before: Edges of the model before.
        after: Those of the model after, of the same questions in the same order.
        bins: Bins of the histograms of the paper's entropies.
        flips: How many sign flips a p-value is from; 0 leaves all statistics out.
        clusters: The cluster of each question; None: of a question that is alone.
        control: What was held fixed.
        metrics: Which metrics, by their names.
        counted: Which questions count; all do if not given.
    """
    metrics = METRICS | TOKEN_METRICS if metrics is None else metrics
    questions = len(before)
    if counted is not None and not all(counted):
        before, after = before[list(counted)], after[list(counted)]
        clusters = clusters and [
            name for name, counts in zip(clusters, counted, strict=True) if counts
        ]
    old, new = (
        Entries(side.scores, side.graph.mask, dense=True, entropies=side.entropies)
        for side in (before, after)
    )
    found = compare_sides(old, new, clusters=clusters, flips=flips, metrics=metrics)
    cells = []
    for name, metric in metrics.items():
        first, second, influenced = paper_numbers(metric, old, new, bins)
        real = [paper_number(metric, side.without_zeros(), bins) for side in (old, new)]
        statistics = found[name]
        cells.append(
            Cell(
                *where,
                metric=name,
                paper=change_of(first, second),
                real_edges=change_of(*real),
                control=control,
                **vars(statistics) | {"influence": _named(statistics.influence, before.ids)},
                left_out=questions - statistics.samples if metric.estimand else 0,
                paper_influence=_named(influenced, before.ids),
                paper_direction=metric.direction,
                as_in_paper=verdict(name, statistics.change),
            )
        )
    return cells


def verdict(metric: str, change: float | None) -> bool | None:
    """Whether a change has the direction that the paper reports for online RL."""
    direction = metric_named(metric).direction
    return None if change is None or direction is None else change * _SIGNS[direction] > 0


def make_accuracy(
    pair: str,
    benchmark: str,
    before: Sequence[bool],
    after: Sequence[bool],
    *,
    clusters: Sequence[str | None] | None,
    flips: int,
) -> Accuracy:
    """How many questions two models solve, as a row of the report."""
    if not flips:
        old, new = (sum(side) / len(side) for side in (before, after))
        return Accuracy(pair, benchmark, old, new, len(before))
    return Accuracy(pair, benchmark, **asdict(compare_accuracy(before, after, clusters, flips)))


def judged_cells(cells: Sequence[Cell]) -> list[Cell]:
    """The cells with what depends on all of them."""
    adjusted = _adjusted([cell.p_value for cell in cells])
    return [
        replace(cell, p_holm=p, significant=None if p is None else _starred(p, cell.change))
        for cell, p in zip(cells, adjusted, strict=True)
    ]


def judged_accuracy(rows: Sequence[Accuracy]) -> list[Accuracy]:
    """The accuracies with what depends on all of them."""
    adjusted = _adjusted([row.p_value for row in rows])
    return [
        replace(row, p_holm=p, significant=None if p is None else p < LEVEL)
        for row, p in zip(rows, adjusted, strict=True)
    ]


def change_of(before: float, after: float) -> Change:
    """Two values and their relative change, as far as these are numbers."""
    old, new = (float(value) if np.isfinite(value) else None for value in (before, after))
    if old is None or new is None or old == 0:
        return Change(old, new, None)
    return Change(old, new, (new - old) / abs(old))


def _starred(p_holm: float, change: float | None) -> bool:
    return p_holm < LEVEL and change is not None and abs(change) >= SMALLEST


def _named(found: Influence | None, ids: Sequence[str]) -> Influence | None:
    return found and replace(found, question=ids[int(found.question)])


def _adjusted(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's adjustment of those that are known."""
    adjusted = iter(holm([p for p in p_values if p is not None]))
    return [None if p is None else next(adjusted) for p in p_values]
