"""The heat map of Figure 2: how much each edge's strength changed, source against target.

Colour is the logarithm of after / before, so that half and double are equally far from the middle,
which is the median edge's: where everything falls, what fell more than the rest is still told from
what fell less. Labels are in percent. Cividis runs from dark to light, so less and more differ
without colour too.

    >>> draw_heatmap(strength).savefig("heatmap.png")
"""

import numpy as np
from matplotlib.figure import Figure

from probe.attribution import draw_matrix
from probe.report._strength import Strength

COLOURS = "cividis"
LIMITS = (0.1, 0.25, 0.5, 1, 2, 3, 4, 5, 6, 8, 10)
"""Where colours may end, in doublings."""


def draw_heatmap(strength: Strength) -> Figure:
    """Draw the relative change of every edge's strength; what is no edge stays blank."""
    rows, columns = strength.before.shape
    size = min(0.3, 9 / columns)  # inches per entry
    figure = Figure((1.9 + size * columns, 1.5 + size * rows), layout="constrained", dpi=160)
    axes = figure.subplots()
    ratio = np.log2(1 + strength.change)
    centre = colour_centre(ratio)
    limit = colour_limit(ratio - centre)
    image = draw_matrix(axes, strength.graph, ratio, COLOURS, limit, centre)
    middle = f"middle colour: the median edge's {100 * (2**centre - 1):+.3g} %"
    text = f"{strength.title}\nchange of each edge's mean |W|; blank: no edge\n{middle}"
    axes.set_title(text, fontsize=10, loc="left")
    bar = figure.colorbar(image, ax=axes, extend="both", shrink=0.9, aspect=25, pad=0.02)
    ticks = [centre + limit * part for part in (-1, -0.5, 0, 0.5, 1)]
    texts = [f"{100 * (2**tick - 1):+.3g} %" if tick else "0" for tick in ticks]
    bar.set_ticks(ticks, labels=texts)
    bar.ax.tick_params(labelsize=8, color="0.4")
    bar.outline.set_visible(False)
    return figure


def colour_centre(ratio: np.ndarray) -> float:
    """What the middle colour stands for: the median edge's change in doublings; 0 without edges."""
    known = ratio[np.isfinite(ratio)]
    return float(np.median(known)) if len(known) else 0.0


def colour_limit(ratio: np.ndarray) -> float:
    """How far the colours go: a round number of doublings that holds 19 of 20 edges."""
    known = np.abs(ratio[np.isfinite(ratio)])
    needed = float(np.quantile(known, 0.95)) if len(known) else 1.0
    return next((limit for limit in LIMITS if limit >= needed), LIMITS[-1])
