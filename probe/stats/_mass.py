"""Mass: how a question's |scores| are spread over the real edges.

`gini` and `effective_edges` say how concentrated they are. Unlike information complexity they do
not depend on bins, and unlike kurtosis not on fourth powers. `kinds`, `layers` and `distances`
name groups of edges, and `shares` is how much of a question's sum of |score| each group holds.

    >>> effective_edges(np.array([[1.0, 1.0, 0.0]])).round(3)
    array([2.])
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from probe.metrics import Array
from probe.models import Graph, Node


def gini(values: Array) -> Array:
    """Gini coefficient of each question: 0 if all edges are equally strong, near 1 if one is all.

    Half the mean absolute difference of two edges, divided by their mean; NaN where all are 0.

    Args:
        values: Strengths [question, edge], not negative.
    """
    count = values.shape[1]
    weights = 2 * np.arange(1, count + 1) - count - 1
    with np.errstate(invalid="ignore"):
        return np.sort(values, axis=1) @ weights / (count * values.sum(1))


Groups = list[tuple[str, npt.NDArray[np.bool_]]]
"""Names of groups, and which real edges [edge] are in each."""


def kinds(graph: Graph) -> Groups:
    """Edges by what writes and what reads: input, attention, FFN, logits."""

    def kind(name: str) -> str:
        found = Node.parse(name).kind
        return "FFN" if found == "ffn" else found

    return _groups(graph, [kind(s) for s in graph.sources], [kind(t) for t in graph.targets])


def layers(graph: Graph) -> Groups:
    """Edges by the layer that writes and the layer that reads."""

    def layer(name: str) -> str:
        return name if Node.parse(name).layer < 0 else f"layer {graph.layer(name)}"

    return _groups(graph, [layer(s) for s in graph.sources], [layer(t) for t in graph.targets])


def distances(graph: Graph) -> Groups:
    """Edges by how many layers lie from writer to reader: 0 is within a layer.

    The input counts as layer -1, the logits as the layer behind the last.
    """
    written = np.array([graph.layer(name) for name in graph.sources])
    read = np.array([graph.layer(name) for name in graph.targets])
    steps = (read[None, :] - written[:, None])[graph.mask.numpy()]
    return [(f"{step}", steps == step) for step in range(steps.max() + 1)]


def shares(values: Array, groups: Groups) -> Array:
    """The share of each group in the sum of each question's strengths: [group, question].

    Args:
        values: Strengths [question, edge], not negative.
        groups: Groups of these edges.
    """
    with np.errstate(invalid="ignore"):
        part = values / values.sum(1, keepdims=True)
    return np.stack([part[:, chosen].sum(1) for _, chosen in groups])


def _groups(graph: Graph, sources: Sequence[str], targets: Sequence[str]) -> Groups:
    written, read = np.nonzero(graph.mask.numpy())
    found: Groups = []
    for word, names, indices in (("from", sources, written), ("into", targets, read)):
        of_edge = np.array(names)[indices]
        found += [(f"{word} {name}", of_edge == name) for name in dict.fromkeys(names)]
    return found
