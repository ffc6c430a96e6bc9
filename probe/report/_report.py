"""The report: everything that a run has to say, as records that need nothing to be read.

`_building` computes it from a run's edges, `_stored` takes it from where a run has left it, and
`_rendering` prints it.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

from probe.notebook import html_table
from probe.recipe import Recipe
from probe.stats import Accuracy, Agreement, Cell

REPORT_SCHEMA = 2
"""Of report.json; other files of a run have the run folder's."""


@dataclass(frozen=True)
class ExtraTable:
    """A table beside the cells, that every format shows in the same way."""

    title: str
    """What it shows, in a few words."""

    note: str
    """How to read it, in a sentence or two; may be empty."""

    columns: tuple[str, ...]
    """The heading of each column."""

    rows: tuple[tuple[str | int | float | None, ...], ...]
    """Texts and numbers; None where a number is not defined. Numbers of one column are shown with
    the same digits."""


@dataclass(frozen=True, repr=False)
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

    versions: tuple[str, ...] = ()
    """A line for each package of which it was computed with several versions."""

    path: Path = Path()
    """The run folder that it was computed from."""

    @property
    def table(self) -> dict[str, object]:
        """The report as plain data, as report.json holds it."""
        return {
            "schema": REPORT_SCHEMA,
            "recipe": self.recipe.name,
            "complete": not self.missing,
            "cells": [asdict(cell) for cell in self.cells],
            "accuracy": [asdict(row) for row in self.accuracy],
            "faithfulness": [agreement.table for agreement in self.faithfulness],
            "extras": [asdict(table) for table in self.extras],
            "missing": list(self.missing),
            "versions": list(self.versions),
        }

    def __repr__(self) -> str:
        """What it is of, in a line."""
        state = f"missing parts: {len(self.missing)}" if self.missing else "complete"
        pairs = len(self.recipe.pairs)
        count = f"{pairs} pair{'s' * (pairs != 1)}, {len(self.cells)} cells"
        return f"Report({self.recipe.name}: {count}, {state})"

    def _repr_html_(self) -> str:
        """How each metric changed, for a notebook."""
        columns = ("pair", "benchmark", "alpha", "metric", "before", "after", "change")
        cells = [[getattr(cell, column) for column in columns] for cell in self.cells]
        return html_table(repr(self), columns, cells)
