r"""LaTeX: the tables of a report, to be read into a paper with \input.

They need the package booktabs, and nothing else.

    >>> print(document([report]))
"""

import re
from collections.abc import Sequence

from probe.layout import extra_texts, further_tables, numeric, shared_tables, table_1
from probe.report import ExtraTable, Report
from probe.wording import caveats, overview

_CHARACTERS = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    **{character: f"{{{character}}}" for character in "[*"},  # at a row's start, not its end's
    "\\": r"\textbackslash{}",
    "~": r"$\sim$",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "↗": r"$\nearrow$",
    "→": r"$\to$",
    "↘": r"$\searrow$",
    "✓": r"$=$",
    "✗": r"$\neq$",
    "·": r"$\cdot$",
    "≤": r"$\le$",
    "α": r"$\alpha$",
}
_NEGATIVE = re.compile(r"(?<![\w)])-(?=[\d.])|(?<=\de)-(?=\d)")


def document(reports: Sequence[Report]) -> str:
    """The tables of a report, or of several: Table 1 as the paper lays it out, and all others."""
    tables = shared_tables(reports)
    if len(reports) == 1 and not reports[0].recipe.published:
        tables.append(table_1(reports))
    for report in reports:
        tables += further_tables(report)
    notes = dict.fromkeys(line for report in reports for line in caveats(report))
    lines = [f"% {line}" for line in (r"\usepackage{booktabs}", *overview(reports), *notes)]
    for table in tables:
        lines += ["", *table_lines(table)]
    return "\n".join(lines)


def table_lines(table: ExtraTable) -> list[str]:
    """Any table as a float of its own, with a space above rows that are headings."""
    columns = "".join("r" if right else "l" for right in numeric(table))
    lines = [r"\begin{table}", r"\centering\footnotesize\tabcolsep=3pt"]
    lines += [rf"\begin{{tabular}}{{{columns}}}"]
    lines += [r"\toprule", _row(table.columns), r"\midrule"]
    for place, row in enumerate(extra_texts(table)):
        if place and row[0] and not any(row[1:]):
            lines.append(r"\addlinespace")
        indent = r"\quad " if row[0].startswith(" ") else ""
        lines.append(indent + _row(row))
    caption = f"{table.title}. {table.note}".strip()
    lines += [r"\bottomrule", r"\end{tabular}", rf"\caption{{{escape(caption)}}}", r"\end{table}"]
    return lines


def _row(texts: Sequence[str]) -> str:
    return " & ".join(escape(" ".join(text.split())) for text in texts) + r" \\"


def escape(text: str) -> str:
    """Any text as LaTeX prints it."""
    signed = _NEGATIVE.sub("−", text)
    found = "".join(_CHARACTERS.get(character, character) for character in signed)
    return found.replace("−", "$-$")
