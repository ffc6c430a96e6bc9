"""Layout: the tables of a report as rows of text, before any format draws them.

>>> CELL_TITLES[:3]
('alpha', 'metric', 'before → after')
>>> accuracy_table([report]).columns[:3]
('benchmark', 'pair', 'questions')
"""

import re
from collections.abc import Callable, Sequence

from probe.metrics import METRICS, TOKEN_METRICS, metric_named
from probe.report._report import ExtraTable, Report
from probe.report._wording import (
    MUCH_OF_ONE,
    SAME,
    arrow,
    both,
    compared,
    interval,
    marks,
    number,
    p_value,
    percent,
    run_names,
    warning,
)
from probe.stats import TITLES, Accuracy, Cell, Change, explanation, shown_texts

TABLE_1 = ("activation_intensity", "information_complexity", "distribution_kurtosis")
"""The metrics of the paper's Table 1."""

_NUMBERS = re.compile(r"[-+0-9.e%,()<≤ ↗→↘*!✓✗]*")
_VERDICTS = {True: "yes", False: "no", None: "-"}

Texts = tuple[str, ...]


def shared_tables(reports: Sequence[Report]) -> list[ExtraTable]:
    """The tables of one report, or of several together, that are not of a benchmark and pair."""
    tables = accuracy_table(reports)
    if compared(reports):
        return tables + side_by_side(reports)
    if any(r.cells and (len(reports) > 1 or r.recipe.published) for r in reports):
        tables.append(table_1(reports))
    return tables


CELL_TITLES = ("alpha", "metric", "before → after", "change %", "interval", "paper", "paper %")
"""The columns of a report's cells: our number, and the change of the paper's at the end."""


def cell_rows(cell: Cell, report: Report) -> list[Texts]:
    """A cell's row under `CELL_TITLES`, and below it what was published for it, if anything was."""
    paper = cell.real_edges if report.recipe.report.entries == "real" else cell.paper
    # Padded by hand, so that numbers stay below each other with and without marks.
    rows: list[Texts] = [
        (
            f"{cell.alpha:g}",
            f"  {cell.control}" if cell.control else label_of(cell.metric),
            both(cell.before, cell.after),
            f"{percent(cell.change):>6} {marks(cell)}".rstrip(),
            interval(cell.interval),
            _VERDICTS[cell.as_in_paper],
            f"{percent(paper.change)}{warning(cell.paper_influence) or ' '}",
        )
    ]
    if cell.published:
        theirs = cell.published
        shown = both(theirs.before, theirs.after)
        same = SAME[cell.as_published]
        rows.append(("", "published", shown, "", "", same, f"{percent(theirs.change)} "))
    return rows


def label_of(metric: str) -> str:
    """What a table calls our number of a metric."""
    known = metric_named(metric)
    return known.estimand.label if known.estimand else known.label


def accuracy_table(reports: Sequence[Report]) -> list[ExtraTable]:
    """How many questions each model solved; no table where that is not known."""
    found = [
        (n, row) for n, r in zip(run_names(reports), reports, strict=True) for row in r.accuracy
    ]
    columns: Texts = (
        "benchmark",
        "pair",
        "questions",
        "accuracy %",
        "points",
        "interval",
        "p",
    )
    published = any(row.published for _, row in found)
    if published:
        columns = (*columns, "published %")
    rows = []
    for name, row in found:
        tested = (interval(row.interval, points=True), p_value(row.p_value))
        texts: Texts = (row.benchmark, row.pair, str(row.questions), *_points(row), *tested)
        if published:
            theirs = row.published and f"{_points(row.published)[0]} {SAME[row.as_published]}"
            texts = (*texts, theirs or "-")
        rows.append((name, *texts))
    if compared(reports):
        return [ExtraTable("Accuracy", "", ("run", *columns), tuple(rows))]
    return [ExtraTable("Accuracy", "", columns, tuple(row[1:] for row in rows))] if rows else []


def _points(row: Accuracy | Change) -> Texts:
    """An accuracy in percent, and how many points it moved."""
    before, after = (100 * (value or 0) for value in (row.before, row.after))
    return f"{before:.1f} {arrow(before, after)} {after:.1f}", f"{after - before:+z.1f}"


def table_1(reports: Sequence[Report]) -> ExtraTable:
    """The paper's Table 1: three metrics over the dense matrix, by pair, benchmark and alpha.

    Each pair has a row of its own above its cells, and what was published stands below them.
    """
    rows: list[Texts] = []
    empty = ("",) * len(TABLE_1)
    for report in reports:
        shown: dict[tuple[str, str, float], dict[str, Cell]] = {}
        for cell in (cell for cell in report.cells if not cell.control):
            shown.setdefault((cell.pair, cell.benchmark, cell.alpha), {})[cell.metric] = cell
        for pair in report.recipe.pairs:
            of_pair = [where for where in shown if where[0] == pair.name]
            rows += [(pair.name, "", *empty)] if of_pair else []
            for where in of_pair:
                found = [shown[where][metric] for metric in TABLE_1]
                ours = (
                    f"{both(cell.paper.before, cell.paper.after)} "
                    f"{warning(cell.paper_influence) or ' '}"
                    for cell in found
                )
                rows.append((f"  {where[1]}", f"{where[2]:g}", *ours))
                if any(cell.published for cell in found):
                    rows.append(("  published", "", *map(_published, found)))
    columns = ("pair and benchmark", "alpha", *(metric_named(name).label for name in TABLE_1))
    note = (
        "The paper's numbers, before and after. They have no statistics: our numbers do. "
        f"!: {MUCH_OF_ONE}."
    )
    if any(cell.published for report in reports for cell in report.cells):
        note += " Published values are below; ✓ is the same direction."
    return ExtraTable("Table 1 of the paper", note, columns, tuple(rows))


def _published(cell: Cell) -> str:
    theirs = cell.published
    return f"{both(theirs.before, theirs.after)} {SAME[cell.as_published]} " if theirs else "-  "


def side_by_side(reports: Sequence[Report]) -> list[ExtraTable]:
    """The cells of several runs, each run in a column, a table per benchmark and pair."""
    names = run_names(reports)
    found: dict[tuple[str, str], dict[tuple[float, str], dict[int, Cell]]] = {}
    for place, report in enumerate(reports):
        for cell in (cell for cell in report.cells if not cell.control):
            table = found.setdefault((cell.benchmark, cell.pair), {})
            table.setdefault((cell.alpha, cell.metric), {})[place] = cell
    order = [*METRICS, *TOKEN_METRICS]
    tables = []
    for (benchmark, pair), cells in found.items():
        rows = []
        for (alpha, metric), row in sorted(
            cells.items(), key=lambda item: (item[0][0], order.index(item[0][1]))
        ):
            shown = (_beside(row.get(place), len(names) < 3) for place in range(len(names)))
            rows.append((f"{alpha:g}", label_of(metric), *shown))
        columns = ("alpha", "metric", *names)
        tables.append(ExtraTable(f"{benchmark} · {pair}", "", columns, tuple(rows)))
    return tables


def _beside(cell: Cell | None, values: bool) -> str:
    if cell is None:
        return "-"
    change = f"{percent(cell.change):>6} {marks(cell):<2}"
    return f"{both(cell.before, cell.after)} {change}" if values else change


def further_tables(report: Report) -> list[ExtraTable]:
    """How near methods come to exact effects, intervals beside their values; then all extras."""
    rows = []
    for found in report.faithfulness:
        cells = zip(*shown_texts(found), strict=True)
        rows.append(tuple(f"{value} ({ends})" if ends else value for value, ends in cells))
    tables = list(report.extras)
    if rows:
        note = explanation(report.faithfulness)
        tables.insert(0, ExtraTable("Faithfulness", note, TITLES, tuple(rows)))
    return tables


def extra_texts(extra: ExtraTable) -> list[Texts]:
    """The rows of a table as texts; the numbers of a column have the same digits."""
    columns = map(_column, extra.columns, zip(*extra.rows, strict=True))
    return list(zip(*columns, strict=True))


def numeric(extra: ExtraTable) -> list[bool]:
    """Which columns of a table are numbers, and go to the right."""
    columns = zip(*extra_texts(extra), strict=True)
    found = [all(map(_NUMBERS.fullmatch, column)) for column in columns]
    return found or [False] * len(extra.columns)


def _column(title: str, column: Sequence[str | float | None]) -> list[str]:
    numbers = [abs(value) for value in column if isinstance(value, float | int)]
    form: Callable[[float], str] = number
    if all(isinstance(value, int) for value in numbers):
        form = str
    elif title.endswith("%"):
        form = "{:+z.1f}".format
    elif title == "alpha":
        form = "{:g}".format
    elif all(value == 0 or 1e-3 <= value < 1e4 for value in numbers):
        form = "{:.3f}".format
    return [
        "-" if value is None else value if isinstance(value, str) else form(value)
        for value in column
    ]
