"""Edge scores: what attribution finds, question by question, with the names of its nodes.

>>> edges = probe.attribute(model, sequences)
>>> edges
EdgeScores(2 sequences, 77 edges of qkv, mean loss 0.04 nats)
>>> edges[1] - edges[1] == 0 * edges[1]
True
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import NamedTuple

import torch

from probe.errors import ProbeError
from probe.graph import Graph


class Edge(NamedTuple):
    """One edge of one sequence."""

    sequence: int
    """The sequence's place in the list."""

    source: int
    """The source's place in `Graph.sources`."""

    target: int
    """The target's place in `Graph.targets`."""


def checked_edges(edges: Sequence[Edge], graph: Graph, sequences: int) -> list[Edge]:
    """Edges of so many sequences and a graph, each one checked.

    Raises:
        ProbeError: One has a negative or too large number, is of something else, or no edge is
            there.
    """
    mask = graph.mask
    found = []
    for given in edges:
        whole = isinstance(given, tuple) and len(given) == 3 and all(map(_is_number, given))
        edge = Edge(*map(int, given)) if whole else None
        if (
            edge is None
            or not 0 <= edge.sequence < sequences
            or not 0 <= edge.source < mask.shape[0]
            or not 0 <= edge.target < mask.shape[1]
            or not mask[edge.source, edge.target]
        ):
            raise ProbeError(f"{given!r} is no edge of these {sequences} sequences and this graph")
        found.append(edge)
    return found


def _is_number(value: object) -> bool:
    """Whether it can count things: `True` cannot."""
    return isinstance(value, Integral) and not isinstance(value, bool)


Choice = int | str | slice | Sequence[int] | Sequence[str] | Sequence[bool] | torch.Tensor
"""Which sequences: a place, an id, a slice, or a list of places, of ids, or of a bool for each."""


@dataclass(frozen=True, eq=False, repr=False)
class EdgeScores:
    """The edges of several sequences.

    `edges[3]`, `edges["q7"]`, `edges[:10]` and lists of places, ids or bools are the edges of these
    sequences; `a - b`, `a + b` and `a * 2` count score by score, loss by loss.
    """

    scores: torch.Tensor
    """float32 [sequence, source, target] (float64 for a float64 model); 0 where no edge is."""

    losses: torch.Tensor
    """float32 [sequence]: mean negative log-likelihood of the answer tokens, in nats."""

    entropies: torch.Tensor
    """float32 [sequence]: mean entropy of the next-token distribution at the answer tokens, in
    nats."""

    graph: Graph
    """Which row and column is which node."""

    residual_error: float = 0.0
    """How far the sources' sum was from the final norm's input, relative to it, in the worst batch:
    rounding, if the row of the architecture table is right for this checkpoint."""

    ids: tuple[str, ...] = ()
    """A name for each sequence; its place in the list where none is given."""

    __array_ufunc__ = None  # numpy's numbers leave `number * edges` to this class

    def __post_init__(self) -> None:
        """Name the sequences, and check that everything is of the same ones.

        Raises:
            ProbeError: Shapes do not fit each other, or the graph.
        """
        count, shape = len(self.losses), self.graph.mask.shape
        ids = tuple(map(str, self.ids or range(count)))
        object.__setattr__(self, "ids", ids)
        if self.scores.shape != (count, *shape) or self.entropies.shape != (count,):
            raise ProbeError(
                f"scores of shape {[*self.scores.shape]} and {[*self.entropies.shape]} entropies "
                f"do not fit {count} losses and a graph of {[*shape]}"
            )
        if len(ids) != count:
            raise ProbeError(f"{len(ids)} ids do not fit {count} sequences")

    def __len__(self) -> int:
        """How many sequences there are."""
        return len(self.losses)

    def __iter__(self) -> "Iterator[EdgeScores]":
        """The edges of one sequence after the other."""
        return (self[place] for place in range(len(self)))

    def __contains__(self, name: object) -> bool:
        """Whether a sequence has this id."""
        return name in self.ids

    def __getitem__(self, choice: Choice) -> "EdgeScores":
        """The edges of some sequences.

        Raises:
            ProbeError: There is no such sequence, or an id is that of several.
        """
        places = self._places(choice)
        return replace(
            self,
            scores=self.scores[places],
            losses=self.losses[places],
            entropies=self.entropies[places],
            ids=tuple(self.ids[place] for place in places),
        )

    def _places(self, choice: Choice) -> list[int]:
        if isinstance(choice, slice):
            return list(range(len(self)))[choice]
        if hasattr(choice, "tolist"):  # of torch or numpy
            choice = choice.tolist()
        if isinstance(choice, str | Integral):
            return [self._place(choice)]
        if not isinstance(choice, Sequence):
            raise ProbeError(f"{choice!r} chooses no sequences; give places, ids or bools")
        if choice and all(isinstance(chosen, bool) for chosen in choice):
            if len(choice) != len(self):
                raise ProbeError(f"{len(choice)} bools do not fit {len(self)} sequences")
            return [place for place, chosen in enumerate(choice) if chosen]
        return [self._place(name) for name in choice]

    def _place(self, name: object) -> int:
        if isinstance(name, str):
            found = [place for place, known in enumerate(self.ids) if known == name]
            if len(found) == 1:
                return found[0]
            many = f"{len(found)} sequences have" if found else "no sequence has"
            raise ProbeError(f"{many} the id {name!r}; give the place of one, 0 to {len(self) - 1}")
        if not _is_number(name):
            raise ProbeError(f"{name!r} is neither a sequence's place nor its id")
        place = int(name)  # type: ignore[call-overload]
        if not -len(self) <= place < len(self):
            raise ProbeError(f"there is no sequence {place}; there are {len(self)}")
        return place % len(self)

    def __eq__(self, other: object) -> bool:
        """Whether graph, sequences and every number are the same."""
        if not isinstance(other, EdgeScores):
            return NotImplemented
        return (self.graph, self.ids, self.residual_error) == (
            other.graph,
            other.ids,
            other.residual_error,
        ) and all(
            torch.equal(*pair) for pair in zip(self._numbers(), other._numbers(), strict=True)
        )

    __hash__ = None  # type: ignore[assignment]

    def __add__(self, other: "EdgeScores") -> "EdgeScores":
        """The sum of both, of the same sequences and graph."""
        return self._with(other, 1) if isinstance(other, EdgeScores) else NotImplemented

    def __sub__(self, other: "EdgeScores") -> "EdgeScores":
        """What the first has more than the second, of the same sequences and graph."""
        return self._with(other, -1) if isinstance(other, EdgeScores) else NotImplemented

    def __mul__(self, factor: float) -> "EdgeScores":
        """All numbers times a factor."""
        if isinstance(factor, bool) or not isinstance(factor, Real):
            return NotImplemented
        return self._of(number * float(factor) for number in self._numbers())

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> "EdgeScores":
        """All numbers divided by one."""
        if isinstance(divisor, bool) or not isinstance(divisor, Real):
            return NotImplemented
        return self._of(number / float(divisor) for number in self._numbers())

    def __neg__(self) -> "EdgeScores":
        """All numbers with the other sign."""
        return self * -1

    def __repr__(self) -> str:
        """What it holds, in a line."""
        count, edges = len(self), int(self.graph.mask.sum())
        loss = f", mean loss {float(self.losses.mean()):.3g} nats" if count else ""
        things = f"{count} sequence{'s' * (count != 1)}, {edges} edges of {self.graph.granularity}"
        return f"EdgeScores({things}{loss})"

    def _numbers(self) -> tuple[torch.Tensor, ...]:
        return self.scores, self.losses, self.entropies

    def _of(self, numbers: Iterable[torch.Tensor]) -> "EdgeScores":
        scores, losses, entropies = numbers
        return replace(self, scores=scores, losses=losses, entropies=entropies)

    def _with(self, other: "EdgeScores", sign: int) -> "EdgeScores":
        if self.graph != other.graph:
            raise ProbeError("edges of different graphs cannot be added or subtracted")
        if self.ids != other.ids:
            raise ProbeError(
                "edges of different sequences cannot be added or subtracted; choose those of "
                "both by id first, as in edges[ids]"
            )
        pairs = zip(self._numbers(), other._numbers(), strict=True)
        error = max(self.residual_error, other.residual_error)
        return replace(self._of(a + sign * b for a, b in pairs), residual_error=error)
