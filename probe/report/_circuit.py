"""The circuit of Figure 2: the edges whose strength changed most, between the model's nodes.

Nodes stand above each other in the order of computation, input at the bottom. Edges that became
stronger are solid arcs on the right, edges that became weaker dashed arcs on the left, so colour
only repeats what sides and lines say. At an attention, an arc ends at the height of its query,
key or value. This stays legible from 4 layers to 32.

    >>> draw_circuit(strength).savefig("circuit.png")
"""

from itertools import product

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path

from probe.models import Node
from probe.report._strength import Strength
from probe.report._wording import number

EDGES = 40
"""How many edges are drawn."""

STRONGER, WEAKER = "#D55E00", "#0072B2"
_PORTS = {"q": -0.27, "k": -0.09, "v": 0.09, "": -0.2}
"""Where an arc ends at a node, from its middle, by the branch that reads."""

_OUTPUT = 0.27
"""Where an arc leaves a node."""

_BOX = 0.13, 0.76
"""Half the width of a node, and its height."""


def draw_circuit(strength: Strength, count: int = EDGES) -> Figure:
    """Draw the edges whose strength differs most between the two models.

    Where nearly all of them go one way, those are drawn whose share of all strength differs most.

    Args:
        strength: The strengths of all edges.
        count: How many edges, at most.
    """
    one_way = strength.one_way(count)
    strength = strength.shares if one_way else strength
    changes = strength.largest(count)
    nodes = [*strength.graph.sources, "logits"]
    step = min(0.42, max(0.15, 4.2 / len(nodes)))  # inches per node
    tall = 1.4 + step * len(nodes)
    figure = Figure((6.2, tall), dpi=160)
    axes = figure.add_axes((0.02, 0.4 / tall, 0.96, 1 - 1.15 / tall))
    for height, node in enumerate(nodes):
        _node(axes, height, node, 72 * step)
    largest = max((abs(edge.after - edge.before) for edge in changes), default=1)
    counts = {1: 0, -1: 0}
    for edge in reversed(changes):
        side = 1 if edge.after > edge.before else -1
        counts[side] += 1
        target = Node.parse(edge.target)
        start = nodes.index(edge.source) + _OUTPUT
        end = nodes.index(target.block) + _PORTS[target.branch]
        width = 0.5 + 3.5 * abs(edge.after - edge.before) / largest
        _arc(axes, start, end, side, width, len(nodes))
    axes.set_xlim(-1.05, 1.05)
    axes.set_ylim(-0.6, len(nodes) - 0.4)
    axes.set_axis_off()
    figure.text(
        0.03, 1 - 0.1 / tall, _title(strength, len(changes), one_way), fontsize=10, va="top"
    )
    less, more = ("smaller share", "larger share") if one_way else ("weaker", "stronger")
    handles = [
        Line2D([], [], color=WEAKER, ls=(0, (4, 1.5)), lw=1.8, label=f"{less}: {counts[-1]}"),
        Line2D([], [], color=STRONGER, lw=1.8, label=f"{more}: {counts[1]}"),
    ]
    figure.legend(handles=handles, loc="lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def _node(axes: Axes, height: int, node: str, points: float) -> None:
    """A box with the node's name, and the letters of its branches where there is room."""
    half, tall = _BOX
    attention = Node.parse(node).kind == "attention"
    axes.add_patch(
        Rectangle(
            (-half, height - tall / 2),
            2 * half,
            tall,
            facecolor="white" if attention else "0.92",
            edgecolor="0.35",
            linewidth=0.6,
            zorder=4,
        )
    )
    size = min(9.5, 0.55 * points)
    axes.text(0, height - 0.02, node, fontsize=size, ha="center", va="center", zorder=5)
    if attention and points > 25:
        for letter, side in product("qkv", (-1, 1)):
            axes.text(
                side * (half - 0.018),
                height + _PORTS[letter] - 0.01,
                letter,
                fontsize=0.17 * points,
                color="0.35",
                ha="center",
                va="center",
                zorder=5,
            )


def _title(strength: Strength, count: int, one_way: bool) -> str:
    total = int(strength.graph.mask.sum())
    what = "share of all |W|" if one_way else "mean |W|"
    text = f"{strength.title}\nthe {count} of {total:,} edges whose {what} changed most"
    text += " (nearly all go one way)" * one_way
    for edge in strength.largest(1):
        ends = f"{number(edge.before)} → {number(edge.after)} nats"
        if one_way:
            ends = f"{edge.before:.2g} → {edge.after:.2g} %"
        text += f"\nthickest: {edge.source} to {edge.target}, {ends}"
    return text


def _arc(axes: Axes, start: float, end: float, side: int, width: float, nodes: int) -> None:
    """A curve from one height to another, the wider the longer, solid to the right."""
    out = side * (_BOX[0] + 0.08 + 1.05 * ((end - start) / nodes) ** 0.7)
    path = Path(
        [(side * _BOX[0], start), (out, start), (out, end), (side * _BOX[0], end)],
        [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4],
    )
    axes.add_patch(
        PathPatch(
            path,
            facecolor="none",
            edgecolor=STRONGER if side > 0 else WEAKER,
            linestyle="-" if side > 0 else (0, (4, 1.5)),
            linewidth=width,
            alpha=0.8,
            capstyle="butt",
            zorder=3,
        )
    )
