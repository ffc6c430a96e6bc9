r"""LaTeX: the tables of a report, to be read into a paper with \input.

They need the packages booktabs and graphicx, and nothing else.

    >>> print(document([report]))
"""

from collections.abc import Sequence

from probe.escaping import latex as escape
from probe.report._glossary import legend
from probe.report._layout import extra_texts, further_tables, numeric, shared_tables, table_1
from probe.report._opening import opening
from probe.report._report import ExtraTable, Report
from probe.report._wording import notes

ROWS = 40
"""So many rows a page has room for, with a caption; a longer table goes on in another float."""

_FITTED = r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"
"""What is wider than a line is made smaller, in a column of a paper too."""


def document(reports: Sequence[Report]) -> str:
    """The tables of a report, or of several: Table 1 as the paper lays it out, and all others."""
    tables = shared_tables(reports)
    if len(reports) == 1 and reports[0].cells and not reports[0].recipe.published:
        tables.append(table_1(reports))
    for report in reports:
        tables += further_tables(report)
    lines = [r"% \usepackage{booktabs,graphicx}"]
    lines += [f"% {escape(line)}" for line in _remarks(reports)]
    for table in tables:
        lines += ["", *table_lines(table)]
    return "\n".join(lines)


def _remarks(reports: Sequence[Report]) -> list[str]:
    """What a report says beside its tables."""
    said = [finding.text for finding in opening(reports)]
    return said + [f"{term}: {text}" for term, text in legend(reports)] + notes(reports)


def table_lines(table: ExtraTable) -> list[str]:
    """Any table as a float of its own, or as several where it is long."""
    columns = "".join("r" if right else "l" for right in numeric(table))
    texts = extra_texts(table)
    lines = []
    for start in range(0, max(len(texts), 1), ROWS):
        lines += [r"\begin{table}", r"\centering\footnotesize\tabcolsep=3pt", _FITTED]
        lines += [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", _row(table.columns), r"\midrule"]
        lines += _rows(texts[start : start + ROWS])
        lines += [r"\bottomrule", r"\end{tabular}}"]
        said = f"{table.title}, continued" if start else f"{table.title}. {table.note}".strip()
        lines += [rf"\caption{{{escape(said)}}}", r"\end{table}", ""]
    return lines[:-1]


def _rows(texts: Sequence[Sequence[str]]) -> list[str]:
    """Rows, with a space above those that are headings."""
    lines = []
    for place, row in enumerate(texts):
        if place and row[0] and not any(row[1:]):
            lines.append(r"\addlinespace")
        indent = r"\quad " if row[0].startswith(" ") else ""
        lines.append(indent + _row(row))
    return lines


def _row(texts: Sequence[str]) -> str:
    return " & ".join(escape(text) for text in texts) + r" \\"
