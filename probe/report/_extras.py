"""Extras: what else users of a model pair expect, one table each.

A recipe chooses them, `report.extra = ["overlap", "mass"]`. Those of a run's edges cost next to
nothing, and two of them are in every report; the others cost a pass, and are on request. The
cross-text control has its table where the recipe asks for it (`attribution.control`).

An extra is a row of `EXTRAS`: columns, and a function of `_extra_rows` from a case to rows.

    >>> tables, missing = extra_tables(RunFolder(Path("runs/tiny-math")), read_recipe("tiny-math"))
    >>> tables[0].title
    'Overlap of the circuits'
"""

import difflib
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

from probe.errors import ProbeError
from probe.recipe import Recipe
from probe.registry import Registry
from probe.report._extra_rows import (
    Case,
    Row,
    concentration_rows,
    control_rows,
    divergence_rows,
    mass_rows,
    overlap_rows,
    similarity_rows,
    split_rows,
    token_rows,
    weight_rows,
)
from probe.report._report import ExtraTable
from probe.report._trajectory import (
    CHECKPOINT_COLUMNS,
    CHECKPOINTS,
    CHECKPOINTS_NOTE,
    COLUMNS,
    NOTE,
    SEED_COLUMNS,
    SEEDS,
    SEEDS_NOTE,
    TITLE,
    checkpoint_rows,
    seed_rows,
    trajectory_rows,
)
from probe.stats import _mass as mass
from probe.store import Missing, RunFolder

_CHANGE = ("change %", "low %", "high %")


class Extra(NamedTuple):
    """A table beside the cells."""

    title: str
    """What it shows."""

    note: str
    """How to read it."""

    columns: tuple[str, ...]
    """Its columns, behind those that say where a row belongs."""

    rows: Callable[[Case], list[Row]]
    """The rows of one case."""

    needs: Literal["edges", "states", "weights", "tokens"] = "edges"
    """What it is computed from; all but edges cost another pass."""

    where: tuple[Literal["benchmark", "pair", "alpha"], ...] = ("benchmark", "pair", "alpha")
    """What tells its rows apart. Without alpha, a table is of the largest one."""


_MASS = ("edges", "before", "after", *_CHANGE)
_MASS_NOTE = (
    "Share of each question's sum of |score| over real edges, averaged over questions; edges: the "
    "group's share of the edges themselves. Change in percentage points; from low to high: 95 % t "
    "interval of it."
)

_ROWS: dict[str, Extra] = {
    "overlap": Extra(
        "Overlap of the circuits",
        "1 is the same circuit. Edges, nodes: Jaccard index of the strongest tenth of edges (by "
        "their mean share of a question's |scores|) and of their ends; ranks: rank-biased overlap "
        "(p = 0.9). Chance: the same where the two models' matrices of each question are exchanged "
        "at random; p: how often they are then as unlike.",
        tuple(
            f"{name}{kind}"
            for name in ("edges", "ranks", "nodes")
            for kind in ("", " chance", " p")
        ),
        overlap_rows,
    ),
    "concentration": Extra(
        "Concentration of the scores",
        "Of |score| over real edges, question by question; 0: all edges alike. From low to high: "
        "95 % t interval of the change.",
        ("of", "before", "after", *_CHANGE),
        concentration_rows,
    ),
    "mass": Extra(
        "Mass by attention and FFN", _MASS_NOTE, ("group", *_MASS), mass_rows(mass.kinds)
    ),
    "layers": Extra("Mass by layer", _MASS_NOTE, ("group", *_MASS), mass_rows(mass.layers)),
    "distances": Extra(
        "Mass by distance",
        "Layers from writer to reader; the input counts as layer -1, the logits as the layer "
        f"behind the last. {_MASS_NOTE}",
        ("layers", *_MASS),
        mass_rows(mass.distances),
    ),
    "token-kl": Extra(
        "Divergence of the next token",
        "KL(after || before) in nats, averaged over scored tokens and then over questions, where "
        "both models read the answers of the model before, and those of the model after. From low "
        "to high: 95 % t interval.",
        tuple(f"on {text}{end}" for text in ("before", "after") for end in ("", " low", " high")),
        divergence_rows,
        needs="states",
    ),
    "residual": Extra(
        "Similarity of the residual streams",
        "Before each layer and at the end, where both models read the same answers (those of the "
        "model before; of the model after), at the positions that predict a scored token of the "
        "largest alpha. Cosine: mean over positions. CKA: linear, unbiased.",
        ("before", "cosine on before", "cosine on after", "CKA on before", "CKA on after"),
        similarity_rows,
        needs="states",
        where=("benchmark", "pair"),
    ),
    "tokens": Extra(
        "Scores by token",
        "Share of each question's sum of |score| over edges and positions, at the tokens of the "
        "question, at those of the answer, and at the one token that has most; at the largest "
        "alpha, averaged over questions. Change in percentage points; from low to high: 95 % t "
        "interval of it. Each question's own are beside its answers.",
        ("at", "before", "after", *_CHANGE),
        token_rows,
        needs="tokens",
        where=("benchmark", "pair"),
    ),
    "weights": Extra(
        "Change of the weights",
        "Frobenius norm of after - before beside that of before: of all layers as one, of the "
        "layer that moved least, and of the one that moved most. Unchanged: share of entries with "
        "the same value. RUN/extras has every matrix.",
        ("matrix", "layers", "moved", "least", "most", "unchanged"),
        weight_rows,
        needs="weights",
        where=("pair",),
    ),
}

EXTRAS = Registry("table", Extra, _ROWS, takes="rows")
"""Every further table by its name; the one place to add one."""

CROSS_TEXT = Extra(
    "Cross-text control",
    "Each model is also scored on the other's answers. Model and text sum to the change in percent "
    "of the value before; where the metric is compared by ratios, they multiply to it. From low to "
    "high: 95 % t interval. Both: what depends on model and text together, shared half and half; "
    "where large, the split says little.",
    (
        "metric",
        "change %",
        *(f"{part}{end} %" for part in ("model", "text") for end in ("", " low", " high")),
        "both %",
    ),
    control_rows,
)

SPLIT = Extra(
    "Sharpness and the rest",
    "The change as a product of two: what the surer model's sharpness does, and what is left where "
    "each question has equal loss, which is circuit and text together. From low to high: 95 % t "
    "interval. Temperature: what the logits of the model after are divided by for equal loss, "
    "beside those of the model before; the geometric mean over questions.",
    (
        "metric",
        "change %",
        *(f"{part}{end} %" for part in ("sharpness", "rest") for end in ("", " low", " high")),
        "temperature",
    ),
    split_rows,
)

_CONTROLLED = {
    "loss-matched": ("sharpness split", SPLIT),
    "cross-text": ("cross-text control", CROSS_TEXT),
}
"""The tables that come with a control."""


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
        if recipe.compute.remote and EXTRAS[name].needs != "edges":
            raise ProbeError(
                f"report.extra: a run on a server does not measure what the table {name!r} is of; "
                "leave it out, or run without --remote"
            )
        if EXTRAS[name].needs == "tokens":
            from probe.attribution import check_placed  # brings every method, and what they run on

            check_placed(recipe.attribution.method)


def extra_tables(
    folder: RunFolder, recipe: Recipe
) -> tuple[tuple[ExtraTable, ...], tuple[str, ...]]:
    """Compute the tables that a recipe asks for, from what the run folder holds.

    Returns:
        The tables that have rows; and a line for what is not there though the edges of its
        comparison are.
    """
    chosen = {name: EXTRAS[name] for name in recipe.report.extra}
    for control, (name, extra) in _CONTROLLED.items():
        if control in recipe.attribution.control:
            chosen = {name: extra, **chosen}
    tables: list[ExtraTable] = []
    missing: list[str] = []
    for name, extra in chosen.items():
        rows: list[Row] = []
        for where, case in _cases(extra, folder, recipe):
            try:
                rows += [(*where, *row) for row in extra.rows(case)]
            except Missing as error:
                # Of the edges that every table needs, the report itself says it.
                if name not in recipe.report.extra or extra.needs != "edges":
                    missing.append(f"{name} of {case.name}: {error}")
        if rows:
            columns = (*extra.where, *extra.columns)
            tables.append(ExtraTable(extra.title, extra.note, columns, tuple(rows)))
    if rows := checkpoint_rows(folder, recipe):
        tables.append(ExtraTable(CHECKPOINTS, CHECKPOINTS_NOTE, CHECKPOINT_COLUMNS, tuple(rows)))
    if slopes := trajectory_rows(folder, recipe):
        tables.append(ExtraTable(TITLE, NOTE, COLUMNS, tuple(slopes)))
        if seeds := seed_rows(slopes):
            tables.append(ExtraTable(SEEDS, SEEDS_NOTE, SEED_COLUMNS, tuple(seeds)))
    return tuple(tables), tuple(missing)


def _cases(
    extra: Extra, folder: RunFolder, recipe: Recipe
) -> Iterator[tuple[tuple[str | float, ...], Case]]:
    """What a table has rows for, each with the values that tell its rows apart."""
    seen = set()
    largest = max(recipe.selection.alpha, default=None)
    for comparison in recipe.comparisons(by="benchmark"):
        if "alpha" not in extra.where and comparison.alpha != largest:
            continue
        values: dict[str, str | float] = {
            "benchmark": comparison.benchmark,
            "pair": comparison.pair.name,
            "alpha": comparison.alpha,
        }
        where = tuple(values[part] for part in extra.where)
        if where not in seen and folder.edges_file(comparison.name, "after").exists():
            seen.add(where)
            yield where, Case(folder, recipe, comparison)
