"""What other tools read: every edge of a run as parquet, or the edges that changed most as DOT.

>>> export_run("runs/tiny-math", Path("edges.parquet"))
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from probe.attribution import EdgeScores
from probe.errors import ProbeError, not_known
from probe.files import write_where_asked, write_whole
from probe.recipe import Comparison
from probe.report._graph_files import write_graphs
from probe.report._report import Report
from probe.report._stored import read_report
from probe.report._strength import EDGES, STRONGER, WEAKER, Strength, read_strengths
from probe.store import RunFolder

if TYPE_CHECKING:
    import pyarrow


def export_run(run: str | Path, path: Path) -> None:
    """Write the edges of both models of every comparison to one file; its suffix is the format.

    `.parquet` has a row per comparison, question and edge: `pair`, `benchmark`, `alpha`,
    `question`, `source`, `target`, and the scores `before` and `after` in nats, float32. `.dot` has
    a digraph per comparison with the edges whose mean |score| changed most. A folder gets graphs
    in the JSON of circuit-tracer and Neuronpedia; see `write_graphs`.

    Args:
        run: A run folder, or a file in it.
        path: Where to.

    Raises:
        ProbeError: No run folder, none of these formats, no edges yet, or a file that cannot be
            written.
    """
    write = _FORMATS.get(path.suffix)
    if write is None:
        raise ProbeError(f"{path}: {not_known('format', path.suffix, filter(None, _FORMATS))}")
    report = read_report(run)
    if not report.cells:
        raise ProbeError(f"{report.path} has no edges of both models yet; run the recipe again")
    try:
        write(report, path)
    except OSError as error:
        raise ProbeError(f"cannot write to {path}: {error.strerror or error}") from error


def _write_parquet(report: Report, path: Path) -> None:
    from pyarrow.parquet import ParquetWriter

    def write(place: Path) -> None:
        writer = None
        for table in _tables(report):
            writer = writer or ParquetWriter(place, table.schema)
            writer.write_table(table)
        if writer is not None:
            writer.close()

    write_whole(path, write)


def _tables(report: Report) -> Iterator["pyarrow.Table"]:
    """One table per comparison whose edges are there: all of them may not fit in memory."""
    here = {(cell.pair, cell.benchmark, cell.alpha) for cell in report.cells}
    for comparison in report.recipe.comparisons():
        if comparison.key in here:
            sides = RunFolder(report.path).read_sides(comparison.name, "before", "after")
            yield _table(comparison, *sides)


def _table(comparison: Comparison, before: EdgeScores, after: EdgeScores) -> "pyarrow.Table":
    import pyarrow

    graph = before.graph
    rows, columns = graph.mask.nonzero(as_tuple=True)
    count = len(before)
    return pyarrow.table(
        {
            "pair": [comparison.pair.name] * count * len(rows),
            "benchmark": [comparison.benchmark] * count * len(rows),
            "alpha": [comparison.alpha] * count * len(rows),
            "question": [name for name in before.ids for _ in rows],
            "source": [graph.sources[row] for row in rows.tolist()] * count,
            "target": [graph.targets[column] for column in columns.tolist()] * count,
            "before": before.scores[:, graph.mask].float().flatten().numpy(),
            "after": after.scores[:, graph.mask].float().flatten().numpy(),
        }
    )


def _write_dot(report: Report, path: Path) -> None:
    graphs = (_digraph(strength) for strength in read_strengths(report))
    write_where_asked(path, "\n".join(graphs))


def _digraph(strength: Strength) -> str:
    """The edges that changed most: stronger ones solid, weaker ones dashed, input at the bottom."""
    changes = strength.largest(EDGES)
    largest = max((abs(edge.after - edge.before) for edge in changes), default=1)
    lines = [f"digraph {_quoted(strength.title)} {{", "  rankdir=BT;", "  node [shape=box];"]
    for edge in changes:
        rises = edge.after > edge.before
        values = {
            "before": f"{edge.before:.6g}",
            "after": f"{edge.after:.6g}",
            "penwidth": f"{0.5 + 3.5 * abs(edge.after - edge.before) / largest:.3g}",
            "style": "solid" if rises else "dashed",
            "color": STRONGER if rises else WEAKER,
        }
        told = ", ".join(f"{name}={_quoted(value)}" for name, value in values.items())
        lines.append(f"  {_quoted(edge.source)} -> {_quoted(edge.target)} [{told}];")
    return "\n".join([*lines, "}", ""])


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


_FORMATS: dict[str, Callable[[Report, Path], None]] = {
    ".parquet": _write_parquet,
    ".dot": _write_dot,
    "": write_graphs,
}
