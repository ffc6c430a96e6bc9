"""Terminal: a report as rich tables.

Everything can be read without colour; a colour only repeats what a character says. 80 columns do;
where a terminal is narrower or names are long, a table goes on below itself.

    >>> Console().print(view([report]))
"""

from collections.abc import Sequence
from textwrap import wrap

from rich.console import Group, RenderableType
from rich.styled import Styled
from rich.table import Table
from rich.text import Text

from probe.fitted import Fitted, open_table
from probe.report._glossary import legend
from probe.report._layout import CELL_TITLES, cell_rows, extra_texts, numeric, shared_tables
from probe.report._opening import opening
from probe.report._report import ExtraTable, Report
from probe.report._wording import compared, groups, heading, notes
from probe.stats import Cell
from probe.stats import _agreement as agreement

_COLOURS = {"yes": "green", "✓": "green", "no": "red", "✗": "red"}


def view(reports: Sequence[Report]) -> RenderableType:
    """Lay out a report, or several side by side, for a terminal of 80 columns or more."""
    parts = [*opening_view(reports), Text("")]
    key = _legend_view(reports)
    for table in shared_tables(reports):
        parts += [table_view(table), Text("")]
    if compared(reports):
        parts += key  # explains the tables above
    for report in reports:
        if len(reports) == 1:
            for benchmark, pair, cells in groups(report):
                parts += [*key, Text(heading(benchmark, pair, cells), style="bold"), Text("")]
                parts += [_cells_view(report, cells), Text("")]
                key = []
        if report.faithfulness:
            parts.append(agreement.view(report.faithfulness))
        for extra in report.extras:
            parts += [table_view(extra), Text("")]
    return Group(*parts, *(Text(line, style="dim") for line in notes(reports)))


def opening_view(reports: Sequence[Report]) -> list[RenderableType]:
    """Lay out what a report says first: each label beside its sentences."""
    parts: list[RenderableType] = []
    for finding in opening(reports):
        parts += [Text("")] if parts else []
        grid = Table.grid(padding=(0, 2))
        grid.add_column(no_wrap=True)
        grid.add_column(overflow="fold")
        for label, text in finding.lines:
            grid.add_row(f"  {label}", Text(text))
        parts += [Text(finding.subject, style="bold"), grid]
    return parts


def _legend_view(reports: Sequence[Report]) -> list[RenderableType]:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for term, meaning in legend(reports):
        grid.add_row(term, Text(meaning))
    title = Text("How to read the tables", style="bold")
    return [title, Text(""), Styled(grid, "dim"), Text("")] if grid.row_count else []


def table_view(extra: ExtraTable) -> RenderableType:
    """Lay out any table below its title, and its note below it."""
    table = open_table()
    columns = list(zip(*extra_texts(extra), strict=True)) or [()] * len(extra.columns)
    for place, (title, right) in enumerate(zip(extra.columns, numeric(extra), strict=True)):
        if right:
            # Numbers stay whole; a heading that is longer than they are goes over several lines.
            # Padded by hand, so that marks at a number's end stay below each other.
            width = max(map(len, (*columns[place], *title.split())))
            columns[place] = tuple(text.rjust(width) for text in columns[place])
            title = "\n".join(line.rjust(width) for line in wrap(title, width))
        table.add_column(title, no_wrap=right, overflow="fold")
    for row in zip(*columns, strict=True):
        table.add_row(*map(Text, row))
    note = [Text(extra.note, style="dim")] if extra.note else []
    # The first columns, up to the first number, say what a row is of; and so does alpha.
    keys = 0
    for title, is_number in zip(extra.columns, numeric(extra), strict=True):
        if is_number and title != "alpha":
            break
        keys += 1
    fitted = Fitted(table, keys)
    return Group(Text(extra.title, style="bold"), Text(""), fitted, *note)


def _cells_view(report: Report, cells: Sequence[Cell]) -> Fitted:
    table = open_table()
    columns = CELL_TITLES
    verdict = columns.index("paper")
    for place, title in enumerate(columns):
        # Marks stand right of a change, so its column is padded by hand.
        left = title == "metric" or place == columns.index("interval") - 1
        wide = title == "interval"  # of a change from nearly nothing
        table.add_column(
            title, justify="left" if left else "right", no_wrap=not wide, overflow="fold"
        )
    for place, cell in enumerate(cells):
        rows = cell_rows(cell, report)
        last = place + 1 == len(cells) or cells[place + 1].alpha != cell.alpha
        for texts in rows:
            row: list[str | Text] = [*texts]
            row[verdict] = Text(texts[verdict], style=_COLOURS.get(texts[verdict], ""))
            faint = cell.significant is False or texts is not rows[0]
            table.add_row(
                *row, end_section=last and texts is rows[-1], style="dim" if faint else ""
            )
    return Fitted(table, columns.index("metric") + 1)
