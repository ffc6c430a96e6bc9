"""Markdown: a report for an issue, a notebook or a page.

>>> print(document([report]))
"""

from collections.abc import Sequence

from probe.escaping import markdown as escape
from probe.report._glossary import legend
from probe.report._layout import (
    CELL_TITLES,
    cell_rows,
    extra_texts,
    further_tables,
    numeric,
    shared_tables,
)
from probe.report._opening import opening
from probe.report._report import ExtraTable, Report
from probe.report._wording import compared, groups, heading, notes


def document(reports: Sequence[Report]) -> str:
    """A report, or several side by side, as one document."""
    lines = []
    for finding in opening(reports):
        lines += [f"**{escape(finding.subject)}**", ""]
        lines += [f"- {escape(label)}: {escape(text)}" for label, text in finding.lines] + [""]
    for table in shared_tables(reports):
        lines += table_lines(table)
    key = [f"- {escape(term)}: {escape(meaning)}" for term, meaning in legend(reports)]
    if compared(reports):
        lines += [*key, ""]
    for report in reports:
        if len(reports) == 1:
            for benchmark, pair, cells in groups(report):
                rows = tuple(row for cell in cells for row in cell_rows(cell, report))
                title = heading(benchmark, pair, cells)
                lines += [*key, ""] if key else []
                lines += table_lines(ExtraTable(title, "", CELL_TITLES, rows))
                key = []
        for table in further_tables(report):
            lines += table_lines(table)
    return "\n".join([*lines, "  \n".join(map(escape, notes(reports)))])


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
