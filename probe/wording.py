"""Wording: the sentences and numbers that every format of a report shares.

Nothing here knows a format: signs and arrows are characters, so that no meaning hangs on colour.

    >>> percent(-0.6123), number(0.00786)
    ('-61.2', '7.86e-3')
"""

from collections.abc import Sequence

import numpy as np

from probe.metrics import METRICS, TOKEN_METRICS
from probe.recipe import Pair, PublishedChange
from probe.report import Cell, Report
from probe.statistics import LEVEL

ARROWS = {1: "↗", 0: "→", -1: "↘"}
"""Between the values of two models: the direction, where no colour is."""

SAME = {True: "✓", False: "✗", None: "-"}
"""Whether a published value moved in the same direction as ours."""


def summary(report: Report) -> list[str]:
    """One sentence per benchmark and pair: what moved, and whether as the paper reports."""
    if not report.cells:
        return _accuracy_sentences(report)
    tested = report.recipe.report.resamples > 0
    return [
        _sentence(benchmark, pair.method or pair.name, cells, tested)
        for benchmark, pair, cells in groups(report)
    ]


def overview(reports: Sequence[Report]) -> list[str]:
    """What stands on top: a report's summary and Figure 3a in a sentence; of several, all."""
    if not compared(reports):
        return [line for report in reports for line in summary(report)] + diversity_line(reports)
    lines = []
    for name, report in zip(run_names(reports), reports, strict=True):
        lines += [f"{name}: {line}" for line in (*summary(report), *diversity_line([report]))]
    found: dict[tuple[object, ...], set[int]] = {}
    seen: dict[tuple[object, ...], int] = {}
    for cell in (cell for report in reports for cell in report.cells):
        place = (cell.pair, cell.benchmark, cell.alpha, cell.metric)
        found.setdefault(place, set()).add(int(np.sign(cell.change or 0)))
        seen[place] = seen.get(place, 0) + 1
    shared = [signs for place, signs in found.items() if seen[place] == len(reports)]
    agree = sum(len(signs) == 1 for signs in shared)
    return [*lines, f"{agree} of {_cells(len(shared))} moved in the same direction in all runs."]


def compared(reports: Sequence[Report]) -> bool:
    """Whether several reports are of the same cells, so that one run is set against the other.

    If not, they are parts of one whole, as the runs of a paper's four pairs.
    """
    places = [{(c.pair, c.benchmark, c.alpha) for c in report.cells} for report in reports]
    return sum(map(len, places)) > len(set().union(*places))


def run_names(reports: Sequence[Report]) -> tuple[str, ...]:
    """A name for each of several runs: its recipe's, else its folder's, else its whole path."""
    names: tuple[str, ...] = ()
    for names in (
        tuple(report.recipe.name for report in reports),
        tuple(report.path.resolve().name for report in reports),
        tuple(str(report.path) for report in reports),
    ):
        if len(set(names)) == len(names):
            break
    return names


def groups(report: Report) -> list[tuple[str, Pair, list[Cell]]]:
    """The cells of a report by benchmark and pair, where there are any."""
    found = []
    for benchmark in report.recipe.benchmarks:
        for pair in report.recipe.pairs:
            cells = [
                c for c in report.cells if (c.pair, c.benchmark) == (pair.name, benchmark.name)
            ]
            if cells:
                found.append((benchmark.name, pair, cells))
    return found


def _sentence(benchmark: str, subject: str, cells: Sequence[Cell], tested: bool) -> str:
    known = [cell for cell in cells if cell.change is not None]
    moved = [cell for cell in known if cell.change and (cell.significant or not tested)]
    adverb = " significantly" if tested else ""
    if not moved:
        return f"On {benchmark}, {subject} changed none of {_cells(len(known))}{adverb}."
    parts: list[str] = []
    for verb, sign in (("raised", 1), ("lowered", -1)):
        counts: list[str] = []
        for metric in (*METRICS, *TOKEN_METRICS):
            of_metric = [cell for cell in known if cell.metric == metric]
            count = sum(cell.metric == metric and (cell.change or 0) * sign > 0 for cell in moved)
            if count:
                unit = "" if parts or counts else " cells"
                name = metric.replace("_", " ")
                counts.append(f"{name} in {count} of {len(of_metric)}{unit}")
        if counts:
            parts.append(f"{verb} {listed(counts)}")
    agree, against = (sum(cell.as_in_paper is way for cell in moved) for way in (True, False))
    verdict = f"{agree} of {_cells(len(known))} moved as the paper reports for online RL"
    return (
        f"On {benchmark}, {subject}{adverb} {', and '.join(parts)}: {verdict}, "
        f"{against} against it."
    )


def _accuracy_sentences(report: Report) -> list[str]:
    """One sentence per pair, where nothing but accuracy is known."""
    lines = []
    for pair in report.recipe.pairs:
        rows = [row for row in report.accuracy if row.pair == pair.name]
        if rows:
            count = f"{len(rows)} benchmark{'' if len(rows) == 1 else 's'}"
            points = [100 * (row.after - row.before) for row in rows]
            rose = sum(change > 0 for change in points)
            lines.append(
                f"{pair.method or pair.name} raised accuracy on {rose} of {count}, by "
                f"{np.mean(points):+z.1f} points on average."
            )
    return lines


def diversity_line(reports: Sequence[Report]) -> list[str]:
    """Figure 3a in a sentence: how inter-sample diversity moved over all experiments."""
    changes = [cell.change for cell in diversity_cells(reports) if cell.change is not None]
    if not changes:
        return []
    count, improvement = len(changes), float(np.mean(changes))
    rate = sum(change > 0 for change in changes) / count
    line = (
        f"Inter-sample diversity over {count} experiment{'' if count == 1 else 's'}: average "
        f"improvement {percent(improvement)} %, improvement rate {100 * rate:.1f} %"
    )
    published = published_average(reports)
    return [f"{line} (published: {published})." if published else f"{line}."]


def published_diversity(reports: Sequence[Report]) -> PublishedChange | None:
    """Figure 3a's average over all pairs, where a recipe says what was printed."""
    for report in reports:
        for value in report.recipe.published_changes:
            if (value.metric, value.pair, value.alpha) == ("sample_diversity", None, None):
                return value
    return None


def published_average(reports: Sequence[Report]) -> str:
    """The same in words, or nothing."""
    value = published_diversity(reports)
    if value is None:
        return ""
    count = f"{value.experiments} experiments, " if value.experiments else ""
    rate = f", {100 * value.rate:.1f} % of them improved" if value.rate is not None else ""
    return f"{count}{percent(value.change)} %{rate}"


def diversity_cells(reports: Sequence[Report]) -> list[Cell]:
    """The cells of Figure 3a: inter-sample diversity in each experiment."""
    return [c for report in reports for c in report.cells if c.metric == "sample_diversity"]


def heading(benchmark: str, pair: Pair, cells: Sequence[Cell]) -> str:
    """What is above the cells of a benchmark and pair."""
    method = f" ({pair.method})" if pair.method else ""
    counts = sorted({cell.samples for cell in cells})
    samples = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"{benchmark} · {pair.name}{method} · {samples} samples"


def caveats(report: Report) -> list[str]:
    """What a reader must know of the numbers: how they were made, and what they do not say."""
    lines = _cell_caveats(report) if report.cells else []
    if any(c.published for c in report.cells) or any(r.published for r in report.accuracy):
        lines.append(
            "published: what was printed elsewhere for the row above. ✓: ours moved in the same "
            "direction; ✗: it did not."
        )
    if report.missing:
        lines.append(f"Not in this report ({len(report.missing)}): " + "; ".join(report.missing))
    return lines


def _cell_caveats(report: Report) -> list[str]:
    recipe = report.recipe
    shown, other = "the dense matrix, structural zeros included", "real edges only"
    if recipe.report.entries == "real":
        shown, other = other, shown
    column = "dense %" if recipe.report.entries == "real" else "real %"
    lines = [
        f"Metrics over {shown}; {column}: change of the same over {other}. "
        f"Convention {recipe.selection.convention!r}, {recipe.attribution.method}, granularity "
        f"{recipe.attribution.granularity}, {recipe.report.bins} bins, {recipe.compute.dtype}. "
        "paper: whether it moved as the paper reports for online RL.",
        "A change is shown without its noise: it is no finding by itself.",
    ]
    if recipe.report.resamples:
        tested = sum(cell.p_value is not None for cell in report.cells)
        lines[1] = (
            f"Marks: * is significant, p < {LEVEL:g} where a question's two sides are exchanged at "
            f"random, adjusted (Holm) for {_cells(tested)}. ~ is within the noise: halves of one "
            "model's questions differ as much. Interval: 95 % of the change with questions drawn "
            f"again{', over the dense matrix' if recipe.report.entries == 'real' else ''}. "
            "All of this is about other questions, not about other training runs."
        )
    return lines


def number(value: float | None) -> str:
    """Three digits and an exponent."""
    if value is None:
        return "-"
    digits, exponent = f"{value:.2e}".split("e")
    return f"{digits}e{int(exponent)}"


def both(before: float | None, after: float | None) -> str:
    """A value of two models, and an arrow for its direction."""
    return f"{number(before)} {arrow(before, after)} {number(after)}"


def arrow(before: float | None, after: float | None) -> str:
    """The direction from one value to another."""
    return ARROWS[0 if before is None or after is None else int(np.sign(after - before))]


def percent(change: float | None) -> str:
    """A relative change in percent, signed."""
    if change is None:
        return "-"
    return f"{100 * change:+z.{1 if abs(change) < 10 else 0}f}"


def marks(cell: Cell) -> str:
    """Whether a change is significant, and whether it is within the noise."""
    return ("*" if cell.significant else " ") + ("~" if cell.above_noise is False else "")


def interval(ends: tuple[float, float] | None) -> str:
    """An interval of a relative change, in percent."""
    if ends is None:
        return "-"
    return "..".join(f"{100 * end:+z.{1 if abs(end) < 0.9995 else 0}f}" for end in ends)


def listed(parts: Sequence[str]) -> str:
    """Several things in a sentence."""
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def _cells(count: int) -> str:
    return f"{count} cell{'' if count == 1 else 's'}"
