"""Wording: the sentences and numbers that every format of a report shares.

Nothing here knows a format: signs and arrows are characters, so that no meaning hangs on colour.

    >>> percent(-0.6123), number(0.00786)
    ('-61.2', '7.86e-3')
"""

from collections.abc import Sequence

import numpy as np

from probe.metrics import metric_named
from probe.recipe import Pair, PublishedChange
from probe.report._report import Report
from probe.stats import LARGE_SHARE, Cell, Influence
from probe.vocabulary import CUT_OFF_SHARE

ARROWS = {1: "↗", 0: "→", -1: "↘"}
"""Between the values of two models: the direction, where no colour is."""

SAME = {True: "✓", False: "✗", None: "-"}
"""Whether a published value moved in the same direction as ours."""

MUCH_OF_ONE = f"one question holds more than {100 * LARGE_SHARE:.0f} % of the change"
"""What `!` says, in every format."""


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
    return [
        cell
        for report in reports
        for cell in report.cells
        if cell.metric == "sample_diversity" and not cell.control
    ]


def heading(benchmark: str, pair: Pair, cells: Sequence[Cell]) -> str:
    """What is above the cells of a benchmark and pair."""
    method = f" ({pair.method})" if pair.method else ""
    counts = sorted({cell.samples + cell.left_out for cell in cells})
    samples = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    groups = sorted({cell.clusters for cell in cells if cell.clusters < cell.samples})
    clusters = f" in {groups[-1]} clusters" if groups else ""
    return f"{benchmark} · {pair.name}{method} · {samples} samples{clusters}"


def notes(reports: Sequence[Report]) -> list[str]:
    """What stands below all tables of a report, or of several."""
    lines = [line for report in reports for line in caveats(report)]
    return [*dict.fromkeys(diversity_line(reports) + lines)]


def caveats(report: Report) -> list[str]:
    """What a reader must know of the numbers: how they were made, and what they do not say."""
    lines = _cell_caveats(report) if report.cells else []
    if any(c.published for c in report.cells) or any(r.published for r in report.accuracy):
        lines.append(
            "published: what was printed elsewhere for the row above. ✓: ours moved in the same "
            "direction; ✗: it did not."
        )
    lines += _cut_off_lines(report)
    lines += [f"{line[0].upper()}{line[1:]}." for line in report.versions]
    if report.missing:
        lines.append(f"Not in this report ({len(report.missing)}): " + "; ".join(report.missing))
    return lines


def _cell_caveats(report: Report) -> list[str]:
    recipe = report.recipe
    lines = [
        f"Convention {recipe.selection.convention!r}, {recipe.attribution.method}, granularity "
        f"{recipe.attribution.granularity}, {recipe.report.bins} bins, {recipe.compute.dtype}."
    ]
    if recipe.report.resamples:
        lines.append(
            "Alphas are cuts of the same answers: one piece of evidence, not several. All of this "
            "is about other questions, not about other training runs."
        )
    return lines + _influence_lines(report) + _left_out_lines(report)


def _influence_lines(report: Report) -> list[str]:
    """How many changes are much of one question's, and the worst of them."""
    lines = []
    for ours in (True, False):
        held = [(c.influence if ours else c.paper_influence, c) for c in report.cells]
        found = [(most, cell) for most, cell in held if most and warning(most)]
        if not found:
            continue
        most, cell = max(found, key=lambda row: row[0].share)
        name = name_of(cell.metric) if ours else metric_named(cell.metric).label
        what = f"{name} ({cell.control})" if cell.control else name
        turned = sum(not most.sign_survives for most, _ in found)
        signs = f", and its sign in {turned}" if turned else ""
        whose, key = ("our", "influence") if ours else ("the paper's", "paper_influence")
        lines.append(
            f"!: {MUCH_OF_ONE} of {whose} number in {len(found)} of "
            f"{counted(len(report.cells), 'cell')}{signs}; most, "
            f"{100 * most.share:.0f} %, in {what} of {cell.pair} on {cell.benchmark} at "
            f"{cell.alpha:g} (question {most.question}). JSON and CSV name each: {key}."
        )
    return lines


def _cut_off_lines(report: Report) -> list[str]:
    """Where many answers did not end: what is graded is then the limit, not the model."""
    limits = {pair.name: pair.max_new_tokens for pair in report.recipe.pairs}
    return [
        f"Of {row.questions} answers of {row.pair} on {row.benchmark}, {before} before and {after} "
        f"after did not end within {limits[row.pair]} tokens, and were graded as they stood: raise "
        "max_new_tokens, or see with `probe doctor` whether the end tokens and the chat template "
        "are those that the model was trained with."
        for row in report.accuracy
        for before, after in (row.cut_off,)
        if max(before, after) > CUT_OFF_SHARE * row.questions
    ]


def _left_out_lines(report: Report) -> list[str]:
    """Where questions have no value, and so do not count."""
    found = [
        f"{cell.left_out} in {name_of(cell.metric)} of {cell.pair} on {cell.benchmark} at "
        f"{cell.alpha:g}"
        for cell in report.cells
        if cell.left_out
    ]
    if not found:
        return []
    return [f"Questions without a value (0, or not defined), left out: {'; '.join(found)}."]


def warning(found: Influence | None) -> str:
    """A mark where one question holds much of a change."""
    # Of five questions that contribute alike, each holds a fifth but for rounding.
    return "!" if found and found.share > LARGE_SHARE + 1e-3 else ""


def name_of(metric: str) -> str:
    """What a sentence calls our number of a metric."""
    estimand = metric_named(metric).estimand
    return estimand.name if estimand else metric.replace("_", " ")


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
    """Whether a change is significant, and whether one question holds much of it."""
    return ("*" if cell.significant else " ") + warning(cell.influence)


def interval(ends: tuple[float, float] | None, points: bool = False) -> str:
    """An interval of a relative change in percent, or of a difference of shares in points."""
    if ends is None:
        return "-"
    return "..".join(f"{100 * end:+z.{1 if points or abs(end) < 0.9995 else 0}f}" for end in ends)


def p_value(p: float | None) -> str:
    """A p-value with one or two digits."""
    if p is None:
        return "-"
    return f"{p:.2g}" if p >= 1e-3 else f"{p:.0e}".replace("e-0", "e-")


def listed(parts: Sequence[str]) -> str:
    """Several things in a sentence."""
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def counted(count: int, what: str) -> str:
    """So many of something."""
    return f"{count} {what}{'' if count == 1 else 's'}"
