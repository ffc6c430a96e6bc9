"""A matrix of edges as an image: sources from below, targets from left, blank where no edge is.

>>> draw_matrix(axes, graph, scores, "RdBu_r", limit=0.1)
"""

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.image import AxesImage
from matplotlib.ticker import FixedLocator

from probe.metrics import Array
from probe.models import Graph, Node

FEW = 30
"""As many targets can each have a label."""


def draw_matrix(
    axes: Axes, graph: Graph, values: Array, colours: str, limit: float, centre: float = 0
) -> AxesImage:
    """Draw one value of each edge.

    Args:
        axes: Where to.
        graph: Which row and column is which node.
        values: float [source, target]; NaN stays blank.
        colours: A colour map of matplotlib.
        limit: How far from the centre the colours end, to either side.
        centre: Which value has the middle colour.
    """
    rows, columns = values.shape
    image = axes.imshow(
        values,
        colours,
        vmin=centre - limit,
        vmax=centre + limit,
        origin="lower",
        interpolation="nearest",
    )
    _outline(axes, graph)
    _label(axes, graph)
    if columns <= FEW:
        axes.set_xticks(np.arange(columns) - 0.5, minor=True)
        axes.set_yticks(np.arange(rows) - 0.5, minor=True)
        axes.grid(which="minor", color="white", lw=0.8)
        axes.tick_params(which="minor", length=0)
    return image


def _outline(axes: Axes, graph: Graph) -> None:
    """A line around the edges, so that the lightest ones end somewhere."""
    mask = graph.mask.numpy()
    # Each target reads the first so many sources.
    heights = mask.sum(0) - 0.5
    axes.stairs(heights, np.arange(len(heights) + 1) - 0.5, baseline=-0.5, color="0.4", lw=0.6)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_xlim(-0.9, mask.shape[1] - 0.4)
    axes.set_ylim(-0.9, mask.shape[0] - 0.4)


def _label(axes: Axes, graph: Graph) -> None:
    """Every node where there is room, else the first node of some layers."""
    for axis, nodes, label in (
        (axes.xaxis, graph.targets, "target: the branch that reads"),
        (axes.yaxis, graph.sources, "source: the output that is read"),
    ):
        places = list(range(len(nodes)))
        if len(nodes) > FEW:
            step = math.ceil(graph.n_layers / 10)
            layers = [Node.parse(node).layer for node in nodes]
            places = [layers.index(layer) for layer in range(0, graph.n_layers, step)]
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
