"""The picture of circuits: how faithful they are, against their size, one line a method.

>>> draw_curves(Path("sft.png"), "sft", curves, questions=100)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from rich.table import Table

from probe.escaping import figure as escape

if TYPE_CHECKING:
    from probe.causes import Curve

# Colours that colour-blind readers tell apart (Okabe and Ito), and shapes that need no colour.
LOOKS = (("#0072B2", "o"), ("#E69F00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#56B4E9", "v"))


def draw_curves(path: Path, model: str, curves: Sequence[Curve], questions: int) -> None:
    """Draw the curves of one model into a PNG file.

    Args:
        path: The file.
        model: The model's name.
        curves: Its curves.
        questions: On how many questions they were measured.
    """
    figure = Figure(figsize=(7.2, 5.0), layout="constrained", dpi=120)
    axes = figure.subplots()
    for number, curve in enumerate(curves):
        colour, marker = LOOKS[number % len(LOOKS)]
        axes.plot(
            [point.edges for point in curve.points],
            [point.faithfulness for point in curve.points],
            color=colour,
            marker=marker,
            label=f"{curve.method}: CPR {curve.cpr:.2f}, CMD {curve.cmd:.2f}",
        )
    points = curves[0].points
    sizes = [point.edges for point in points]
    axes.plot(
        sizes,
        [point.random for point in points],
        color="0.4",
        linestyle="--",
        label=f"random: CPR {curves[0].random_cpr:.2f}, CMD {curves[0].random_cmd:.2f}",
    )
    axes.fill_between(
        sizes,
        [point.random_low for point in points],
        [point.random_high for point in points],
        color="0.85",
        zorder=0,
    )
    axes.axhline(1, color="0.6", linewidth=0.8)
    # Linear up to the smallest circuit, so that none of no edge has a place.
    first, last = next((size for size in sizes if size), 1), max(sizes[-1], 1)
    axes.set_xscale("symlog", linthresh=first)
    axes.set_xlim(-0.3 * first, 1.2 * last)
    axes.set_xticks(sizes, [str(size) for size in sizes], fontsize=8, rotation=45)
    axes.xaxis.set_minor_locator(NullLocator())
    # A circuit may do worse than no edge at all, by far: what is shown ends somewhere.
    low = min(point.faithfulness for curve in curves for point in curve.points)
    axes.set_ylim(max(-1.0, min(-0.1, low - 0.1)), 1.3)
    axes.set_xlabel("edges kept")
    axes.set_ylabel("faithfulness")
    axes.set_title(f"{escape(model)}, {questions} held-out questions", fontsize=10)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    FigureCanvasAgg(figure).print_figure(path, format="png")


def curves_table(curves: dict[str, tuple[Curve, ...]]) -> Table:
    """The areas of every model's curves, for a terminal."""
    table = Table(title="Circuits on held-out questions")
    for column in ("model", "method", "CPR", "CMD", "edges for 0.8", "needless"):
        table.add_column(column, justify="left" if column in ("model", "method") else "right")
    for model, of_model in curves.items():
        for curve in of_model:
            enough = [p for p in curve.points if p.edges and p.faithfulness >= 0.8]
            size = f"{enough[0].edges} of {curve.points[-1].edges}" if enough else "-"
            needless = "-" if curve.needless is None else f"{curve.needless:.0%}"
            table.add_row(
                model, curve.method, f"{curve.cpr:.3f}", f"{curve.cmd:.3f}", size, needless
            )
        areas = (f"{of_model[0].random_cpr:.3f}", f"{of_model[0].random_cmd:.3f}")
        table.add_row(model, "random", *areas, "-", "-")
    return table
