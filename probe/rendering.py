"""Rendering: a report as tables for a terminal, as markdown, JSON or CSV.

>>> print_report(build_report(Path("runs/tiny-math")), "markdown")
"""

import csv
import io
import json
import sys
from collections.abc import Callable, Sequence
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
from probe.report import Cell, Change, ExtraTable, Report
from probe.statistics import LEVEL

Format = Literal["table", "markdown", "json", "csv"]
TITLES = {
    "dense": ("alpha", "metric", "before → after", "change %", "interval", "as paper", "real %"),
    "real": ("alpha", "metric", "before → after", "real %", "dense %", "interval", "as paper"),
}
"""The columns, by what the recipe shows; the statistics are next to the dense matrix's change."""


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
    """One line per pair and benchmark: what happened to it; where tested, beyond chance."""
    lines = []
    tested = report.recipe.report.resamples > 0
    for benchmark, pair, cells in _groups(report):
        known = [cell for cell in cells if cell.as_in_paper is not None]
        moved = [cell for cell in known if cell.significant or not tested]
        agree = sum(bool(cell.as_in_paper) for cell in moved)
        lines.append(
            f"On {benchmark}, {pair.method or pair.name} moved {agree} of {len(known)} cells "
            f"{'significantly ' if tested else ''}in the direction that the paper reports for "
            f"online RL{f', and {len(moved) - agree} against it' if tested else ''}."
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
    dense, real = Change(cell.before, cell.after, cell.change), cell.real_edges
    shown = real if report.recipe.report.entries == "real" else dense
    verdict = {True: "yes", False: "no", None: "-"}[cell.as_in_paper]
    start = [
        f"{cell.alpha:g}",
        METRICS[cell.metric].label,
        f"{_number(shown.before)} → {_number(shown.after)}",
    ]
    # Padded by hand, so that numbers stay below each other with and without marks.
    judged = [f"{_percent(dense.change):>6} {_mark(cell)}", _interval(cell.interval), verdict]
    other = [_percent(real.change)]
    return [*start, *other, *judged] if shown is real else [*start, *judged, *other]


def _mark(cell: Cell) -> str:
    noisy = "~" if cell.above_noise is False else ""
    return ("*" if cell.significant else " ") + noisy


def _titles(report: Report) -> tuple[str, ...]:
    return TITLES[report.recipe.report.entries]


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
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
        titles = _titles(report)
        judged = titles.index("interval") - 1
        verdict = titles.index("as paper")
        for place, title in enumerate(titles):
            left = title == "metric" or place == judged
            wide = title == "interval"  # of a change from nearly nothing
            table.add_column(
                title, justify="left" if left else "right", no_wrap=not wide, overflow="fold"
            )
        for place, cell in enumerate(cells):
            row: list[str | Text] = [*_row(cell, report)]
            style = {"yes": "green", "no": "red"}.get(str(row[verdict]), "")
            row[verdict] = Text(str(row[verdict]), style=style)
            last = place + 1 == len(cells) or cells[place + 1].alpha != cell.alpha
            dim = cell.significant is False
            table.add_row(*row, end_section=last, style="dim" if dim else "")
        parts += [Text(""), table, Text("")]
    if report.faithfulness:
        parts.append(view(report.faithfulness))
    for extra in report.extras:
        parts += [_extra_view(extra), Text("")]
    parts.append(Text(_caveats(report), style="dim"))
    return Group(*parts)


def _extra_view(extra: ExtraTable) -> RenderableType:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for title, numbers in zip(extra.columns, _numeric(extra), strict=True):
        table.add_column(title, justify="right" if numbers else "left", overflow="fold")
    for row in _extra_texts(extra):
        table.add_row(*map(Text, row))
    note = [Text(extra.note, style="dim")] if extra.note else []
    return Group(Text(extra.title, style="bold"), Text(""), table, *note)


def _extra_texts(extra: ExtraTable) -> list[list[str]]:
    """The rows of a table as texts; the numbers of a column have the same digits."""
    columns = zip(*extra.rows, strict=True)
    return [list(row) for row in zip(*map(_column_texts, columns), strict=True)]


def _column_texts(column: Sequence[str | float | None]) -> list[str]:
    numbers = [abs(value) for value in column if isinstance(value, float | int)]
    form: Callable[[float], str] = _number
    if all(isinstance(value, int) for value in numbers):
        form = str
    elif all(value == 0 or 1e-3 <= value < 1e4 for value in numbers):
        form = "{:.3f}".format
    return [
        "-" if value is None else value if isinstance(value, str) else form(value)
        for value in column
    ]


def _numeric(extra: ExtraTable) -> list[bool]:
    """Which columns hold numbers."""
    return [
        any(isinstance(row[place], float | int) for row in extra.rows)
        for place in range(len(extra.columns))
    ]


def _caveats(report: Report) -> str:
    recipe = report.recipe
    shown, other = "the dense matrix, structural zeros included", "real edges only"
    if recipe.report.entries == "real":
        shown, other = other, shown
    column = "dense %" if recipe.report.entries == "real" else "real %"
    lines = [
        f"Metrics over {shown}; {column}: change of the same over {other}. "
        f"Convention {recipe.selection.convention!r}, {recipe.attribution.method}, granularity "
        f"{recipe.attribution.granularity}, {recipe.report.bins} bins, {recipe.compute.dtype}.",
        "A change is shown without its noise: it is no finding by itself.",
    ]
    if recipe.report.resamples:
        tested = sum(cell.p_value is not None for cell in report.cells)
        lines[1] = (
            f"Marks: * is significant, p < {LEVEL:g} where a question's two sides are exchanged at "
            f"random, adjusted (Holm) for {tested} cells. ~ is within the noise: halves of one "
            "model's questions differ as much. Interval: 95 % of the change with questions drawn "
            f"again{', over the dense matrix' if recipe.report.entries == 'real' else ''}. "
            "All of this is about other questions, not about other training runs."
        )
    if report.missing:
        lines.append(f"Not in this report ({len(report.missing)}): " + "; ".join(report.missing))
    return "\n".join(lines)


def _markdown(report: Report) -> str:
    lines = [summary(report).replace("\n", "  \n"), ""]
    for benchmark, pair, cells in _groups(report):
        lines += [f"### {_heading(report, benchmark, pair, cells)}", ""]
        lines += ["| " + " | ".join(_titles(report)) + " |"]
        lines += ["|---:|---|---:|---:|---:|---:|---:|"]
        for cell in cells:
            lines += ["| " + " | ".join(" ".join(t.split()) for t in _row(cell, report)) + " |"]
        lines += [""]
    if report.faithfulness:
        lines += [*markdown_lines(report.faithfulness), ""]
    for extra in report.extras:
        lines += [f"### {extra.title}", ""]
        rules = ["---:" if numbers else "---" for numbers in _numeric(extra)]
        for row in (extra.columns, rules, *_extra_texts(extra)):
            lines += ["| " + " | ".join(text.replace("|", "\\|") for text in row) + " |"]
        lines += ["", *([extra.note, ""] if extra.note else [])]
    return "\n".join([*lines, _caveats(report)])


def _csv(report: Report) -> str:
    text = io.StringIO()
    rows = []
    for cell in report.cells:
        row = asdict(cell)
        real, ends = row.pop("real_edges"), row.pop("interval") or (None, None)
        row |= {f"real_edges_{name}": value for name, value in real.items()}
        rows.append(row | dict(zip(("interval_low", "interval_high"), ends, strict=True)))
    if rows:
        writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue().rstrip("\n")


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    digits, exponent = f"{value:.2e}".split("e")
    return f"{digits}e{int(exponent)}"


def _percent(change: float | None) -> str:
    if change is None:
        return "-"
    return f"{100 * change:+.{1 if abs(change) < 10 else 0}f}"


def _interval(ends: tuple[float, float] | None) -> str:
    if ends is None:
        return "-"
    digits = 1 if max(map(abs, ends)) < 0.1 else 0
    return "..".join(f"{100 * end:+.{digits}f}" for end in ends)
