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
from probe.report._trajectory import CHECKPOINTS, trainings
from probe.stats import Accuracy, Cell, Interval

EQUAL = "equal loss"
_LOOKS = {"": ("#0072B2", "o", "-"), EQUAL: ("#D55E00", "s", "--")}
_WORDS = {"": "as it is", EQUAL: "at equal loss"}
_MEASURED = (
    ("KL to the base (nats)", "KL", "KL low", "KL high", 1),
    ("weights moved (%)", "moved", "", "", 100),
)
"""What else has a panel: its title, the columns of the table of checkpoints, and their scale."""
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
    for one in _drawn(report, longest):
        yield one.name, _draw(one)


def count_trainings(report: Report) -> int:
    """How many such figures there are."""
    return sum(1 for _ in _drawn(report))


class _Drawing(NamedTuple):
    """What a figure shows."""

    name: str
    """The figure's name."""

    title: str
    """What stands above it."""

    steps: Mapping[str, int]
    """The step of each pair."""

    cells: Sequence[Cell]
    """The cells of its checkpoints, as they are and at equal loss."""

    accuracy: Sequence[Accuracy]
    """Their accuracies."""

    measured: Mapping[str, Sequence[Point]]
    """What else is known of them, by what heads its panel."""


def _drawn(report: Report, longest: bool = False) -> Iterator[_Drawing]:
    """What there is to draw."""
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
        measured = _measured(report, (benchmark, name, alpha))
        yield _Drawing(
            f"training.{name}.{benchmark}.alpha-{alpha:g}", title, steps, cells, rows, measured
        )


def _measured(report: Report, where: tuple[str, str, float]) -> dict[str, list[Point]]:
    """KL and weight change of the checkpoints of a training, from their table."""
    tables = [table for table in report.extras if table.title == CHECKPOINTS]
    rows = [dict(zip(t.columns, row, strict=True)) for t in tables for row in t.rows]
    found: dict[str, list[Point]] = {}
    for row in rows:
        if (row["benchmark"], row["training"], row["alpha"]) != where:
            continue
        for title, value, low, high, scale in _MEASURED:
            middle, *ends = (row.get(name) for name in (value, low, high))
            if isinstance(middle, float):
                low_end, high_end = (
                    scale * (end if isinstance(end, float) else middle) for end in ends
                )
                point = Point(int(row["step"] or 0), scale * middle, (low_end, high_end))
                found.setdefault(title, []).append(point)
    return found


def _draw(one: _Drawing) -> Figure:
    steps = one.steps
    metrics = list(dict.fromkeys(cell.metric for cell in one.cells))
    columns = 3
    lines = 1 + -(-(len(metrics) + len(one.measured)) // columns)
    figure = Picture((8.4, 0.9 + 1.9 * lines), layout="constrained", dpi=160)
    grid = figure.add_gridspec(lines, columns)
    ends = min(steps.values()), max(steps.values())
    logarithmic = ends[0] > 0 and ends[1] >= _APART * ends[0]
    top = figure.add_subplot(grid[0, :])
    _accuracy(top, steps, one.accuracy)
    panels = [top]
    for place, subject in enumerate((*metrics, *one.measured)):
        axes = figure.add_subplot(grid[1 + place // columns, place % columns])
        if subject in one.measured:
            axes.set_title(subject, fontsize=9, loc="left")
            _curve(axes, one.measured[subject], "", "")
            axes.set_ylim(bottom=0)
        else:
            _metric(axes, steps, [cell for cell in one.cells if cell.metric == subject])
        panels.append(axes)
    for axes in panels:
        if logarithmic:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter("{x:g}")
        plain_axes(axes, "y")
        axes.set_xlabel("step", fontsize=8)
    handles, texts = panels[1].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    note = "each checkpoint against the base, with 95 % intervals over questions"
    figure.suptitle(f"{escape(one.title)}\n{note}", fontsize=10, x=0.01, ha="left")
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
