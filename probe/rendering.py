"""Rendering: a report as tables for a terminal, as markdown, JSON or CSV.

>>> print_report(build_report(Path("runs/tiny-math")), "markdown")
"""

import csv
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Literal

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from probe.agreement import Agreement, markdown_lines, view
from probe.errors import ProbeError
from probe.metrics import METRICS
from probe.recipe import Pair
from probe.report import Cell, Change, Report

Format = Literal["table", "markdown", "json", "csv"]
COLUMNS = ("alpha", "metric", "before → after", "change", "as paper", "real edges")


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


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2e}"


def _percent(change: float | None) -> str:
    return "-" if change is None else f"{100 * change:+.1f} %"
