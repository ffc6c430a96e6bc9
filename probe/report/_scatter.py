"""The picture of faithfulness: each edge's score against its exact effect, one panel a method.

Effects span many orders and have both signs, so both axes are logarithmic but for a linear part
around 0. A score on the diagonal is right.

    >>> draw_scatter(Path("sft.png"), rows, compare_all("sft", rows), sequences=8)
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from probe.escaping import figure as escape
from probe.stats import Agreement, MeasuredEdge, Stratum

# Colours that colour-blind readers tell apart (Okabe and Ito), and shapes that need no colour.
STRATA: dict[Stratum, tuple[str, str, str]] = {
    "random": ("^", "#009E73", "random from the rest"),
    "middle": ("s", "#E69F00", "random from the middle third"),
    "top": ("o", "#0072B2", "strongest"),
}


def draw_scatter(
    path: Path, rows: Sequence[MeasuredEdge], agreements: Sequence[Agreement], sequences: int
) -> None:
    """Draw a finished sample into a PNG file.

    Args:
        path: The file.
        rows: The edges, with exact effects.
        agreements: How near each method comes; one panel each.
        sequences: How many sequences the edges are from.
    """
    figure = Figure(figsize=(1 + 3.7 * len(agreements), 5.2), layout="constrained", dpi=120)
    panels = figure.subplots(1, len(agreements), sharex=True, sharey=True, squeeze=False)[0]
    shown = np.abs([[row.exact or 0, *row.scores.values()] for row in rows]).ravel()
    shown = shown[shown > 0] if (shown > 0).any() else np.ones(1)
    limit = 2 * float(shown.max())
    largest = math.floor(math.log10(limit))
    smallest = max(math.floor(math.log10(np.quantile(shown, 0.1))), largest - 6)
    # Every other power of ten has a label, and the smallest none: 0 is beside it.
    powers = [10.0**power for power in range(largest, smallest, -2)]
    ticks = [*(-power for power in powers), 0, *reversed(powers)]
    for axes, agreement in zip(panels, agreements, strict=True):
        _panel(axes, rows, agreement)
        for axis, scale in ((axes.xaxis, axes.set_xscale), (axes.yaxis, axes.set_yscale)):
            scale("symlog", linthresh=10.0**smallest, linscale=0.5)
            axis.set_major_locator(FixedLocator(ticks))
            axis.set_minor_locator(NullLocator())
        axes.set_xlim(-limit, limit)
        axes.set_ylim(-limit, limit)
        axes.plot(
            [-limit, limit], [-limit, limit], color="0.4", linewidth=1, label="score = effect"
        )
    panels[0].set_ylabel("score (nats)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(
        f"{escape(agreements[0].model)}: {len(rows)} edges of {sequences} sequences, "
        f"ranked by |{agreements[0].method}|"
    )
    FigureCanvasAgg(figure).print_figure(path, format="png")


def _panel(axes: Axes, rows: Sequence[MeasuredEdge], agreement: Agreement) -> None:
    for stratum, (marker, colour, label) in STRATA.items():
        chosen = [row for row in rows if row.stratum == stratum]
        axes.scatter(
            [row.exact or 0 for row in chosen],
            [row.scores[agreement.method] for row in chosen],
            label=label,
            marker=marker,
            s=18,
            facecolors="none",
            edgecolors=colour,
            linewidths=0.9,
            zorder=3,
        )
    axes.set_box_aspect(1)
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("exact effect (nats)")
    numbers = [
        "-" if estimate.value is None else f"{estimate.value:.2f}"
        for estimate in (agreement.pearson, agreement.spearman)
    ]
    axes.set_title(f"{agreement.method}\nPearson {numbers[0]}, Spearman {numbers[1]}", fontsize=10)
