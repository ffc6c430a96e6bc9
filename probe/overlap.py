"""Overlap: do both models use the same edges, and is the difference more than noise?

Edges are ranked by their mean |score| over questions. Three numbers, each 1 for the same circuit:

- `edges`: Jaccard index of the two sets of the strongest tenth of all real edges;
- `nodes`: the same of the nodes at the ends of these edges (an attention is one node, except with
  granularity `head`, where each end is the head's own);
- `ranks`: rank-biased overlap of the rankings, extrapolated, which weighs the top most (Webber,
  Moffat and Zobel 2010, "A similarity measure for indefinite rankings"; p = 0.9, so that the first
  ten ranks hold 86 % of the weight).

Two halves of one model's questions do not give the same circuit either. So the overlap is also
taken between random halves: across models (one half before, the other after) and within a model.
Where the first is below most of the second, the circuits differ by more than noise.

    >>> rank_biased_overlap(np.array([3.0, 2.0, 1.0]), np.array([3.0, 2.0, 1.0]))
    1.0
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from probe.graph import Graph, Node
from probe.metrics import Array, strengths
from probe.statistics import halves

TOP = 0.1
PERSISTENCE = 0.9
DEPTH = 100
"""Ranks that are compared; those behind hold less than 1e-4 of the weight."""

# Of so many splits the means are held at once, as many as keep an array of them small (128 MB).
_VALUES = 2**24


class Overlap(NamedTuple):
    """How much two rankings of the same edges have in common."""

    edges: float
    """Jaccard index of the strongest tenth."""

    ranks: float
    """Rank-biased overlap."""

    nodes: float
    """Jaccard index of the nodes of the strongest tenth."""


class Comparison(NamedTuple):
    """The overlap of two models, and what noise makes of it."""

    models: Overlap
    """Of both models, over all questions."""

    across: Overlap | None
    """Mean over splits of the overlap of one half before with the other half after; None for fewer
    than two questions."""

    null: Overlap | None
    """5th percentile, over splits, of the overlap of two halves of one model; of the model for
    which it is smaller."""


def compare_circuits(before: torch.Tensor, after: torch.Tensor, graph: Graph) -> Comparison:
    """Compare the circuits of two models.

    Args:
        before: Scores [question, source, target] of the model before.
        after: Those of the model after, of the same questions.
        graph: Which entry is which edge.
    """
    ends = _ends(graph)
    sides = [strengths(scores, graph.mask) for scores in (before, after)]
    models = overlap(sides[0].mean(0), sides[1].mean(0), ends)
    if len(before) < 2:
        return Comparison(models, None, None)
    across: list[Overlap] = []
    within: tuple[list[Overlap], list[Overlap]] = ([], [])
    first, second = halves(len(before))
    step = max(1, _VALUES // sides[0].size)
    for start in range(0, len(first), step):
        parts = [half[start : start + step].astype(np.float64) for half in (first, second)]
        means = [[part @ side for part in parts] for side in sides]
        for split in range(len(parts[0])):
            old, new = ([half[split] for half in side] for side in means)
            across += [overlap(old[0], new[1], ends), overlap(old[1], new[0], ends)]
            for found, (one, other) in zip(within, (old, new), strict=True):
                found.append(overlap(one, other, ends))
    null = np.min([np.percentile(found, 5, axis=0) for found in within], axis=0)
    return Comparison(models, Overlap(*np.mean(across, axis=0).tolist()), Overlap(*null.tolist()))


def overlap(left: Array, right: Array, ends: npt.NDArray[np.int64], top: float = TOP) -> Overlap:
    """Compare two strengths of the same edges.

    Args:
        left: Strengths [edge].
        right: Other strengths of the same edges.
        ends: The two nodes of each edge, as numbers, [edge, end].
        top: Which share of the edges counts as strong.
    """
    count = max(1, round(top * len(left)))
    strong = [_strongest(values, count) for values in (left, right)]
    nodes = [ends[places].ravel() for places in strong]
    return Overlap(jaccard(*strong), rank_biased_overlap(left, right), jaccard(*nodes))


def jaccard(left: npt.NDArray[np.int64], right: npt.NDArray[np.int64]) -> float:
    """How many of what is in either set is in both."""
    return len(np.intersect1d(left, right)) / len(np.union1d(left, right))


def rank_biased_overlap(
    left: Array, right: Array, p: float = PERSISTENCE, depth: int = DEPTH
) -> float:
    """Rank-biased overlap of two rankings, by falling strength; extrapolated behind `depth`.

    Args:
        left: Strengths [edge].
        right: Other strengths of the same edges.
        p: How much each rank counts beside the one before it.
        depth: How many ranks are compared.
    """
    depth = min(depth, len(left))
    ranks = np.full((2, len(left)), depth)
    for row, values in zip(ranks, (left, right), strict=True):
        row[_strongest(values, depth)] = np.arange(depth)
    # An edge is in both tops from the deeper of its two ranks on.
    agreed = np.cumsum(np.bincount(ranks.max(0), minlength=depth + 1)[:depth])
    shares = agreed / np.arange(1, depth + 1)
    weights = p ** np.arange(depth)
    return float((1 - p) * (weights @ shares) + shares[-1] * p**depth)


def _strongest(values: Array, count: int) -> npt.NDArray[np.int64]:
    """Places of the largest values, the largest first; of equals, the first."""
    if count < len(values):
        least = -np.partition(-values, count - 1)[count - 1]
        places = np.flatnonzero(values >= least)
    else:
        places = np.arange(len(values))
    return places[np.argsort(-values[places], kind="stable")][:count]


def _ends(graph: Graph) -> npt.NDArray[np.int64]:
    """The nodes of each real edge, as numbers: [edge, end]."""
    targets = graph.targets
    if graph.granularity == "qkv":
        targets = tuple(Node.parse(target).block for target in targets)
    numbers = {
        name: number for number, name in enumerate(dict.fromkeys([*graph.sources, *targets]))
    }
    return np.array(
        [
            (numbers[graph.sources[source]], numbers[targets[target]])
            for source, target in graph.mask.nonzero().tolist()
        ]
    )
