"""Figures: what a run found, as PNG for a screen and PDF for a paper.

    heatmap.CELL    how much each edge's strength changed, source against target (Fig. 2)
    circuit.CELL    the edges that changed most, between the nodes of the model (Fig. 2)
    diversity       inter-sample diversity in every experiment (Fig. 3a)
    output-entropy  output entropy per alpha, before and after (Fig. 3b), and with it
    token-entropy   its other definition, where it was recorded
    training.NAME   each checkpoint of a training: accuracy and every metric against the step

Colours are those that colour-blind readers tell apart (Okabe and Ito; cividis), and nothing hangs
on them: in grey, lightness, line styles, fillings and sides still tell all.

    >>> write_figures([report], Path("figures"))[0]
    PosixPath('figures/heatmap.sft-grpo.tiny-math.alpha-0.03.png')
"""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from rich.progress import Progress

from probe.errors import ProbeError
from probe.files import write_whole
from probe.report._circuit import draw_circuit
from probe.report._heatmap import draw_heatmap
from probe.report._picture import Picture, plain_axes
from probe.report._report import Report
from probe.report._strength import read_strengths
from probe.report._training import count_trainings, training_figures
from probe.report._trajectory import trainings
from probe.report._wording import (
    compared,
    diversity_cells,
    percent,
    published_average,
    published_diversity,
)
from probe.stats import Cell

BEFORE, AFTER = "#56B4E9", "#0072B2"
ENTROPIES = {
    "output_entropy": "Output entropy: entropy of the edges into the final node",
    "token_entropy": "Token entropy: entropy of the predicted tokens",
}
"""What heads the picture of each of the two definitions of output entropy."""

PAIRS = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"))
"""Colour and marker of each pair of a report, again from the start if there are more."""

ABREAST = 5
"""Panels of different pairs in a line."""


def write_figures(
    reports: Sequence[Report], output: Path, progress: Progress | None = None
) -> list[Path]:
    """Draw all figures of a report, or of the parts of a whole, as PNG and PDF files.

    Args:
        reports: What to draw.
        output: The folder for the files; it is made if it is not there.
        progress: Where to show how far it is.

    Returns:
        The files.

    Raises:
        ProbeError: The folder cannot be written to, there is nothing to draw yet, or several
            reports have the same cells.
    """
    if compared(reports):
        raise ProbeError("these runs have the same cells, and so the same figures; plot each alone")
    cells = {(c.pair, c.benchmark, c.alpha) for report in reports for c in report.cells}
    if not cells:
        raise ProbeError("there is nothing to draw yet: no cell of the run is complete")
    metrics = {cell.metric for report in reports for cell in report.cells}
    progress = progress or Progress(disable=True)
    total = 2 * len(cells) + 1 + len(metrics & {*ENTROPIES})
    task = progress.add_task("figures", total=total + sum(map(count_trainings, reports)))
    files = []

    def write(figure: Figure, name: str) -> None:
        files.extend(_write(figure, output / name))
        progress.update(task, advance=1)

    try:
        output.mkdir(parents=True, exist_ok=True)
        for strength in (strength for report in reports for strength in read_strengths(report)):
            write(draw_heatmap(strength), f"heatmap.{strength.name}")
            write(draw_circuit(strength), f"circuit.{strength.name}")
        write(draw_diversity(reports), "diversity")
        for name, figure in (one for report in reports for one in training_figures(report)):
            write(figure, name)
        for metric in ENTROPIES:
            if metric in metrics:
                write(draw_entropy(reports, metric), metric.replace("_", "-"))
    except OSError as error:
        raise ProbeError(
            f"cannot write figures to {output}: {error.strerror}; give another --output"
        ) from error
    return files


def _write(figure: Figure, path: Path) -> list[Path]:
    png, pdf = (path.with_name(path.name + suffix) for suffix in (".png", ".pdf"))
    screen, paper = FigureCanvasAgg(figure), FigureCanvasPdf(figure)
    write_whole(png, lambda place: screen.print_figure(place, format="png"))
    # Letters stay letters, and the same run makes the same file.
    with matplotlib.rc_context({"pdf.fonttype": 42}):
        dates = {"CreationDate": None}
        write_whole(pdf, lambda place: paper.print_figure(place, format="pdf", metadata=dates))
    return [png, pdf]


def draw_diversity(reports: Sequence[Report]) -> Figure:
    """Draw how inter-sample diversity changed in every experiment, and on average (Fig. 3a).

    The checkpoints of a training are together, and each is named beside its row.
    """
    cells = [cell for cell in diversity_cells(reports) if cell.change is not None]
    along = {
        one.pair.name: name
        for report in reports
        for (name, *_), steps in trainings(report.recipe).items()
        for _, one in steps
    }
    pairs = list(dict.fromkeys(along.get(cell.pair, cell.pair) for cell in cells))
    places = [pairs.index(along.get(cell.pair, cell.pair)) for cell in cells]
    order = sorted(range(len(cells)), key=lambda index: places[index])
    cells, places = [cells[index] for index in order], [places[index] for index in order]
    # A gap between the pairs.
    heights = [row + 0.6 * place for row, place in enumerate(places)]
    figure = Picture((7.2, 1.9 + 0.23 * max(heights, default=0)), layout="constrained", dpi=160)
    axes = figure.subplots()
    for height, place, cell in zip(heights, places, cells, strict=True):
        colour, marker = PAIRS[place % len(PAIRS)]
        change = 100 * (cell.change or 0)
        if cell.interval:
            ends = [100 * end for end in cell.interval]
            axes.plot(ends, [height, height], color=colour, lw=1.4, zorder=2)
        axes.plot(
            change,
            height,
            marker,
            color=colour,
            markerfacecolor=colour if change > 0 else "white",
            markersize=6,
            zorder=3,
        )
    changes = [cell.change or 0 for cell in cells]
    average = float(np.mean(changes)) if changes else 0.0
    rate = sum(change > 0 for change in changes) / max(1, len(changes))
    axes.axvline(0, color="0.2", lw=0.8, zorder=1)
    axes.axvline(100 * average, color="0.2", lw=1.2, ls="--", zorder=1)
    handles = [
        Line2D([], [], color=colour, marker=marker, lw=1.4, label=pair)
        for pair, (colour, marker) in zip(pairs, PAIRS * len(pairs), strict=False)
    ]
    handles.append(
        Line2D([], [], color="0.2", ls="--", lw=1.2, label=f"average {percent(average)} %")
    )
    text = f"{len(cells)} experiments, average improvement {percent(average)} %, "
    text += f"improvement rate {100 * rate:.1f} %"
    published = published_diversity(reports)
    if published:
        axes.axvline(100 * published.change, color="0.5", lw=1.2, ls=":", zorder=1)
        label = f"published average {percent(published.change)} %"
        handles.append(Line2D([], [], color="0.5", ls=":", lw=1.2, label=label))
        text += f"\npublished: {published_average(reports)}"
    axes.set_title(f"Inter-sample diversity\n{text}", fontsize=10, loc="left")
    names = [f"{cell.pair}, " if cell.pair in along else "" for cell in cells]
    labels = [f"{n}{c.benchmark}, alpha {c.alpha:g}" for n, c in zip(names, cells, strict=True)]
    axes.set_yticks(heights, labels, fontsize=8)
    axes.set_ylim(max(heights, default=0) + 0.6, -0.6)
    axes.set_xlabel("change (%), with its 95 % interval; filled: improved", fontsize=9)
    plain_axes(axes, "x")
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def draw_entropy(reports: Sequence[Report], metric: str = "output_entropy") -> Figure:
    """Draw an output entropy per alpha, before and after, a panel per pair and benchmark (Fig. 3b).

    Each benchmark begins a line of panels, and many pairs, as of a training, have several.

    Args:
        reports: What to draw.
        metric: `output_entropy` or `token_entropy`.
    """
    panels: dict[tuple[str, str], list[Cell]] = {}
    found = (cell for report in reports for cell in report.cells if not cell.control)
    for cell in (cell for cell in found if cell.metric == metric):
        panels.setdefault((cell.benchmark, cell.pair), []).append(cell)
    theirs = {
        (value.pair, value.alpha): value.change
        for report in reports
        for value in report.recipe.published_changes
        if value.metric == metric
    }
    benchmarks, pairs = (list(dict.fromkeys(names)) for names in zip(*panels, strict=True))
    tops: dict[str, list[float]] = {benchmark: [] for benchmark in benchmarks}
    for (benchmark, _), cells in panels.items():
        values = (value for cell in cells for value in (cell.paper.before, cell.paper.after))
        tops[benchmark] += [value for value in values if value is not None and np.isfinite(value)]
    columns = min(len(pairs), ABREAST)
    lines = -(-len(pairs) // columns)
    rows = lines * len(benchmarks)
    figure = Picture((0.8 + 2.5 * columns, 1.1 + 2.2 * rows), layout="constrained", dpi=160)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.ravel():
        axes.set_axis_off()
    for (benchmark, pair), cells in panels.items():
        line, column = divmod(pairs.index(pair), columns)
        axes = grid[lines * benchmarks.index(benchmark) + line, column]
        axes.set_axis_on()
        places = np.arange(len(cells))
        before = [np.nan if cell.paper.before is None else cell.paper.before for cell in cells]
        after = [np.nan if cell.paper.after is None else cell.paper.after for cell in cells]
        axes.plot(places, before, "o--", color=BEFORE, markerfacecolor="white", label="before")
        axes.plot(places, after, "s-", color=AFTER, label="after")
        for place, cell in enumerate(cells):
            top = max(cell.paper.before or 0, cell.paper.after or 0)
            axes.annotate(
                percent(cell.paper.change),
                (place, top),
                (0, 6),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                # Lines to the next alpha pass here.
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
                zorder=5,
            )
        labels = [f"{cell.alpha:g}" for cell in cells]
        for place, cell in enumerate(cells):
            if (pair, cell.alpha) in theirs:
                labels[place] += f"\n({100 * theirs[pair, cell.alpha]:+z.0f})"
        axes.set_xticks(places, labels)
        axes.set_xlim(-0.5, len(cells) - 0.5)
        axes.set_title(f"{pair} on {benchmark}", fontsize=9)
        axes.set_xlabel("alpha", fontsize=9)
        # Side by side means to be compared; and there is room for the numbers above.
        axes.set_ylim(0, 1.2 * max([*tops[benchmark], 1e-9]))
        plain_axes(axes, "y")
        if column == 0:
            axes.set_ylabel("nats", fontsize=9)
    handles, texts = axes.get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    title = f"{ENTROPIES[metric]}\nthe paper's number and its change (%)"
    title += "; in brackets: published" if theirs else ""
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    return figure
