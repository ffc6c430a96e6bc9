"""Rendering: a report in any format; each format has a module of its own.

Several reports are put side by side. JSON and CSV hold the cells, so that scripts need no more.

    >>> print_report(build_report(Path("runs/tiny-math")), "markdown")
"""

import csv
import io
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path

from rich.console import Group

from probe.errors import ProbeError
from probe.escaping import PlainConsole
from probe.files import write_where_asked
from probe.recipe import recipe_from
from probe.report import _latex as latex
from probe.report import _markdown as markdown
from probe.report import _terminal as terminal
from probe.report._report import Report
from probe.report._wording import run_names
from probe.stats import Agreement, Change, Influence
from probe.stats import _agreement as agreement
from probe.store import RunFolder, run_path


def print_report(reports: Report | Sequence[Report], style: str = "table") -> None:
    """Print a report, or several side by side, to standard output.

    Raises:
        ProbeError: An unknown format.
    """
    if style == "table":
        found = (reports,) if isinstance(reports, Report) else reports
        _console().print(terminal.view(found))
        if sys.stdout.isatty():  # which shows the end of a long text, and not its beginning
            _console().print(Group("", *terminal.opening_view(found)))
    else:
        print(render(reports, style))


def write_report(reports: Sequence[Report], style: str, path: Path) -> None:
    """Write a report, or several side by side, to a file; tables as plain text.

    Raises:
        ProbeError: An unknown format, or a file that cannot be written.
    """
    if style == "table":
        console = PlainConsole(file=io.StringIO(), width=100, record=True)
        console.print(terminal.view(reports))
        text = console.export_text().rstrip("\n")
    else:
        text = render(reports, style)
    try:
        write_where_asked(path, text + "\n")
    except OSError as error:
        raise ProbeError(
            f"cannot write to {path}: {error.strerror}; give another --output"
        ) from error


def print_faithfulness(agreements: Sequence[Agreement]) -> None:
    """Print how near the methods come to the exact effects to standard output."""
    _console().print(agreement.view(agreements))


def print_causal(run: str | Path) -> None:
    """Print the causal tests of a run to standard output."""
    from probe.report._causal import causal_tables  # computes with what scipy brings

    folder = RunFolder(run_path(run))
    recipe = recipe_from(folder.read_record()["recipe"], str(folder.record))
    for table in causal_tables(folder, recipe)[0]:
        _console().print(terminal.table_view(table))
        _console().print("")


def _console() -> PlainConsole:
    # Where nobody looks (a pipe, a file, CI) the width is fixed, so that runs compare.
    return PlainConsole(width=None if sys.stdout.isatty() else 100)


def render(reports: Report | Sequence[Report], style: str) -> str:
    """Write a report, or several side by side, as text.

    Args:
        reports: What to write.
        style: A name in `FORMATS`.

    Raises:
        ProbeError: An unknown format, or one that holds one report only.
    """
    if style not in FORMATS:
        raise ProbeError(f"format {style!r} is not known; use table, {', '.join(FORMATS)}")
    return FORMATS[style]((reports,) if isinstance(reports, Report) else tuple(reports))


def _json(reports: Sequence[Report]) -> str:
    """That of report.json; of several, a list of them."""
    tables = [report.table for report in reports]
    return json.dumps(tables[0] if len(tables) == 1 else tables, indent=1, allow_nan=False)


def _csv(reports: Sequence[Report]) -> str:
    """A line per cell; with several reports, the run's name comes first."""
    text = io.StringIO()
    rows = []
    for name, report in zip(run_names(reports), reports, strict=True):
        for cell in report.cells:
            row: dict[str, object] = {"run": name} if len(reports) > 1 else {}
            for key, value in asdict(cell).items():
                if key in _PARTS:
                    parts = value or dict.fromkeys(_PARTS[key])
                    row |= {f"{key}_{part}": number for part, number in parts.items()}
                elif key == "interval":
                    row["interval_low"], row["interval_high"] = value or (None, None)
                else:
                    row[key] = value
            rows.append(row)
    if rows:
        writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue().rstrip("\n")


_PARTS = dict.fromkeys(
    ("paper", "real_edges", "published"), tuple(field.name for field in fields(Change))
) | dict.fromkeys(
    ("influence", "paper_influence"), tuple(field.name for field in fields(Influence))
)
"""What a cell holds as a record of its own: a column of CSV for each of its fields."""


def _html(reports: Sequence[Report]) -> str:
    """One page that needs nothing else."""
    from probe.report._webpage import page  # draws, and so loads matplotlib

    return page(reports)


FORMATS: dict[str, Callable[[Sequence[Report]], str]] = {
    "markdown": markdown.document,
    "latex": latex.document,
    "html": _html,
    "json": _json,
    "csv": _csv,
}
"""Every format that is text, by its name; `table` is for the terminal."""
