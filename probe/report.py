"""The report: each metric before and after, and whether it moved as the paper says RL moves it.

A cell is one metric of one pair on one benchmark at one alpha. Cells are computed from the edges
in a run folder, so a finished or half-finished run can be reported again at any time.

    >>> report = build_report(Path("runs/tiny-math"))
    >>> print_report(report, "markdown")
"""

import csv
import io
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from probe.agreement import Agreement, agreement_from, markdown_lines, view
from probe.attribution import EdgeScores
from probe.errors import ProbeError
from probe.metrics import METRICS, compute_metric
from probe.recipe import Pair, Recipe, recipe_from
from probe.run_folder import SCHEMA, Damaged, RunFolder

Format = Literal["table", "markdown", "json", "csv"]
_SIGNS = {"up": 1, "down": -1}
COLUMNS = ("alpha", "metric", "before → after", "change", "as paper", "real edges")


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
    """A name in `probe.metrics.METRICS`."""

    before: float | None
    """The model before, over the dense matrix with its structural zeros."""

    after: float | None
    """The model after."""

    change: float | None
    """(after - before) / |before|, a fraction."""

    samples: int
    """How many questions it is computed from."""

    paper_direction: Literal["up", "down"]
    """How the paper reports that online RL moves this metric."""

    as_in_paper: bool | None
    """Whether it moved that way; None where the change is not defined."""

    real_edges: Change
    """The same over real edges only."""


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
            "missing": list(self.missing),
        }


def cell_name(pair: Pair, benchmark: str, alpha: float) -> str:
    """The part of a file name that says which cell of a run it belongs to."""
    return f"{pair.name}.{benchmark}.alpha-{alpha:g}"


def model_names(recipe: Recipe) -> dict[tuple[str, str, int], str]:
    """A file name for each model as it is asked: by reference, prompt and longest answer.

    A model that two pairs ask in the same way has one name, and so is asked once.
    """
    names: dict[tuple[str, str, int], str] = {}
    for pair in recipe.pairs:
        for model in (pair.before, pair.after):
            use = (model, pair.prompt, pair.max_new_tokens)
            if use not in names:
                parts = model.removeprefix("probe:").rstrip("/").split("/")[-2:]
                name = plain = "--".join(part.strip(".~ ") for part in parts if part.strip(".~ "))
                number = 2
                while name in names.values():
                    name, number = f"{plain}-{number}", number + 1
                names[use] = name
    return names


def first_names(recipe: Recipe) -> dict[str, str]:
    """The first of the names that `model_names` gives each model."""
    names: dict[str, str] = {}
    for (reference, _, _), name in model_names(recipe).items():
        names.setdefault(reference, name)
    return names


def faithfulness_file(model: str) -> str:
    """Where in the run folder the exact effects of a model's edges are, by its first name."""
    return f"faithfulness/{model}.json"


def build_report(path: Path) -> Report:
    """Compute a run's report from what its folder holds.

    Raises:
        ProbeError: The folder is not a run's.
    """
    folder = RunFolder(path)
    recipe = recipe_from(folder.read_record()["recipe"], str(folder.record))
    cells: list[Cell] = []
    missing: list[str] = []
    accuracy = []
    for benchmark in (choice.name for choice in recipe.benchmarks):
        for pair in recipe.pairs:
            accuracy.append(_accuracy(folder, recipe, pair, benchmark))
            for alpha in recipe.selection.alpha:
                name = cell_name(pair, benchmark, alpha)
                try:
                    before, after = (
                        folder.read_edges(folder.edges_file(name, side))
                        for side in ("before", "after")
                    )
                except Damaged as error:
                    missing.append(f"{name}: {error}")
                    continue
                if before is None or after is None:
                    missing.append(f"{name}: not computed yet")
                    continue
                bins = recipe.report.bins
                cells += _cells(pair.name, benchmark, alpha, before, after, bins)
    faithfulness = _faithfulness(folder, recipe, missing)
    known = tuple(row for row in accuracy if row)
    return Report(recipe, tuple(cells), known, tuple(missing), faithfulness)


def _faithfulness(folder: RunFolder, recipe: Recipe, missing: list[str]) -> tuple[Agreement, ...]:
    found: list[Agreement] = []
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
    return tuple(found)


def _accuracy(folder: RunFolder, recipe: Recipe, pair: Pair, benchmark: str) -> Accuracy | None:
    names = model_names(recipe)
    sides = []
    for model in (pair.before, pair.after):
        name = names[model, pair.prompt, pair.max_new_tokens]
        solutions, _ = folder.read_solutions(folder.solutions_file(name, benchmark))
        sides.append([solution.correct for solution in solutions])
    if not sides[0] or len(sides[0]) != len(sides[1]):
        return None
    before, after = (sum(side) / len(side) for side in sides)
    return Accuracy(pair.name, benchmark, before, after, len(sides[0]))


def _cells(
    pair: str, benchmark: str, alpha: float, before: EdgeScores, after: EdgeScores, bins: int
) -> list[Cell]:
    cells = []
    for metric, entry in METRICS.items():
        dense, real = (
            _change(*(compute_metric(metric, e.scores, mask, bins=bins) for e in (before, after)))
            for mask in (None, before.graph.mask)
        )
        moved = dense.change
        cells.append(
            Cell(
                pair=pair,
                benchmark=benchmark,
                alpha=alpha,
                metric=metric,
                before=dense.before,
                after=dense.after,
                change=moved,
                samples=len(before.scores),
                paper_direction=entry.direction,
                as_in_paper=None if moved is None else moved * _SIGNS[entry.direction] > 0,
                real_edges=real,
            )
        )
    return cells


def print_report(report: Report, style: Format = "table") -> None:
    """Print a report to standard output.

    Raises:
        ProbeError: An unknown format.
    """
    if style == "table":
        _console().print(tables(report))
    else:
        print(render(report, style))


def print_faithfulness(agreements: Sequence[Agreement]) -> None:
    """Print how near the methods come to the exact effects to standard output."""
    _console().print(view(agreements))


def _console() -> Console:
    # Where nobody looks (a pipe, a file, CI) the width is fixed, so that runs compare.
    return Console(highlight=False, width=None if sys.stdout.isatty() else 100)


def render(report: Report, style: Format) -> str:
    """Write a report as text: `markdown`, `json` (that of report.json) or `csv`.

    Raises:
        ProbeError: An unknown format.
    """
    if style == "markdown":
        return _markdown(report)
    if style == "json":
        return json.dumps(report.table, indent=1, allow_nan=False)
    if style == "csv":
        return _csv(report)
    raise ProbeError(f"format {style!r} is not known; use table, markdown, json or csv")


def summary(report: Report) -> str:
    """One line per pair and benchmark: what happened to it."""
    lines = []
    for benchmark, pair, cells in _groups(report):
        known = [cell for cell in cells if cell.as_in_paper is not None]
        agree = sum(bool(cell.as_in_paper) for cell in known)
        lines.append(
            f"On {benchmark}, {pair.method or pair.name} moved {agree} of {len(known)} cells "
            "in the direction that the paper reports for online RL."
        )
    return "\n".join(lines)


def _groups(report: Report) -> list[tuple[str, Pair, list[Cell]]]:
    groups = []
    for benchmark in report.recipe.benchmarks:
        for pair in report.recipe.pairs:
            cells = [
                c for c in report.cells if (c.pair, c.benchmark) == (pair.name, benchmark.name)
            ]
            if cells:
                groups.append((benchmark.name, pair, cells))
    return groups


def _row(cell: Cell, report: Report) -> list[str]:
    shown = Change(cell.before, cell.after, cell.change)
    other = cell.real_edges
    if report.recipe.report.entries == "real":
        shown, other = other, shown
    verdict = {True: "yes", False: "no", None: "-"}[cell.as_in_paper]
    return [
        f"{cell.alpha:g}",
        METRICS[cell.metric].label,
        f"{_number(shown.before)} → {_number(shown.after)}",
        _percent(shown.change),
        verdict,
        _percent(other.change),
    ]


def _titles(report: Report) -> list[str]:
    other = "dense" if report.recipe.report.entries == "real" else "real edges"
    return [*COLUMNS[:-1], other]


def _heading(report: Report, benchmark: str, pair: Pair, cells: list[Cell]) -> str:
    text = f"{benchmark} · {pair.name}"
    text += f" ({pair.method})" if pair.method else ""
    for row in report.accuracy:
        if (row.pair, row.benchmark) == (pair.name, benchmark):
            text += (
                f" · accuracy {100 * row.before:.1f} → {100 * row.after:.1f} % of "
                f"{row.questions} questions"
            )
    return f"{text} · {cells[0].samples} samples"


def tables(report: Report) -> RenderableType:
    """Lay out a report for a terminal of 80 columns or more."""
    parts: list[RenderableType] = [Text(summary(report)), Text("")]
    for benchmark, pair, cells in _groups(report):
        parts.append(Text(_heading(report, benchmark, pair, cells), style="bold"))
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for title in _titles(report):
            left = title == "metric"
            table.add_column(title, justify="left" if left else "right", no_wrap=True)
        for place, cell in enumerate(cells):
            row: list[str | Text] = [*_row(cell, report)]
            verdict = str(row[-2])
            row[-2] = Text(verdict, style={"yes": "green", "no": "red"}.get(verdict, ""))
            last = place + 1 == len(cells) or cells[place + 1].alpha != cell.alpha
            table.add_row(*row, end_section=last)
        parts.append(table)
    if report.faithfulness:
        parts.append(view(report.faithfulness))
    parts.append(Text(_caveats(report), style="dim"))
    return Group(*parts)


def _caveats(report: Report) -> str:
    recipe = report.recipe
    shown, other = "the dense matrix, structural zeros included", "real edges only"
    if recipe.report.entries == "real":
        shown, other = other, shown
    lines = [
        f"Metrics over {shown}; last column: change of the same over {other}. "
        f"Convention {recipe.selection.convention!r}, {recipe.attribution.method}, granularity "
        f"{recipe.attribution.granularity}, {recipe.report.bins} bins, {recipe.compute.dtype}. "
        "A change is shown without its noise: it is no finding by itself.",
    ]
    if report.missing:
        lines.append(f"Not in this report ({len(report.missing)}): " + "; ".join(report.missing))
    return "\n".join(lines)


def _markdown(report: Report) -> str:
    lines = [summary(report).replace("\n", "  \n"), ""]
    for benchmark, pair, cells in _groups(report):
        lines += [f"### {_heading(report, benchmark, pair, cells)}", ""]
        lines += ["| " + " | ".join(_titles(report)) + " |"]
        lines += ["|---:|---|---:|---:|---:|---:|"]
        lines += ["| " + " | ".join(_row(cell, report)) + " |" for cell in cells]
        lines += [""]
    if report.faithfulness:
        lines += [*markdown_lines(report.faithfulness), ""]
    return "\n".join([*lines, _caveats(report)])


def _csv(report: Report) -> str:
    text = io.StringIO()
    rows = []
    for cell in report.cells:
        row = asdict(cell)
        real = row.pop("real_edges")
        rows.append(row | {f"real_edges_{name}": value for name, value in real.items()})
    if rows:
        writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue().rstrip("\n")


def _change(before: float, after: float) -> Change:
    finite = [value if math.isfinite(value) else None for value in (before, after)]
    defined = None not in finite and before != 0
    return Change(finite[0], finite[1], (after - before) / abs(before) if defined else None)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2e}"


def _percent(change: float | None) -> str:
    return "-" if change is None else f"{100 * change:+.1f} %"
