"""Opened runs: what a run folder holds, to read on in Python.

>>> run = probe.open_run("runs/tiny-math")
>>> run
OpenRun('runs/tiny-math': tiny-math, 2 pairs)
>>> change = run.edges("grpo", 0.3) - run.edges("sft", 0.3)
>>> change.top(3)
>>> run.cells.to_pandas()
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from probe.attribution import EdgeScores
from probe.errors import ProbeError
from probe.notebook import html_table, records_frame
from probe.recipe import Comparison, Recipe, recipe_from
from probe.report._opening import opening
from probe.report._problems import ComparedProblem, compared_problems
from probe.report._report import Report
from probe.report._stored import read_report
from probe.stats import CONTROLS, Accuracy, Cell, control_sides
from probe.store import Damaged, Missing, RunFolder, model_names, run_path

if TYPE_CHECKING:
    import pandas

SIDES = ("before", "after", *(side.name for side in control_sides(CONTROLS)))
"""What the edges of a comparison may be of: both models as they are, and sides of controls."""

Row = TypeVar("Row")


class Table(tuple[Row, ...]):
    """Rows of one kind, as a tuple that notebooks and pandas know."""

    kind: type | None
    """Of which class the rows are; tells the columns where there are none."""

    def __new__(cls, rows: Iterable[Row] = (), kind: type | None = None) -> "Table[Row]":
        """Take rows."""
        table = super().__new__(cls, rows)
        table.kind = kind
        return table

    def to_pandas(self) -> "pandas.DataFrame":
        """One row each; what is a record in a row becomes columns of its own.

        Raises:
            ProbeError: There is no pandas.
        """
        names = [field.name for field in fields(self.kind)] if self.kind else []
        return records_frame(map(_record, self), names)

    def __repr__(self) -> str:
        """How many rows of what there are."""
        what = f" of {self.kind.__name__}" if self.kind else ""
        return f"Table({len(self)} row{'s' * (len(self) != 1)}{what})"

    def _repr_html_(self) -> str:
        """The first ten rows, for a notebook."""
        rows = [_record(row) for row in self[:10]]
        return html_table(
            repr(self), list(rows[0]) if rows else (), [list(r.values()) for r in rows]
        )


def _record(row: object) -> Mapping[str, object]:
    return asdict(cast(Any, row))  # any dataclass


@dataclass(frozen=True)
class SolvedProblem:
    """What one model made of one question."""

    benchmark: str
    """The benchmark's name."""

    id: str
    """The question's name."""

    model: str
    """The model's reference."""

    name: str
    """The model's name in files; a model that is asked in two ways has two."""

    gold: str
    """The right answer."""

    extracted: str | None
    """The final answer that was read from the model's text; None where there is none."""

    correct: bool
    """Whether it is right."""

    text: str
    """All that the model wrote."""

    tokens: int
    """How many tokens that are."""


@dataclass(frozen=True, repr=False)
class OpenRun:
    """A run folder, to be read only."""

    path: Path
    """The folder."""

    recipe: Recipe
    """What was run."""

    @property
    def folder(self) -> RunFolder:
        """Its files."""
        return RunFolder(self.path)

    @cached_property
    def report(self) -> Report:
        """All that it has to say: as the run left it, or computed where something has changed."""
        return read_report(self.path)

    @property
    def cells(self) -> Table[Cell]:
        """One metric of one pair on one benchmark at one alpha each."""
        return Table(self.report.cells, Cell)

    @property
    def accuracy(self) -> Table[Accuracy]:
        """How many questions both models of a pair solve, by benchmark."""
        return Table(self.report.accuracy, Accuracy)

    @cached_property
    def problems(self) -> Table[SolvedProblem]:
        """Every question with what each model made of it."""
        return Table(self._problems(), SolvedProblem)

    @cached_property
    def compared(self) -> Table[ComparedProblem]:
        """Every question with both models' answers side by side, those that flipped first."""
        return Table(compared_problems(self.report), ComparedProblem)

    def _problems(self) -> Iterator[SolvedProblem]:
        for benchmark in (choice.name for choice in self.recipe.benchmarks):
            for asked, name in model_names(self.recipe).items():
                try:
                    solutions = self.folder.read_whole(name, benchmark)
                except Missing as error:
                    raise ProbeError(str(error)) from error
                for one in solutions:
                    found = name, one.gold, one.extracted, one.correct, one.text, len(one.answer)
                    yield SolvedProblem(benchmark, one.id, asked.model, *found)

    def edges(
        self, model: str, alpha: float, benchmark: str | None = None, pair: str | None = None
    ) -> EdgeScores:
        """The edges of one model on the questions of one comparison.

        A model may be in several pairs, each with questions of its own.

        Args:
            model: Its reference, the last part of that, or a side: `before`, `after`, and with the
                cross-text control `before-on-after` or `after-on-before`.
            alpha: Scored length as a share of the usual one.
            benchmark: The benchmark's name; the recipe's first if not given.
            pair: The pair's name; the recipe's first that has this model if not given.

        Raises:
            ProbeError: The run has no such model, alpha, benchmark or pair, or not these edges
                yet.
        """
        recipe = self.recipe
        benchmarks = [choice.name for choice in recipe.benchmarks]
        names = [one.name for one in recipe.pairs]
        self._check("alpha", alpha, list(recipe.selection.alpha))
        self._check("benchmark", benchmark, [None, *benchmarks])
        self._check("pair", pair, [None, *names])
        pairs = [one for one in recipe.pairs if pair in (None, one.name)]
        for one in pairs:
            for side, reference in (("before", one.before), ("after", one.after)):
                if model in (side, reference, reference.rstrip("/").split("/")[-1]):
                    return self._read(Comparison(one, benchmark or benchmarks[0], alpha), side)
        if model in SIDES:
            return self._read(Comparison(pairs[0], benchmark or benchmarks[0], alpha), model)
        known = [name for one in pairs for name in (one.before, one.after)]
        self._check("model", model, [*dict.fromkeys(known), *SIDES[:2]])
        raise AssertionError("a known model was found above")

    def _check(self, kind: str, value: object, known: list[Any]) -> None:
        if value not in known:
            names = ", ".join(str(name) for name in known if name is not None)
            raise ProbeError(f"{self.path} has no {kind} {value!r}; it has: {names}")

    def _read(self, comparison: Comparison, side: str) -> EdgeScores:
        folder, name = self.folder, comparison.name
        path = folder.edges_file(name, side)
        try:
            edges = folder.read_edges(path)
        except Damaged as error:
            raise ProbeError(f"{path}: {error}; run the recipe again") from error
        if edges is None:
            reason = folder.left_out(name) or "not computed yet; run the recipe again"
            raise ProbeError(f"{path}: {reason}")
        return edges

    def __repr__(self) -> str:
        """Where it is, and of what."""
        count = len(self.recipe.pairs)
        return f"OpenRun({str(self.path)!r}: {self.recipe.name}, {count} pair{'s' * (count != 1)})"

    def _repr_html_(self) -> str:
        """What happened in sentences, and the report, for a notebook."""
        said = "".join(
            f"<p><b>{escape(finding.subject)}</b><br>"
            + "<br>".join(f"{label}: {escape(text)}" for label, text in finding.lines)
            + "</p>"
            for finding in opening([self.report])
        )
        return said + self.report._repr_html_()


def open_run(run: str | Path) -> OpenRun:
    """Open a run folder, finished or not.

    Args:
        run: The folder, or a file in it.

    Raises:
        ProbeError: It is none.
    """
    folder = RunFolder(run_path(run))
    return OpenRun(folder.path, recipe_from(folder.read_record()["recipe"], str(folder.record)))
