"""Markdown: a report for an issue, a notebook or a page.

>>> print(document([report]))
"""

from collections.abc import Sequence

from probe.escaping import markdown as escape
from probe.report._extras import ExtraTable
from probe.report._layout import (
    CELL_TITLES,
    cell_rows,
    extra_texts,
    further_tables,
    numeric,
    shared_tables,
)
from probe.report._report import Report
from probe.report._wording import caveats, groups, heading, overview


def document(reports: Sequence[Report]) -> str:
    """A report, or several side by side, as one document."""
    tables = shared_tables(reports)
    for report in reports:
        if len(reports) == 1:
            for benchmark, pair, cells in groups(report):
                rows = tuple(row for cell in cells for row in cell_rows(cell, report))
                title = heading(benchmark, pair, cells)
                tables.append(ExtraTable(title, "", CELL_TITLES, rows))
        tables += further_tables(report)
    lines = ["  \n".join(map(escape, overview(reports))), ""]
    for table in tables:
        lines += table_lines(table)
    notes = dict.fromkeys(line for report in reports for line in caveats(report))
    return "\n".join([*lines, "  \n".join(map(escape, notes))])


def table_lines(table: ExtraTable) -> list[str]:
    """Any table below its title, and its note below it."""
    lines = [f"### {escape(table.title)}", ""]
    rules = ["---:" if right else "---" for right in numeric(table)]
    escaped = [
        [escape(text, cell=True) for text in row] for row in (table.columns, *extra_texts(table))
    ]
    for row in (escaped[0], rules, *escaped[1:]):
        lines += ["| " + " | ".join(row) + " |"]
    return [*lines, "", *([escape(table.note), ""] if table.note else [])]
