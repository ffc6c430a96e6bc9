"""Overlap: do both models use the same edges, and is the difference more than noise?

Edges are ranked by their mean share of a question's |scores|. Three numbers, each 1 for the same
circuit:

- `edges`: Jaccard index of the two sets of the strongest tenth of all real edges;
- `nodes`: the same of the nodes at the ends of these edges (an attention is one node, except with
  granularity `head`, where each end is the head's own; with `expert` each expert is one);
- `ranks`: rank-biased overlap of the rankings, extrapolated, which weighs the top most (Webber,
  Moffat and Zobel 2010, "A similarity measure for indefinite rankings"; p = 0.9, so that the first
  ten ranks hold 86 % of the weight).

Each question counts the same: its scores are taken as shares of their sum, or the circuit would be
that of the few questions with the largest gradients. If the models did not differ, it would not
matter which of a question's two matrices is called "after". So the two are exchanged at random, for
whole clusters of questions, and the overlap of the two mixed sets says how alike circuits are by
chance, and how seldom (p) they are as unlike as those of the models.

    >>> rank_biased_overlap(np.array([3.0, 2.0, 1.0]), np.array([3.0, 2.0, 1.0]))
    1.0
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from probe.metrics import Array, Entries
from probe.models import Graph, Node
from probe.stats._statistics import SEED, Units

TOP = 0.1
PERSISTENCE = 0.9
DEPTH = 100
"""Ranks that are compared; those behind hold less than 1e-4 of the weight."""

EXCHANGES = 999
"""How many times the two sides of questions are exchanged."""

# Of so many exchanges the means are held at once, as many as keep an array of them small (32 MB).
_VALUES = 2**22
# Overlaps this much apart are the same.
_ROUNDING = 1e-12


class Overlap(NamedTuple):
    """How much two rankings of the same edges have in common."""

    edges: float
    """Jaccard index of the strongest tenth."""

    ranks: float
    """Rank-biased overlap."""

    nodes: float
    """Jaccard index of the nodes of the strongest tenth."""


class Comparison(NamedTuple):
    """The overlap of two models, and what chance makes of it."""

    models: Overlap
    """Of both models, over all questions."""

    chance: Overlap | None = None
    """Mean overlap of the two sets, over exchanges of questions' two sides at random."""

    p_values: Overlap | None = None
    """How often such sets overlap as little as the models do, which count among them."""


def compare_circuits(
    before: torch.Tensor,
    after: torch.Tensor,
    graph: Graph,
    units: Units | None = None,
    exchanges: int = EXCHANGES,
) -> Comparison:
    """Compare the circuits of two models.

    Args:
        before: Scores [question, source, target] of the model before.
        after: Those of the model after, of the same questions.
        graph: Which entry is which edge.
        units: The cluster of each question, as a number from 0 on; None leaves chance out.
        exchanges: How many times sides are exchanged.
    """
    ends = _ends(graph)
    old, new = (shares_of_edges(scores, graph) for scores in (before, after))
    models = overlap(old.mean(0), new.mean(0), ends)
    groups = 0 if units is None else len(np.unique(units))
    if units is None or groups < 2:
        return Comparison(models)
    whole = old.sum(0) + new.sum(0)
    random = np.random.default_rng([SEED, 2])
    found = [models]
    step = max(1, _VALUES // old.shape[1])
    for start in range(0, exchanges, step):
        count = min(step, exchanges - start)
        kept = (random.random((count, groups)) < 0.5)[:, units].astype(np.float64)
        for mixed in kept @ (old - new) + new.sum(0):
            found.append(overlap(mixed, whole - mixed, ends))
    values = np.array(found)
    as_unlike = (values <= values[0] + _ROUNDING).mean(0)
    return Comparison(models, Overlap(*values[1:].mean(0).tolist()), Overlap(*as_unlike.tolist()))


def shares_of_edges(scores: torch.Tensor, graph: Graph) -> Array:
    """The share of each real edge in the sum of a question's |scores|, [question, edge]."""
    values = Entries(scores, graph.mask).strengths
    totals = values.sum(1, keepdims=True)
    return values / np.where(totals > 0, totals, 1)


def overlap(left: Array, right: Array, ends: npt.NDArray[np.int64], top: float = TOP) -> Overlap:
    """Compare two strengths of the same edges.

    Args:
        left: Strengths [edge].
        right: Other strengths of the same edges.
        ends: The two nodes of each edge, as numbers, [edge, end].
        top: Which share of the edges counts as strong.
    """
    count, depth = max(1, round(top * len(left))), min(DEPTH, len(left))
    ranked = [_strongest(values, max(count, depth)) for values in (left, right)]
    strong = [indices[:count] for indices in ranked]
    nodes = [ends[indices].ravel() for indices in strong]
    first, second = (indices[:depth] for indices in ranked)
    ranks = _overlap_of_tops(first, second, len(left), PERSISTENCE)
    return Overlap(jaccard(*strong), ranks, jaccard(*nodes))


def jaccard(left: npt.NDArray[np.int64], right: npt.NDArray[np.int64]) -> float:
    """How many of what is in either set, numbers from 0 on, is in both."""
    held = np.zeros((2, 1 + max(left.max(), right.max())), dtype=bool)
    held[0, left] = held[1, right] = True
    return float(held.all(0).sum() / held.any(0).sum())


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
    return _overlap_of_tops(_strongest(left, depth), _strongest(right, depth), len(left), p)


def _overlap_of_tops(
    left: npt.NDArray[np.int64], right: npt.NDArray[np.int64], edges: int, p: float
) -> float:
    """Rank-biased overlap of the strongest of so many edges, the first of two rankings."""
    depth = len(left)
    ranks = np.full((2, edges), depth)
    ranks[0, left] = ranks[1, right] = np.arange(depth)
    # An edge is in both tops from the deeper of its two ranks on.
    agreed = np.cumsum(np.bincount(ranks.max(0), minlength=depth + 1)[:depth])
    shares = agreed / np.arange(1, depth + 1)
    weights = p ** np.arange(depth)
    return float((1 - p) * (weights @ shares) + shares[-1] * p**depth)


def _strongest(values: Array, count: int) -> npt.NDArray[np.int64]:
    """Places of the largest values, the largest first; of equals, the first."""
    if count < len(values):
        least = -np.partition(-values, count - 1)[count - 1]
        indices = np.flatnonzero(values >= least)
    else:
        indices = np.arange(len(values))
    return indices[np.argsort(-values[indices], kind="stable")][:count]


def _ends(graph: Graph) -> npt.NDArray[np.int64]:
    """The nodes of each real edge, as numbers: [edge, end]."""
    targets = graph.targets
    if graph.attention == "qkv":
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
