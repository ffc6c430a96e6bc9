"""Strength: how strong each edge is before and after, averaged over questions (paper, Fig. 2).

What figures draw and the web page shows. Edges of single heads are too many to look at, so there
the scores of an attention's heads are added up first, which is the score of the whole attention.

    >>> for strength in read_strengths(report):
    ...     strength.before, strength.after, strength.change  # each [source, target]
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from probe.attribution import EdgeScores
from probe.metrics import Array
from probe.models import Graph, Node
from probe.report._report import Report
from probe.store import RunFolder

EDGES = 40
"""How many edges are drawn."""

STRONGER, WEAKER = "#D55E00", "#0072B2"
"""In which colours."""


class ChangedEdge(NamedTuple):
    """One edge whose strength changed."""

    source: str
    """The node that writes."""

    target: str
    """The node that reads."""

    before: float
    """Its strength before, in nats."""

    after: float
    """Its strength after."""


@dataclass(frozen=True)
class Strength:
    """The strength of every edge of two models, on one benchmark at one alpha."""

    pair: str
    """The pair's name."""

    benchmark: str
    """The benchmark's name."""

    alpha: float
    """Scored length as a share of the reference length."""

    graph: Graph
    """Which row and column is which node."""

    before: Array
    """Mean of |W| over questions, float64 [source, target], in nats; 0 where no edge is."""

    after: Array
    """The same of the model after."""

    def __repr__(self) -> str:
        """What it is of, in a line."""
        return f"Strength({self.name}, {int(self.graph.mask.sum())} edges)"

    @property
    def name(self) -> str:
        """The part of a file name that says which cell it is of."""
        return f"{self.pair}.{self.benchmark}.alpha-{self.alpha:g}"

    @property
    def title(self) -> str:
        """What heads a picture of it."""
        return f"{self.pair} on {self.benchmark}, alpha {self.alpha:g}"

    @property
    def change(self) -> Array:
        """(after - before) / before, [source, target]; NaN where no edge is, or 0 before."""
        with np.errstate(divide="ignore", invalid="ignore"):
            change = (self.after - self.before) / self.before
        return np.where(np.isfinite(change) & self.graph.mask.numpy(), change, np.nan)

    def largest(self, count: int) -> list[ChangedEdge]:
        """The edges whose strength differs most between the models, the largest first.

        Differences, not relative changes, decide: an edge of no strength may double by chance.
        """
        difference = np.abs(self.after - self.before)
        order = np.argsort(-difference, axis=None, kind="stable")[:count]
        found = []
        for index in order:
            row, column = np.unravel_index(index, difference.shape)
            if difference[row, column]:
                nodes = self.graph.sources[row], self.graph.targets[column]
                ends = float(self.before[row, column]), float(self.after[row, column])
                found.append(ChangedEdge(*nodes, *ends))
        return found

    @property
    def shares(self) -> "Strength":
        """What each edge has of the sum of all, in percent."""
        before, after = (100 * side / (side.sum() or 1) for side in (self.before, self.after))
        return replace(self, before=before, after=after)

    def one_way(self, count: int) -> bool:
        """Whether nearly all edges that changed most became weaker, or nearly all stronger.

        Then their shares tell them apart, and where they do not, this is what they have in common.
        """
        changes = self.largest(count)
        rises = sum(edge.after > edge.before for edge in changes)
        return 10 * min(rises, len(changes) - rises) < len(changes)

    @property
    def rank_change(self) -> Array:
        """How many ranks by strength each edge rose, [source, target]; NaN where no edge is."""
        mask = self.graph.mask.numpy()
        ranks = []
        for side in (self.before, self.after):
            order = np.argsort(-side[mask], kind="stable")
            ranks.append(np.empty(len(order)))
            ranks[-1][order] = np.arange(len(order))
        change = np.full(mask.shape, np.nan)
        change[mask] = ranks[0] - ranks[1]
        return change


def read_strengths(report: Report) -> Iterator[Strength]:
    """The strengths of each cell of a report, read from its run folder one after the other."""
    folder = RunFolder(report.path)
    here = {(cell.pair, cell.benchmark, cell.alpha) for cell in report.cells}
    for comparison in report.recipe.comparisons():
        if comparison.key in here:
            sides = folder.read_sides(comparison.name, "before", "after")
            (before, graph), (after, _) = map(_whole_blocks, sides)
            yield Strength(*comparison.key, graph, before, after)


def _whole_blocks(edges: EdgeScores) -> tuple[Array, Graph]:
    """Mean |W| over questions [source, target], heads and experts added up, and its graph."""
    graph = edges.graph
    rows = columns = None
    if graph.granularity in ("head", "expert"):
        coarse = replace(
            graph,
            granularity="block" if graph.attention == "block" else "qkv",
            sources=tuple(dict.fromkeys(Node.parse(name).whole for name in graph.sources)),
            targets=tuple(dict.fromkeys(Node.parse(name).whole for name in graph.targets)),
        )
        rows = _wholes(graph.sources, coarse.sources)
        columns = _wholes(graph.targets, coarse.targets)
        graph = coarse
    total = torch.zeros(graph.mask.shape, dtype=torch.float64)
    for scores in edges.scores:  # one by one: those of heads and experts are large
        scores = scores.double()
        if rows is not None and columns is not None:
            scores = add_up(scores, rows, columns, total.shape)
        total += scores.abs()
    return (total / len(edges.scores)).numpy(), graph


def add_up(
    scores: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, shape: torch.Size
) -> torch.Tensor:
    """Scores of parts [source, target], added up to those of wholes.

    Args:
        scores: Of the parts.
        rows: Of which whole each source is a part.
        columns: Of which each target is.
        shape: How many wholes there are.
    """
    parts = scores.new_zeros(shape[0], scores.shape[1]).index_add_(0, rows, scores)
    return scores.new_zeros(shape).index_add_(1, columns, parts)


def _wholes(nodes: Sequence[str], wholes: Sequence[str]) -> torch.Tensor:
    """Of which whole each node is a part: an attention, a branch of it, or an FFN."""
    return torch.tensor([wholes.index(Node.parse(name).whole) for name in nodes])
