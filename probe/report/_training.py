"""The picture of a training: accuracy and every metric against the step, a panel each.

>>> for name, figure in training_figures(report):
...     figure.savefig(f"{name}.png")
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from probe.escaping import figure as escape
from probe.metrics import metric_named
from probe.report._picture import Picture, plain_axes
from probe.report._report import Report
from probe.report._trajectory import trainings
from probe.stats import Accuracy, Cell, Interval

EQUAL = "equal loss"
_LOOKS = {"": ("#0072B2", "o", "-"), EQUAL: ("#D55E00", "s", "--")}
_WORDS = {"": "as it is", EQUAL: "at equal loss"}
_APART = 20
"""Steps whose largest is so many times the smallest stand on a logarithmic axis."""


class Point(NamedTuple):
    """One checkpoint."""

    step: int
    """Its step."""

    value: float
    """What is drawn."""

    interval: Interval | None
    """95 %, over questions."""


def training_figures(report: Report, longest: bool = False) -> Iterator[tuple[str, Figure]]:
    """A figure of each training on each benchmark at each alpha, with its name.

    Trainings of which fewer than two checkpoints are compared yet are left out.

    Args:
        report: The report of a run.
        longest: Whether to draw the largest alpha only.
    """
    for name, title, steps, cells, rows in _drawn(report, longest):
        yield name, _draw(title, steps, cells, rows)


def count_trainings(report: Report) -> int:
    """How many such figures there are."""
    return sum(1 for _ in _drawn(report))


def _drawn(
    report: Report, longest: bool = False
) -> Iterator[tuple[str, str, dict[str, int], list[Cell], list[Accuracy]]]:
    """Name and title of each figure; the step of each pair, its cells and accuracies."""
    for (name, benchmark, alpha), found in trainings(report.recipe).items():
        if longest and alpha < max(report.recipe.selection.alpha):
            continue
        steps = {one.pair.name: step for step, one in found}
        cells = [c for c in report.cells if (c.benchmark, c.alpha) == (benchmark, alpha)]
        cells = [c for c in cells if c.pair in steps and c.control in _LOOKS]
        rows = [row for row in report.accuracy if row.benchmark == benchmark and row.pair in steps]
        if len({cell.pair for cell in cells}) < 2:
            continue
        title = f"{name} on {benchmark}, alpha {alpha:g}"
        yield f"training.{name}.{benchmark}.alpha-{alpha:g}", title, steps, cells, rows


def _draw(
    title: str, steps: Mapping[str, int], cells: Sequence[Cell], rows: Sequence[Accuracy]
) -> Figure:
    metrics = list(dict.fromkeys(cell.metric for cell in cells))
    columns = 3
    lines = 1 + -(-len(metrics) // columns)
    figure = Picture((8.4, 0.9 + 1.9 * lines), layout="constrained", dpi=160)
    grid = figure.add_gridspec(lines, columns)
    ends = min(steps.values()), max(steps.values())
    logarithmic = ends[0] > 0 and ends[1] >= _APART * ends[0]
    top = figure.add_subplot(grid[0, :])
    _accuracy(top, steps, rows)
    panels = [top]
    for place, metric in enumerate(metrics):
        axes = figure.add_subplot(grid[1 + place // columns, place % columns])
        _metric(axes, steps, [cell for cell in cells if cell.metric == metric])
        panels.append(axes)
    for axes in panels:
        if logarithmic:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter("{x:g}")
        plain_axes(axes, "y")
        axes.set_xlabel("step", fontsize=8)
    handles, texts = panels[1].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.suptitle(
        f"{escape(title)}\neach checkpoint against the base, with 95 % intervals over questions",
        fontsize=10,
        x=0.01,
        ha="left",
    )
    return figure


def _accuracy(axes: Axes, steps: Mapping[str, int], rows: Sequence[Accuracy]) -> None:
    """Accuracy of every checkpoint; the base's is a line."""
    axes.set_title("accuracy (%)", fontsize=9, loc="left")
    points = []
    for row in rows:
        base = 100 * row.before
        ends = None
        if row.interval is not None:
            ends = base + 100 * row.interval[0], base + 100 * row.interval[1]
        points.append(Point(steps[row.pair], 100 * row.after, ends))
    _curve(axes, points, "", "")
    if rows:
        axes.axhline(100 * rows[0].before, color="0.4", lw=1, ls=":")
        axes.annotate(
            "base",
            (1, 100 * rows[0].before),
            (-2, 3),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color="0.4",
        )


def _metric(axes: Axes, steps: Mapping[str, int], cells: Sequence[Cell]) -> None:
    """The change of one metric, as it is and at equal loss."""
    metric = metric_named(cells[0].metric)
    label = metric.estimand.label if metric.estimand else metric.label
    axes.set_title(f"{label}, change (%)", fontsize=9, loc="left")
    axes.axhline(0, color="0.4", lw=1, ls=":")
    for control in _LOOKS:
        points = [
            Point(
                steps[cell.pair],
                100 * cell.change,
                cell.interval and (100 * cell.interval[0], 100 * cell.interval[1]),
            )
            for cell in cells
            if cell.control == control and cell.change is not None
        ]
        if points:
            _curve(axes, points, control, _WORDS[control])


def _curve(axes: Axes, points: Sequence[Point], control: str, label: str) -> None:
    colour, marker, line = _LOOKS[control]
    points = sorted(points)
    places = [point.step for point in points]
    ends = [point.interval or (point.value, point.value) for point in points]
    low, high = ([end[side] for end in ends] for side in (0, 1))
    axes.fill_between(places, low, high, color=colour, alpha=0.18, lw=0)
    axes.plot(
        places,
        [point.value for point in points],
        color=colour,
        marker=marker,
        ls=line,
        ms=4,
        lw=1.4,
        label=label,
    )
