"""The table of a training: which way each metric moves along its checkpoints.

Pairs of one base whose names end in a step, `grpo-step-100`, are checkpoints of one training, as
`[[trajectories]]` makes them.
"""

import re
from collections.abc import Iterator, Sequence

import numpy as np

from probe.metrics import METRICS, TOKEN_METRICS, Array
from probe.recipe import Comparison, Recipe
from probe.report._extra_rows import Case, Row, edges_of
from probe.stats._statistics import defined, flip_all, t_interval, units_of
from probe.stats._trajectory import question_slopes
from probe.store import Missing, RunFolder

TITLE = "Along the training"
NOTE = (
    "Slope: of log(after / before) on the log of the step, question by question, over the "
    "questions that all checkpoints have in common; 0: no drift. From low to high: 95 % t "
    "interval; p: flips of the signs of questions, not corrected for how many rows there are. "
    "Text: each checkpoint on its own answers, or all on those of the base (with the cross-text "
    "control). One training is one sample: this is about other questions, not about other "
    "trainings."
)
COLUMNS = (
    *("benchmark", "training", "alpha", "text", "metric"),
    *("slope", "low", "high", "p", "questions", "checkpoints"),
)

_STEP = re.compile(r"(.+)-step-(\d{1,18})")
_TEXTS = (("own", "after"), ("of the base", "after-on-before"))
_LEAST = 3
"""Checkpoints, and questions, below which there is no slope."""


def trajectory_rows(folder: RunFolder, recipe: Recipe) -> list[Row]:
    """The slopes of every training of a recipe, as far as its checkpoints are scored."""
    rows: list[Row] = []
    for (name, benchmark, alpha), training in trainings(recipe).items():
        cases = [(step, Case(folder, recipe, one)) for step, one in sorted(training)]
        for text, side in _TEXTS:
            here = [
                (step, case)
                for step, case in cases
                if step > 0 and folder.edges_file(case.name, side).exists()
            ]
            if len(here) >= _LEAST:
                rows += [(benchmark, name, alpha, text, *row) for row in _slopes(here, side)]
    return rows


def trainings(
    recipe: Recipe,
) -> dict[tuple[str, str, float], list[tuple[int, Comparison]]]:
    """Steps and comparisons of each training, by its name, the benchmark and alpha."""
    found: dict[tuple[str, str, str, float], list[tuple[int, Comparison]]] = {}
    for one in recipe.comparisons(by="benchmark"):
        if named := _STEP.fullmatch(one.pair.name):
            key = named[1], one.pair.before, one.benchmark, one.alpha
            found.setdefault(key, []).append((int(named[2]), one))
    return {(name, bench, alpha): steps for (name, _, bench, alpha), steps in found.items()}


def _slopes(cases: Sequence[tuple[int, Case]], side: str) -> Iterator[Row]:
    """A row of each metric that is compared by ratios."""
    try:
        scored = [case.sides("before", side) for _, case in cases]
    except Missing:  # the report itself says which edges are not there
        return
    shared = [q for q in scored[0][0].ids if all(q in before.ids for before, _ in scored)]
    if len(shared) < _LEAST:
        return
    places = [[list(before.ids).index(q) for q in shared] for before, _ in scored]
    entries = [(edges_of(before), edges_of(after)) for before, after in scored]
    units = units_of(cases[0][1].clusters(shared), len(shared))
    for metric in (METRICS | TOKEN_METRICS).values():
        estimand = metric.estimand
        if estimand is None or estimand.form != "ratio":
            continue
        pairs: list[tuple[Array, Array]] = [
            (before.parts(estimand.values)[rows], after.parts(estimand.values)[rows])
            for (before, after), rows in zip(entries, places, strict=True)
        ]
        known = np.all([defined("ratio", *pair) for pair in pairs], axis=0)
        if known.sum() < _LEAST:
            continue
        logs = np.stack([np.log(after[known] / before[known]) for before, after in pairs])
        slopes = question_slopes(logs, [step for step, _ in cases])
        (p_value,) = flip_all([(slopes, units[known])])
        low, high = t_interval(slopes, units[known]) or (None, None)
        counts = int(known.sum()), len(cases)
        yield (estimand.label, float(slopes.mean()), low, high, p_value, *counts)
