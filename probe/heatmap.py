"""The heat map of Figure 2: how much each edge's strength changed, source against target.

Colour is the logarithm of after / before, so that half and double are equally far from 0; labels
are in percent. Cividis runs from dark to light, so weaker and stronger differ without colour too.

    >>> draw_heatmap(strength).savefig("heatmap.png")
"""

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

from probe.graph import Node
from probe.strength import Strength

COLOURS = "cividis"
FEW = 30
"""As many targets can each have a label."""

LIMITS = (0.1, 0.25, 0.5, 1, 2, 3, 4, 5, 6, 8, 10)
"""Where colours may end, in doublings."""


def draw_heatmap(strength: Strength) -> Figure:
    """Draw the relative change of every edge's strength; what is no edge stays blank."""
    rows, columns = strength.before.shape
    size = min(0.3, 9 / columns)  # inches per entry
    figure = Figure((1.9 + size * columns, 1.5 + size * rows), layout="constrained", dpi=160)
    axes = figure.subplots()
    ratio = np.log2(1 + strength.change)
    limit = colour_limit(ratio)
    image = axes.imshow(
        ratio, COLOURS, vmin=-limit, vmax=limit, origin="lower", interpolation="nearest"
    )
    _outline(axes, strength)
    _label(axes, strength)
    axes.set_title(
        f"{strength.title}\nchange of each edge's mean |W|; blank: no edge", fontsize=10, loc="left"
    )
    if columns <= FEW:
        axes.set_xticks(np.arange(columns) - 0.5, minor=True)
        axes.set_yticks(np.arange(rows) - 0.5, minor=True)
        axes.grid(which="minor", color="white", lw=0.8)
        axes.tick_params(which="minor", length=0)
    bar = figure.colorbar(image, ax=axes, extend="both", shrink=0.9, aspect=25, pad=0.02)
    ticks = [limit * part for part in (-1, -0.5, 0, 0.5, 1)]
    texts = [f"{100 * (2**tick - 1):+.3g} %" if tick else "0" for tick in ticks]
    bar.set_ticks(ticks, labels=texts)
    bar.ax.tick_params(labelsize=8, color="0.4")
    bar.outline.set_visible(False)
    return figure


def colour_limit(ratio: np.ndarray) -> float:
    """Where the colours end: a round number of doublings that holds 19 of 20 edges."""
    known = np.abs(ratio[np.isfinite(ratio)])
    needed = float(np.quantile(known, 0.95)) if len(known) else 1.0
    return next((limit for limit in LIMITS if limit >= needed), LIMITS[-1])


def _outline(axes: Axes, strength: Strength) -> None:
    """A line around the edges, so that the lightest ones end somewhere."""
    mask = strength.graph.mask.numpy()
    # Each target reads the first so many sources.
    heights = mask.sum(0) - 0.5
    axes.stairs(heights, np.arange(len(heights) + 1) - 0.5, baseline=-0.5, color="0.4", lw=0.6)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_xlim(-0.9, mask.shape[1] - 0.4)
    axes.set_ylim(-0.9, mask.shape[0] - 0.4)


def _label(axes: Axes, strength: Strength) -> None:
    """Every node where there is room, else the first node of some layers."""
    graph = strength.graph
    for axis, nodes, label in (
        (axes.xaxis, graph.targets, "target: the branch that reads"),
        (axes.yaxis, graph.sources, "source: the output that is read"),
    ):
        places = list(range(len(nodes)))
        if len(nodes) > FEW:
            step = math.ceil(graph.n_layers / 10)
            blocks = [Node.parse(node).block for node in nodes]
            places = [blocks.index(f"a{layer}") for layer in range(0, graph.n_layers, step)]
            places += [len(nodes) - 1] if nodes[-1] == "logits" else []
        axis.set_major_locator(FixedLocator(places))
        axis.set_ticklabels(
            [
                Node.parse(nodes[place]).block if len(nodes) > FEW else nodes[place]
                for place in places
            ]
        )
        axis.set_label_text(label, fontsize=9)
        axis.set_tick_params(labelsize=8, length=2 if len(nodes) > FEW else 0, color="0.4")
    if len(graph.targets) <= FEW:
        axes.tick_params("x", rotation=90)
