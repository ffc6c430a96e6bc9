"""Circuits: the edges of a graph that carry what a model does.

>>> circuit = Circuit.greedy(edges, 30)
>>> circuit.pruned().top_edges(2)
[ScoredEdge(source='m3', target='logits', score=0.61), ScoredEdge(...)]
"""

from collections import Counter
from dataclasses import dataclass, replace
from heapq import heappop, heappush

import torch

from probe.attribution import EdgeScores, ScoredEdge
from probe.errors import ProbeError
from probe.models import Graph, Node


@dataclass(frozen=True, eq=False)
class Circuit:
    """Some edges of a graph, with the scores that chose them."""

    graph: Graph
    """The graph."""

    scores: torch.Tensor
    """[source, target]: the score of each edge, a mean over questions."""

    edges: torch.Tensor
    """Which are in the circuit, bool [source, target]."""

    @classmethod
    def top(cls, scores: EdgeScores, count: int, signed: bool = False) -> "Circuit":
        """The edges of the largest mean scores.

        Args:
            scores: The scores of some sequences.
            count: How many edges; at most all.
            signed: Whether scores below 0, of edges that harm, come last; else it is the size that
                counts.

        Raises:
            ProbeError: A count below 0.
        """
        graph, means = scores.graph, mean_scores(scores)
        edges = torch.zeros_like(graph.mask)
        for source, target in ranking(graph, means, signed)[: _count(count)]:
            edges[source, target] = True
        return cls(graph, means, edges)

    @classmethod
    def greedy(cls, scores: EdgeScores, count: int, signed: bool = False) -> "Circuit":
        """Edges from the logits back: always the largest into what is in the circuit already.

        Hanna et al. 2024 (arXiv 2403.17806), section 4. The arguments are those of `top`.
        """
        graph, means = scores.graph, mean_scores(scores)
        edges = torch.zeros_like(graph.mask)
        into: dict[int, list[tuple[int, int]]] = {}  # of each target its edges, by their ranks
        for rank, (source, target) in enumerate(ranking(graph, means, signed)):
            into.setdefault(target, []).append((rank, source))
        behind, opened = _behind(graph), {len(graph.targets) - 1}
        waiting = [(rank, source, target) for target in opened for rank, source in into[target]]
        for _ in range(_count(count)):
            if not waiting:
                break
            _, source, target = heappop(waiting)
            edges[source, target] = True
            for other in {*behind[source]} - opened:
                opened.add(other)
                for rank, before in into.get(other, ()):
                    heappush(waiting, (rank, before, other))
        return cls(graph, means, edges)

    def pruned(self) -> "Circuit":
        """Without edges that nothing of the input comes to, or that lead to no logits.

        A bias needs nothing that comes to it: what it writes is always the same.
        """
        behind, edges = _behind(self.graph), self.edges.clone()
        free = [name == "input" or Node.parse(name).part == "bias" for name in self.graph.sources]
        while True:
            fed, read = edges.any(0), edges.any(1)
            led = torch.zeros_like(fed)  # targets behind which something leads on
            led[-1] = True
            alive = torch.zeros_like(read)
            for source, targets in enumerate(behind):
                alive[source] = free[source] or bool(fed[list(targets)].any())
                if read[source]:
                    led[list(targets)] = True
            smaller = edges & alive[:, None] & led[None, :]
            if torch.equal(smaller, edges):
                return replace(self, edges=edges)
            edges = smaller

    def top_edges(self, count: int) -> list[ScoredEdge]:
        """The strongest edges of the circuit, by the size of their scores."""
        order = ranking(self.graph, self.scores, signed=False)
        return [
            ScoredEdge(self.graph.sources[s], self.graph.targets[t], float(self.scores[s, t]))
            for s, t in order
            if self.edges[s, t]
        ][: _count(count)]

    @property
    def nodes(self) -> dict[str, float]:
        """What each source's edges in the circuit sum to, in size; sources without one left out."""
        sums = (self.scores.abs() * self.edges).sum(1)
        return {
            name: float(total)
            for name, total, any_edge in zip(
                self.graph.sources, sums, self.edges.any(1), strict=True
            )
            if any_edge
        }

    def __len__(self) -> int:
        """How many edges it has."""
        return int(self.edges.sum())


def mean_scores(scores: EdgeScores) -> torch.Tensor:
    """The mean score of each edge over sequences: [source, target].

    Raises:
        ProbeError: There is no sequence.
    """
    if not len(scores.scores):
        raise ProbeError("there are no sequences to take a circuit from")
    return scores.scores.double().mean(0)


def ranking(graph: Graph, means: torch.Tensor, signed: bool) -> list[tuple[int, int]]:
    """All edges, the largest first; equal ones in the graph's order."""
    every = graph.mask.nonzero()
    values = means[graph.mask]
    order = torch.argsort(values if signed else values.abs(), descending=True, stable=True)
    return [(source, target) for source, target in every[order].tolist()]


def random_circuits(graph: Graph, count: int, size: int, seed: int) -> torch.Tensor:
    """Circuits of edges drawn at random: bool [count, source, target]."""
    generator = torch.Generator().manual_seed(seed)
    every = graph.mask.nonzero()
    found = torch.zeros(count, *graph.mask.shape, dtype=torch.bool)
    for matrix in found:
        chosen = every[torch.randperm(len(every), generator=generator)[:size]]
        matrix[chosen[:, 0], chosen[:, 1]] = True
    return found


def _count(count: int) -> int:
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise ProbeError(f"a circuit of {count!r} edges is none; give a whole number from 0 on")
    return count


def _behind(graph: Graph) -> list[tuple[int, ...]]:
    """For each source the targets through which it comes to be: those of its own node.

    Of a head these are its query, and the key and value that it shares with its group; of an expert
    all that its mixture reads.
    """
    targets = [Node.parse(name) for name in graph.targets]
    sources = [Node.parse(name) for name in graph.sources]
    blocks: dict[str, list[int]] = {}
    for place, node in enumerate(targets):
        blocks.setdefault(node.block, []).append(place)
    # How many heads a block has, as a source (no branch) and as each of its branches.
    heads = Counter(
        (node.block, node.branch) for node in (*sources, *targets) if node.part.startswith("h")
    )

    def of_head(node: Node, place: int) -> bool:
        target = targets[place]
        share = heads[node.block, target.branch]
        own = int(node.part[1:]) * share // heads[node.block, ""]
        return not target.part or int(target.part[1:]) == own

    found = []
    for node in sources:
        places = [] if node.part == "bias" else blocks.get(node.block, [])
        apart = node.part.startswith("h")
        found.append(tuple(p for p in places if not apart or of_head(node, p)))
    return found
