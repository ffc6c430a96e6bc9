"""Edge scores: what attribution finds, question by question, with the names of its nodes.

>>> edges = probe.attribute("probe:tiny-math/sft", ["50-7-67-53=?", "9-4=?"])
>>> edges
EdgeScores(2 sequences, 77 edges of qkv, mean loss 0.105 nats)
>>> edges["1"].top(1)
[ScoredEdge(source='a3', target='m3', score=-0.345742404460907)]
"""

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from probe.choice import Choice, chosen_places, is_number
from probe.errors import ProbeError, check_count, reason
from probe.files import write_whole
from probe.models import Graph, Node
from probe.notebook import data_frame, html_table

if TYPE_CHECKING:
    import networkx
    import pandas
    from matplotlib.axes import Axes


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
        whole = isinstance(given, tuple) and len(given) == 3 and all(map(is_number, given))
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


class ScoredEdge(NamedTuple):
    """One edge by the names of its nodes."""

    source: str
    """The node that writes: `a0`."""

    target: str
    """The branch that reads: `m3`, `a3.q`."""

    score: float
    """Its score, in nats."""


_TENSORS = ("scores", "losses", "entropies")


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

    values: torch.Tensor = None  # type: ignore[assignment]
    """float32 [sequence]: what was differentiated, the target; the losses where not given."""

    gaps: torch.Tensor | None = None
    """float32 [sequence], of an integrated method: what the edges out of `input` give more than the
    target's difference between the ends of the way. None of a method that does not integrate."""

    __array_ufunc__ = None  # numpy's numbers leave `number * edges` to this class

    def __post_init__(self) -> None:
        """Name the sequences, and check that everything is of the same ones.

        Raises:
            ProbeError: Shapes do not fit each other, or the graph.
        """
        count, shape = len(self.losses), self.graph.mask.shape
        ids = tuple(map(str, self.ids or range(count)))
        object.__setattr__(self, "ids", ids)
        if self.values is None:
            object.__setattr__(self, "values", self.losses)
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
        return (self[index] for index in range(len(self)))

    def __contains__(self, name: object) -> bool:
        """Whether a sequence has this id."""
        return name in self.ids

    def __getitem__(self, choice: Choice) -> "EdgeScores":
        """The edges of some sequences.

        Raises:
            ProbeError: There is no such sequence, or an id is that of several.
        """
        indices = chosen_places(choice, self.ids)
        return replace(
            self,
            scores=self.scores[indices],
            losses=self.losses[indices],
            entropies=self.entropies[indices],
            values=self.values[indices],
            gaps=None if self.gaps is None else self.gaps[indices],
            ids=tuple(self.ids[index] for index in indices),
        )

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

    def _repr_html_(self) -> str:
        """The strongest edges, for a notebook."""
        edges = self.top() if len(self) else []
        return html_table(repr(self), ScoredEdge._fields, edges)

    def top(self, k: int = 10) -> list[ScoredEdge]:
        """The strongest edges by |score|; of several sequences, by that of the mean score.

        Args:
            k: How many; all where there are fewer.

        Raises:
            ProbeError: `k` is no whole number from 1 on, or there are no sequences.
        """
        check_count("k", k)
        mean, mask = self._mean(), self.graph.mask
        sizes = mean.abs().masked_fill(~mask, -1).flatten()
        indices = sizes.argsort(descending=True, stable=True)[: min(k, int(mask.sum()))].tolist()
        cells = (divmod(index, mask.shape[1]) for index in indices)
        sources, targets = self.graph.sources, self.graph.targets
        return [ScoredEdge(sources[i], targets[j], float(mean[i, j])) for i, j in cells]

    def score(self, source: str, target: str) -> float:
        """The mean score of one edge over the sequences, in nats; of one, `edges["q7"].score`.

        Raises:
            ProbeError: There is no such edge, or there are no sequences.
        """
        row = _node("source", source, self.graph.sources)
        column = _node("target", target, self.graph.targets)
        if not self.graph.mask[row, column]:
            raise ProbeError(f"there is no edge from {source} to {target}, which reads before it")
        return float(self._mean()[row, column])

    def nodes(self) -> dict[str, float]:
        """The mean score of every source as a whole, in nats: the sum of its edges'.

        The gradients of all that reads a source add up to that of what it writes, so with `eap`
        this is attribution patching of nodes: minus the gradient times the output.

        Raises:
            ProbeError: There are no sequences.
        """
        return dict(zip(self.graph.sources, self._mean().sum(1).tolist(), strict=True))

    def to_pandas(self) -> "pandas.DataFrame":
        """One row per sequence and edge: `id`, `source`, `target`, `score`.

        Raises:
            ProbeError: There is no pandas.
        """
        rows, columns = (part.tolist() for part in self.graph.mask.nonzero(as_tuple=True))
        count, sources, targets = len(self), self.graph.sources, self.graph.targets
        return data_frame(
            {
                "id": [name for name in self.ids for _ in rows],
                "source": [sources[row] for row in rows] * count,
                "target": [targets[column] for column in columns] * count,
                "score": self.scores[:, self.graph.mask].flatten().tolist(),
            }
        )

    def to_networkx(self) -> "networkx.DiGraph[str]":
        """The graph with the mean `score` of every edge, and its size as `weight`.

        A node is what writes or reads: `a0` writes, its branches `a0.q`, `a0.k` and `a0.v` read.
        Its `block`, `a0` of all four, tells what belongs together.

        Raises:
            ProbeError: There is no networkx, or there are no sequences.
        """
        try:
            import networkx
        except ImportError as error:
            raise ProbeError("to_networkx needs networkx: pip install networkx") from error
        mean, graph = self._mean(), networkx.DiGraph()
        for name in dict.fromkeys((*self.graph.sources, *self.graph.targets)):
            graph.add_node(name, block=Node.parse(name).block)
        for row, column in self.graph.mask.nonzero().tolist():
            score = float(mean[row, column])
            names = self.graph.sources[row], self.graph.targets[column]
            graph.add_edge(*names, score=score, weight=abs(score))
        return graph

    def plot(self, axes: "Axes | None" = None) -> "Axes":
        """Draw the mean scores as an image, source against target.

        Args:
            axes: Where to; a new figure if not given.

        Raises:
            ProbeError: There are no sequences.
        """
        import numpy as np
        from matplotlib import pyplot

        from probe.attribution._matrix import draw_matrix

        mean, mask = self._mean(), self.graph.mask
        if axes is None:
            _, axes = pyplot.subplots(layout="constrained")
        known = mean[mask].abs()
        limit = float(known.max()) or 1.0
        values = np.where(mask.numpy(), mean.numpy(), np.nan)
        image = draw_matrix(axes, self.graph, values, "RdBu_r", limit)
        axes.figure.colorbar(image, ax=axes, shrink=0.9, label="score (nats)")
        return axes

    def save(self, path: str | Path, key: str = "") -> None:
        """Write everything to a safetensors file, as a run folder holds it.

        Args:
            path: The file.
            key: A name for what the edges were computed from, by which a run knows its own.

        Raises:
            ProbeError: The file cannot be written.
        """
        place = Path(path)
        try:
            write_whole(place, lambda beside: write_edges(self, beside, key))
        except OSError as error:
            raise ProbeError(f"cannot write {path}: {error.strerror}") from error

    @classmethod
    def load(cls, path: str | Path) -> "EdgeScores":
        """Read a file that `save` or a run has written.

        Raises:
            ProbeError: There is no such file, or it holds something else.
        """
        try:
            return read_edges(Path(path))[0]
        except ValueError as error:
            raise ProbeError(f"cannot read {path}: {error}") from error

    def _mean(self) -> torch.Tensor:
        """Mean score over sequences, float64 [source, target]."""
        if not len(self):
            raise ProbeError("there are no sequences, so edges have no mean score")
        return self.scores.mean(0, dtype=torch.float64)

    def _numbers(self) -> tuple[torch.Tensor, ...]:
        return self.scores, self.losses, self.entropies, self.values

    def _of(self, numbers: Iterable[torch.Tensor]) -> "EdgeScores":
        scores, losses, entropies, values = numbers
        return replace(
            self, scores=scores, losses=losses, entropies=entropies, values=values, gaps=None
        )

    @property
    def completeness_gap(self) -> float:
        """The gaps as a share of what the integrals should give, over all sequences.

        0 of a method that does not integrate, of which nothing can be said.
        """
        if self.gaps is None or not len(self):
            return 0.0
        found = self.scores[:, 0].sum(1)
        wanted = (found - self.gaps).abs().sum()
        return float(self.gaps.abs().sum() / wanted) if wanted > 0 else 0.0

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


def write_edges(edges: EdgeScores, path: Path, key: str, place: str = "") -> None:
    """Write edges to a safetensors file, with a digest of them.

    Args:
        edges: The edges.
        path: The file.
        key: A name for what they were computed from.
        place: What the file will be called, where it must not take another one's place.

    Raises:
        OSError: The file cannot be written.
    """
    metadata = {
        "ids": json.dumps(list(edges.ids)),
        "key": key,
        "graph": json.dumps(asdict(edges.graph)),
        "residual_error": repr(edges.residual_error),
    }
    if place:
        metadata["place"] = place
    numbers = (edges.scores, edges.losses, edges.entropies)
    tensors = dict(zip(_TENSORS, (n.contiguous() for n in numbers), strict=True))
    if not torch.equal(edges.values, edges.losses):
        tensors["values"] = edges.values.contiguous()
    if edges.gaps is not None:
        tensors["gaps"] = edges.gaps.contiguous()
    metadata["digest"] = _digest(tensors, metadata)
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        # What the system said is in its text alone.
        number = re.search(r"os error (\d+)", str(error))
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code), str(path)) from error


def _digest(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    """A digest of all numbers and texts of a file, but for one that is there already."""
    digest = hashlib.sha256()
    texts = {name: text for name, text in sorted(metadata.items()) if name != "digest"}
    shapes = {name: (str(each.dtype), list(each.shape)) for name, each in sorted(tensors.items())}
    digest.update(json.dumps([texts, shapes]).encode())
    for name in shapes:
        digest.update(tensors[name].numpy().data)
    return digest.hexdigest()[:32]


def read_edges(path: Path) -> tuple[EdgeScores, dict[str, str]]:
    """Read a file of edges, and the texts beside them; its digest is checked where it has one.

    Raises:
        ValueError: The file is not there, torn, changed since, or of something else; the message
            says in which way.
    """
    try:
        if not path.is_file():  # a pipe would be waited for
            raise FileNotFoundError("there is no such file")
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if "digest" in metadata and metadata["digest"] != _digest(tensors, metadata):
            raise ValueError("not as it was written, by its digest")
        scores, losses, entropies = (tensors[name] for name in _TENSORS)
        # Only of another target than the loss, and of an integrated method.
        values, gaps = tensors.get("values"), tensors.get("gaps")
        graph = TypeAdapter(Graph).validate_json(metadata["graph"])
        ids = tuple(map(str, json.loads(metadata["ids"])))
        error = float(metadata["residual_error"])
        values = losses if values is None else values
        edges = EdgeScores(scores, losses, entropies, graph, error, ids, values, gaps)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, ProbeError) as damage:
        raise ValueError(reason(damage)) from damage
    if not edges.scores.isfinite().all():
        raise ValueError("scores that are not finite")
    return edges, metadata


def _node(kind: str, name: str, known: tuple[str, ...]) -> int:
    """The place of a node."""
    if name in known:
        return known.index(name)
    parts = [node for node in known if node.startswith(f"{name}.")]
    raise ProbeError(f"there is no {kind} {name!r}; there are: {', '.join(parts or known)}")
