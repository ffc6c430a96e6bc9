"""Opening: what a report says first, in sentences that need no table and no other page.

Of each pair, or of all checkpoints of a training together: what became of its answers, what became
of its inside, under controls too; then how far that can be trusted, and where to look next. Every
format shows these lines as they are.

    >>> for finding in opening([report]):
    ...     print(finding.subject, dict(finding.lines)["Accuracy"])
"""

import shlex
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from probe.metrics import METRICS, TOKEN_METRICS
from probe.recipe import Pair, trainings_of
from probe.report._report import Report
from probe.report._wording import (
    compared,
    counted,
    groups,
    interval,
    listed,
    name_of,
    p_value,
    percent,
    run_names,
)
from probe.stats import Accuracy, Cell

MAIN = "activation_intensity"
"""The metric that the sentence on the inside is about."""

TOLD_AS_ONE = 3
"""From so many compared checkpoints on, a training is one subject; before, each is its own."""

GOOD_RANKS = 0.9
"""Below this Spearman correlation with exact effects no single edge is called a finding."""


class Finding(NamedTuple):
    """What is said of one subject: a pair on a benchmark, or a whole run."""

    subject: str
    """What it is of."""

    lines: tuple[tuple[str, str], ...]
    """A label and a sentence or two each."""

    @property
    def text(self) -> str:
        """All of it in one line."""
        return " ".join((f"{self.subject}:", *(f"{label}: {text}" for label, text in self.lines)))


def opening(reports: Sequence[Report]) -> list[Finding]:
    """What stands on top of a report, or of several."""
    found = []
    beside = compared(reports)
    for name, report in zip(run_names(reports), reports, strict=True):
        of_pairs = _findings(report)
        start = f"{name}: " if beside else ""
        found += [one._replace(subject=f"{start}{one.subject}") for one in of_pairs]
    if beside:
        found.append(Finding("All runs", (("Direction", _agreement_sentence(reports)),)))
    scored = [report for report in reports if report.cells]
    sure = [("Trust", trust_sentence(report)) for report in scored]
    if sure:
        sure = [*dict.fromkeys(sure), ("Next", next_sentence(scored[0]))]
        found.append(Finding("How sure, and what next", tuple(sure)))
    return found


def summary(report: Report) -> list[str]:
    """A line per benchmark and pair: accuracy, and what moved inside, under controls too."""
    return [finding.text for finding in _findings(report)]


def _findings(report: Report) -> list[Finding]:
    """What is said of each pair on each benchmark; of accuracy alone, of each pair."""
    if not report.cells:
        return _accuracy_findings(report)
    rows = {(row.benchmark, row.pair): row for row in report.accuracy}
    tested = report.recipe.report.resamples > 0
    along = _along(report)
    said: set[tuple[str, str]] = set()
    found = []
    for benchmark, pair, cells in groups(report):
        if (benchmark, pair.name) in along:
            name, steps = along[benchmark, pair.name]
            if (benchmark, name) not in said:
                said.add((benchmark, name))
                found.append(_training_finding(report, benchmark, name, steps))
            continue
        row = rows.get((benchmark, pair.name))
        lines = [("Accuracy", _accuracy_sentence(row))] if row else []
        lines += [
            ("Inside", _inside_sentence(cells)),
            ("All cells", _cells_sentence(cells, tested)),
        ]
        questions = f"{row.questions} questions of " if row else ""
        found.append(Finding(f"{_models(pair)} on {questions}{benchmark}", tuple(lines)))
    return found


def _along(report: Report) -> dict[tuple[str, str], tuple[str, list[tuple[int, Pair]]]]:
    """By benchmark and pair, the name of a training that is told as one, and its checkpoints."""
    compared_there = {(benchmark, pair.name) for benchmark, pair, _ in groups(report)}
    found: dict[tuple[str, str], tuple[str, list[tuple[int, Pair]]]] = {}
    for (name, benchmark, _), steps in trainings_of(report.recipe.comparisons()).items():
        there = [(n, one.pair) for n, one in steps if (benchmark, one.pair.name) in compared_there]
        if len(there) >= TOLD_AS_ONE:
            found |= {(benchmark, pair.name): (name, there) for _, pair in there}
    return found


def _training_finding(
    report: Report, benchmark: str, name: str, steps: Sequence[tuple[int, Pair]]
) -> Finding:
    """What is said of the checkpoints of a training on a benchmark, all together."""
    step_of = {pair.name: step for step, pair in steps}
    rows = [r for r in report.accuracy if r.benchmark == benchmark and r.pair in step_of]
    cells = [c for c in report.cells if c.benchmark == benchmark and c.pair in step_of]
    tested = report.recipe.report.resamples > 0
    last, pair = max(step_of[cell.pair] for cell in cells), steps[-1][1]
    inside = _inside_sentence([cell for cell in cells if step_of[cell.pair] == last])
    raw = [cell for cell in cells if (cell.metric, cell.control) == (MAIN, "")]
    longest = max((cell.alpha for cell in raw), default=0.0)
    sure = [step_of[c.pair] for c in raw if c.alpha == longest and c.significant]
    if sure:
        inside += (
            f" The raw change is beyond chance at {len(sure)} of {len(steps)} checkpoints, first "
            f"at step {min(sure)}."
        )
    lines = [("Accuracy", _accuracy_along(rows, step_of))] if rows else []
    lines += [
        ("Inside", f"at step {last}, {inside}"),
        ("All cells", _cells_sentence(cells, tested)),
    ]
    questions = f"{rows[0].questions} questions of " if rows else ""
    base = pair.before.rstrip("/").split("/")[-1]
    method = f" ({pair.method})" if pair.method else ""
    subject = f"{base} → {name}{method}, {len(steps)} checkpoints to step {last}"
    return Finding(f"{subject}, on {questions}{benchmark}", tuple(lines))


def _accuracy_along(rows: Sequence[Accuracy], step_of: Mapping[str, int]) -> str:
    """What became of the answers along a training, and how often that is sure."""
    rows = sorted(rows, key=lambda row: step_of[row.pair])
    last = rows[-1]
    words = f"from {100 * last.before:.1f} to {100 * last.after:.1f} % at step {step_of[last.pair]}"
    ends = (("least", min(rows, key=_right)), ("most", max(rows, key=_right)))
    told = [
        f"{what} {100 * row.after:.1f} % at step {step_of[row.pair]}"
        for what, row in ends
        if row is not last
    ]
    words = "; ".join((words, *told))
    if all(row.p_value is None for row in rows):
        return f"{words}."
    better, worse = (
        sum(row.significant is True and (row.after > row.before) is way for row in rows)
        for way in (True, False)
    )
    return (
        f"{words}. Of {counted(len(rows), 'checkpoint')} {better} {_is(better)} significantly "
        f"better than the base, and {worse} {_is(worse)} worse."
    )


def _right(row: Accuracy) -> float:
    return row.after


def _is(count: int) -> str:
    return "is" if count == 1 else "are"


def _models(pair: Pair) -> str:
    """Which model became which, by the ends of their references where these tell them apart."""
    short = [name.rstrip("/").split("/")[-1] for name in (pair.before, pair.after)]
    before, after = short if short[0] != short[1] else (pair.before, pair.after)
    method = f" ({pair.method})" if pair.method else ""
    return f"{before} → {after}{method}"


def _accuracy_sentence(row: Accuracy) -> str:
    """What became of the answers, and how sure that is."""
    change = 100 * (row.after - row.before)
    values = f"from {100 * row.before:.1f} to {100 * row.after:.1f} %"
    if row.p_value is None:
        return f"moved {values}."
    test = "McNemar" if row.clusters == row.questions else "clusters flipped"
    ends = f", 95 % interval {interval(row.interval, points=True)}" if row.interval else ""
    found = f"{change:+z.1f} points{ends}; {test} p = {p_value(row.p_value)}"
    flips = f"{row.gained} more solved, {row.lost} no longer"
    if not row.significant:
        return f"no measurable change, {values} ({found}); {flips}."
    return f"{'rose' if change > 0 else 'fell'} {values} ({found}); {flips}."


def _inside_sentence(cells: Sequence[Cell]) -> str:
    """What became of intensity at the longest scored length, and what is left under control."""
    longest = max(cell.alpha for cell in cells)
    found = {
        cell.control: cell
        for cell in cells
        if (cell.metric, cell.alpha) == (MAIN, longest) and cell.change is not None
    }
    raw = found.get("")
    if raw is None:
        return "intensity, the mean strength of an edge, has no defined change."
    where = (
        f"{raw.samples} questions that both solve, scored up to {100 * longest:g} % of the usual "
        f"length: alpha {longest:g}"
    )
    what = "intensity, the mean strength of an edge,"
    if raw.significant is False:
        words = f"{what} did not measurably change ({percent(raw.change)} %; {where})."
    else:
        words = f"{what} {_verb(raw, 'rose', 'fell')} by {_size(raw)} ({where})."
    return words + _control_words(found, cells)


def _control_words(found: dict[str, Cell], cells: Sequence[Cell]) -> str:
    """What being surer does by itself, and what is left where both models are as sure."""
    if not {"sharpness", "equal loss"} & found.keys():
        return " Whether the model only became surer of its answers is not controlled for."
    entropy = [
        c.change or 0 for c in cells if (c.metric, c.alpha) == ("token_entropy", found[""].alpha)
    ]
    sure = "less sure" if entropy and entropy[0] > 0 else "surer"
    words = ""
    if "sharpness" in found:
        alone = found["sharpness"]
        words += f" Being {sure} alone would {_verb(alone, 'raise', 'lower')} it by {_size(alone)}."
    if "equal loss" in found:
        equal = found["equal loss"]
        ends = f" [{interval(equal.interval)}]" if equal.interval else ""
        left = {True: ": sureness is not all of it", False: ", which is not significant", None: ""}
        words += f" At equal loss the change is {percent(equal.change)} %{ends}"
        words += f"{left[equal.significant]}."
    return words


def _verb(cell: Cell, rises: str, falls: str) -> str:
    return rises if (cell.change or 0) > 0 else falls


def _size(cell: Cell) -> str:
    return f"{percent(cell.change).lstrip('+-')} %"


def _cells_sentence(cells: Sequence[Cell], tested: bool) -> str:
    """How many cells moved, and how many of them as the paper reports."""
    known = [cell for cell in cells if cell.change is not None and not cell.control]
    moved = [cell for cell in known if cell.change and (cell.significant or not tested)]
    metrics, alphas = (len({getattr(c, name) for c in known}) for name in ("metric", "alpha"))
    what = f"{counted(metrics, 'metric')} at {counted(alphas, 'alpha')}"
    if (pairs := len({cell.pair for cell in known})) > 1:
        what += f" of {counted(pairs, 'checkpoint')}"
    beyond = " beyond chance" if tested else ""
    if not moved:
        return f"none of {len(known)} ({what}) moved{beyond}."
    order = [name for name in (*METRICS, *TOKEN_METRICS) if any(c.metric == name for c in moved)]
    names = listed([_moves(moved, name) for name in order])
    agree, against = (sum(cell.as_in_paper is way for cell in moved) for way in (True, False))
    return (
        f"{len(moved)} of {len(known)} ({what}) moved{beyond}: {names}. {agree} moved as the paper "
        f"(arXiv 2509.21044) reports for online RL, {against} against it."
    )


def _moves(moved: Sequence[Cell], metric: str) -> str:
    """In how many cells a metric moved, and which way."""
    changes = [cell.change or 0 for cell in moved if cell.metric == metric]
    counts = ((sum(change > 0 for change in changes), "up"), (sum(c < 0 for c in changes), "down"))
    ways = ", ".join(f"{count} {way}" for count, way in counts if count)
    return f"{name_of(metric)} ({ways})"


def _accuracy_findings(report: Report) -> list[Finding]:
    """What is said of each pair, where nothing but accuracy is known."""
    found = []
    for pair in report.recipe.pairs:
        rows = [row for row in report.accuracy if row.pair == pair.name]
        if not rows:
            continue
        points = [100 * (row.after - row.before) for row in rows]
        rose = sum(change > 0 for change in points)
        line = (
            f"rose on {rose} of {counted(len(rows), 'benchmark')}, by {np.mean(points):+z.1f} "
            "points on average"
        )
        if any(row.p_value is not None for row in rows):
            sure = [row for row in rows if row.significant]
            up = sum(row.after > row.before for row in sure)
            line += f"; significantly, it rose on {up} and fell on {len(sure) - up}"
        found.append(Finding(_models(pair), (("Accuracy", f"{line}."),)))
    return found


def _agreement_sentence(reports: Sequence[Report]) -> str:
    """In how many cells several runs moved the same way."""
    found: dict[tuple[object, ...], set[int]] = {}
    seen: dict[tuple[object, ...], int] = {}
    for cell in (c for report in reports for c in report.cells if not c.control):
        place = (cell.pair, cell.benchmark, cell.alpha, cell.metric)
        found.setdefault(place, set()).add(int(np.sign(cell.change or 0)))
        seen[place] = seen.get(place, 0) + 1
    shared = [signs for place, signs in found.items() if seen[place] == len(reports)]
    agree = sum(len(signs) == 1 for signs in shared)
    return f"{agree} of {counted(len(shared), 'cell')} moved in the same direction in all runs."


def trust_sentence(report: Report) -> str:
    """How near the scores come to exact effects, where that was measured, and else how to."""
    method = report.recipe.attribution.method
    if method == "exact":
        return "exact: each is what removing the edge does to the loss."
    rows = [row for row in report.faithfulness if row.method == method]
    found = [row.spearman for row in rows if row.spearman.value is not None]
    if not found:
        return (
            f"how near the scores ({method}) come to what removing an edge does is not measured: "
            f"probe faithfulness {shlex.quote(str(report.path))}"
        )
    worst = min(found, key=lambda estimate: estimate.value or 0)
    low = "" if worst.low is None else f" [{worst.low:.2f}..{worst.high or 0:.2f}]"
    words = (
        f"against removing {rows[0].edges} edges of each model exactly, {method} ranks them at a "
        f"Spearman correlation of {worst.value:.2f}{low} in the worst of {len(found)} models (1: "
        "the same order, 0: chance)"
    )
    unsure = (worst.value or 0) < GOOD_RANKS
    return f"{words}{'; at that, no single edge is a finding' if unsure else ''}."


def next_sentence(report: Report) -> str:
    """What shows more of a run."""
    run = shlex.quote(str(report.path))
    return (
        f"probe problems {run}: which questions flipped, and what was written; probe report {run} "
        "--format html --output report.html: every edge and question, to point at."
    )
