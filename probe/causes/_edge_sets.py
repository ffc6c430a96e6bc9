"""Sets of edges, as a user may give them: by names, by numbers, or as matrices.

>>> as_sets(graph, [[("input", "a0.q"), ("m3", "logits")], []]).sum((1, 2))
tensor([2, 0])
"""

from collections.abc import Iterable, Sequence

import torch

from probe.choice import is_number
from probe.errors import ProbeError
from probe.models import Graph

Name = str | int
"""A node: its name, or its place in the graph."""

EdgeSet = Iterable[tuple[Name, Name]] | torch.Tensor
"""Edges as pairs (source, target), or as a matrix bool [source, target]."""

Sets = Sequence[EdgeSet] | torch.Tensor
"""Several sets; as one tensor they are bool [set, source, target]."""


def as_sets(graph: Graph, given: Sets) -> torch.Tensor:
    """Check sets of edges, and make matrices of them.

    Args:
        graph: The graph whose edges they are.
        given: A list of sets, or a tensor.

    Returns:
        bool [set, source, target]

    Raises:
        ProbeError: There is no set, or one holds what is no edge of the graph.
    """
    if isinstance(given, str | bytes) or not isinstance(given, Sequence | torch.Tensor):
        raise ProbeError(
            f"sets are {type(given).__name__}; give a list of sets, each of pairs (source, target)"
        )
    if not len(given):
        raise ProbeError("there is no set of edges; give at least one, which may be empty")
    return torch.stack([_matrix(graph, one, number) for number, one in enumerate(given)])


def _matrix(graph: Graph, given: EdgeSet, number: int) -> torch.Tensor:
    """One set as bool [source, target]."""
    if isinstance(given, torch.Tensor):
        if given.dtype != torch.bool or given.shape != graph.mask.shape:
            raise ProbeError(
                f"set {number} is a tensor of {given.dtype} {[*given.shape]}; give bool "
                f"{[*graph.mask.shape]}"
            )
        given = given.cpu()
        if (given & ~graph.mask).any():
            source, target = (given & ~graph.mask).nonzero()[0].tolist()
            name = f"{graph.sources[source]} -> {graph.targets[target]}"
            raise ProbeError(f"set {number}: {name} is no edge of this graph")
        return given
    found = torch.zeros_like(graph.mask)
    if isinstance(given, str | bytes) or not isinstance(given, Iterable):
        raise ProbeError(f"set {number} is {given!r}; give pairs (source, target)")
    for pair in given:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise ProbeError(f"set {number}: {pair!r} is no pair (source, target)")
        source = _place(pair[0], graph.sources, "source", number)
        target = _place(pair[1], graph.targets, "target", number)
        if not graph.mask[source, target]:
            name = f"{graph.sources[source]} -> {graph.targets[target]}"
            raise ProbeError(
                f"set {number}: {name} is no edge of this graph: nothing is read before it is "
                "written"
            )
        found[source, target] = True
    return found


def _place(node: object, names: Sequence[str], what: str, number: int) -> int:
    """A node's place, from its name or its place."""
    if isinstance(node, str):
        if node in names:
            return names.index(node)
        raise ProbeError(
            f"set {number}: the graph has no {what} {node!r}; it has {names[0]}, {names[1]}, ..., "
            f"{names[-1]}"
        )
    if not is_number(node) or not 0 <= int(node) < len(names):  # type: ignore[call-overload]
        raise ProbeError(
            f"set {number}: {what} {node!r} is none; give a name, or a place from 0 to "
            f"{len(names) - 1}"
        )
    return int(node)  # type: ignore[call-overload]
