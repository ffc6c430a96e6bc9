"""The circuit of Figure 2: the edges whose strength changed most, between the model's nodes.

Nodes stand above each other in the order of computation, input at the bottom. Edges that became
stronger are solid arcs on the right, edges that became weaker dashed arcs on the left, so colour
only repeats what sides and lines say. At an attention, an arc ends at the height of its query,
key or value. This stays legible from 4 layers to 32.

    >>> draw_circuit(strength).savefig("circuit.png")
"""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path as Curve

from probe.attribution import ScoredEdge
from probe.escaping import figure as escape
from probe.models import Node
from probe.report._picture import Picture
from probe.report._strength import EDGES, STRONGER, WEAKER, Strength
from probe.report._wording import number

_PORTS = {"q": -0.27, "k": -0.09, "v": 0.09, "": -0.2}
"""Where an arc ends at a node, from its middle, by the branch that reads."""

_OUTPUT = 0.27
"""Where an arc leaves a node."""

_BOX = 0.13, 0.76
"""Half the width of a node, and its height."""


class _Change(NamedTuple):
    """One edge to be drawn."""

    source: str
    """The node that it leaves."""

    target: str
    """The node where it ends."""

    branch: str
    """`q`, `k` or `v` of an attention that is drawn whole; else empty."""

    value: float
    """How strong it is; above 0 it is drawn on the right."""


def draw_circuit(strength: Strength, count: int = EDGES) -> Figure:
    """Draw the edges whose strength differs most between the two models.

    Where nearly all of them go one way, those are drawn whose share of all strength differs most.

    Args:
        strength: The strengths of all edges.
        count: How many edges, at most.
    """
    one_way = strength.one_way(count)
    strength = strength.shares if one_way else strength
    edges = strength.largest(count)
    changes = [
        _Change(e.source, node.block, node.branch, e.after - e.before)
        for e, node in ((edge, Node.parse(edge.target)) for edge in edges)
    ]
    words = ("smaller share", "larger share") if one_way else ("weaker", "stronger")
    title = _title(strength, len(changes), one_way)
    return _draw([*strength.graph.sources, "logits"], changes, title, words)


def draw_strongest(path: Path, model: str, method: str, edges: Sequence[ScoredEdge]) -> None:
    """Draw the strongest edges of one model into a PNG file, between the nodes that have any.

    Those that lower the loss of the answer are on the right, those that raise it on the left.

    Args:
        path: The file.
        model: The model's name.
        method: What scored them.
        edges: The edges, the strongest first.
    """
    title = f"{escape(model)}\nthe {len(edges)} strongest edges by {method}"
    changes = []
    for edge in edges:
        node = Node.parse(edge.target)
        # A key or value may be that of several heads, so it stands for itself.
        apart = node.part and node.branch in ("k", "v")
        name = edge.target if apart else ".".join(filter(None, (node.block, node.part)))
        changes.append(_Change(edge.source, name, "" if node.part else node.branch, edge.score))
    ends = {end for change in changes for end in (change.source, change.target)}
    nodes = sorted(ends, key=_height)
    if edges:
        first = edges[0]
        title += f"\nthickest: {first.source} to {first.target}, {number(first.score)} nats"
    figure = _draw(nodes, changes, title, ("raise the loss", "lower the loss"))
    FigureCanvasAgg(figure).print_figure(path, format="png")


def _height(name: str) -> tuple[bool, int, str]:
    """Where a node stands among others."""
    node = Node.parse(name)
    return node.kind == "logits", node.time, name


def _draw(
    nodes: Sequence[str], changes: Sequence[_Change], title: str, words: tuple[str, str]
) -> Figure:
    """Draw edges between nodes, the largest first in `changes`."""
    step = min(0.42, max(0.15, 4.2 / max(1, len(nodes))))  # inches per node
    tall = 1.4 + step * len(nodes)
    figure = Picture((6.2, tall), dpi=160)
    axes = figure.add_axes((0.02, 0.4 / tall, 0.96, 1 - 1.15 / tall))
    for height, node in enumerate(nodes):
        _node(axes, height, node, 72 * step)
    largest = max((abs(change.value) for change in changes), default=1)
    counts = {1: 0, -1: 0}
    for change in reversed(changes):
        side = 1 if change.value > 0 else -1
        counts[side] += 1
        start = nodes.index(change.source) + _OUTPUT
        end = nodes.index(change.target) + _PORTS[change.branch]
        _arc(axes, start, end, side, 0.5 + 3.5 * abs(change.value) / largest, len(nodes))
    axes.set_xlim(-1.05, 1.05)
    axes.set_ylim(-0.6, len(nodes) - 0.4)
    axes.set_axis_off()
    figure.text(0.03, 1 - 0.1 / tall, title, fontsize=10, va="top")
    less, more = words
    handles = [
        Line2D([], [], color=WEAKER, ls=(0, (4, 1.5)), lw=1.8, label=f"{less}: {counts[-1]}"),
        Line2D([], [], color=STRONGER, lw=1.8, label=f"{more}: {counts[1]}"),
    ]
    figure.legend(handles=handles, loc="lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def _node(axes: Axes, height: int, node: str, points: float) -> None:
    """A box with the node's name, and the letters of its branches where there is room."""
    half, tall = _BOX
    attention = Node.parse(node).kind == "attention" and not Node.parse(node).part
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
    path = Curve(
        [(side * _BOX[0], start), (out, start), (out, end), (side * _BOX[0], end)],
        [Curve.MOVETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4],
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
