"""The heat map of Figure 2: how much each edge's strength changed, source against target.

Colour is the logarithm of after / before, so that half and double are equally far from the middle,
which is the median edge's: where everything falls, what fell more than the rest is still told from
what fell less. Labels are in percent. Below are ranks, which a change of all does not
move. Cividis runs from dark to light, so less and more differ without colour too.

    >>> draw_heatmap(strength).savefig("heatmap.png")
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from probe.attribution import draw_matrix
from probe.metrics import Array
from probe.models import Graph
from probe.report._picture import Picture
from probe.report._strength import Strength

COLOURS = "cividis"
LIMITS = (0.1, 0.25, 0.5, 1, 2, 3, 4, 5, 6, 8, 10)
"""Where colours may end, in doublings."""


def draw_heatmap(strength: Strength) -> Figure:
    """Draw the relative change of every edge's strength, and below by how many ranks it rose.

    What is no edge stays blank.
    """
    rows, columns = strength.before.shape
    size = min(0.3, 9 / columns)  # inches per entry
    shape = (1.9 + size * columns, 2 * (1.5 + size * rows))
    figure = Picture(shape, layout="constrained", dpi=160)
    above, below = figure.subplots(2)
    ratio = np.log2(1 + strength.change)
    centre = colour_centre(ratio)
    limit = colour_limit(ratio - centre)
    middle = f"middle colour: the median edge's {100 * (2**centre - 1):+.3g} %"
    _draw(
        above,
        strength.graph,
        ratio,
        _Scale(limit, centre, lambda tick: f"{100 * (2**tick - 1):+.3g} %" if tick else "0"),
        f"{strength.title}\nchange of each edge's mean |W|; blank: no edge\n{middle}",
    )
    ranks = strength.rank_change
    known = np.abs(ranks[np.isfinite(ranks)])
    most = max(1.0, float(np.quantile(known, 0.95))) if len(known) else 1.0
    title = f"ranks by strength that each of {len(known)} edges rose"
    _draw(below, strength.graph, ranks, _Scale(most, 0.0, lambda tick: f"{tick:+.0f}"), title)
    return figure


class _Scale(NamedTuple):
    """What colours stand for."""

    limit: float
    """How far they go to either side."""

    centre: float
    """The middle one."""

    text: Callable[[float], str]
    """What stands beside a value."""


def _draw(axes: Axes, graph: Graph, values: Array, scale: _Scale, title: str) -> None:
    """One matrix with its colours."""
    image = draw_matrix(axes, graph, values, COLOURS, scale.limit, scale.centre)
    axes.set_title(title, fontsize=10, loc="left")
    figure = axes.get_figure()
    assert figure is not None
    bar = figure.colorbar(image, ax=axes, extend="both", shrink=0.9, aspect=25, pad=0.02)
    ticks = [scale.centre + scale.limit * part for part in (-1, -0.5, 0, 0.5, 1)]
    bar.set_ticks(ticks, labels=[scale.text(tick) for tick in ticks])
    bar.ax.tick_params(labelsize=8, color="0.4")
    bar.outline.set_visible(False)


def colour_centre(ratio: np.ndarray) -> float:
    """What the middle colour stands for: the median edge's change in doublings; 0 without edges."""
    known = ratio[np.isfinite(ratio)]
    return float(np.median(known)) if len(known) else 0.0


def colour_limit(ratio: np.ndarray) -> float:
    """How far the colours go: a round number of doublings that holds 19 of 20 edges."""
    known = np.abs(ratio[np.isfinite(ratio)])
    needed = float(np.quantile(known, 0.95)) if len(known) else 1.0
    return next((limit for limit in LIMITS if limit >= needed), LIMITS[-1])
