"""Faithfulness against size: how much of a model its circuits of growing size still do.

The circuit C is kept, all other edges are removed, and f(C) = (L(none) - L(C)) / (L(none) - L(all))
is the share of what the edges do together, L being the mean loss over questions. The area under f,
over the share of edges kept, is the integrated circuit performance ratio (CPR); that between f and
1 the integrated circuit-model distance (CMD) of the MIB benchmark (Mueller et al. 2025, arXiv
2504.13151).

>>> curve, = faithfulness_curves(model, held_out, {"eap": edges})
>>> curve.cpr, curve.cmd
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from probe.attribution import EdgeScores, TokenSequence
from probe.causes._circuits import Circuit, random_circuits
from probe.causes._interventions import Outcomes, intervene
from probe.causes._plans import Leaves
from probe.errors import ProbeError, check_count
from probe.models import Graph, Model

ENOUGH = 0.8
"""So faithful is the circuit whose edges are left out one by one."""

SHARES = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""The sizes at which the MIB benchmark looks, as shares of all edges."""


@dataclass(frozen=True)
class Point:
    """One size of circuit."""

    share: float
    """The share of edges that are kept."""

    edges: int
    """How many these are."""

    faithfulness: float
    """f(C): 1 is the whole model, 0 a model without any edge."""

    without: float
    """f of all edges but these: near 0 where the circuit is complete."""

    random: float
    """The mean of f of random circuits of this size."""

    random_low: float
    """Its 2.5 % quantile."""

    random_high: float
    """Its 97.5 % quantile."""

    accuracy: float
    """The share of answer tokens that the circuit still finds likeliest."""


@dataclass(frozen=True)
class Curve:
    """One method's circuits of one model."""

    method: str
    """The method that ranked the edges."""

    points: tuple[Point, ...]
    """By growing size."""

    cpr: float
    """The area under f: the larger the better."""

    cmd: float
    """The area between f and 1: the smaller the better."""

    random_cpr: float
    """The area under the random circuits' f."""

    random_cmd: float
    """The area between their mean f and 1."""

    needless: float | None
    """Of the smallest of these circuits with f of at least 0.8: the share of edges without which
    f falls by less than 0.01 (the fewer, the more minimal); None where none comes so far."""


def sizes_of(n_edges: int) -> list[int]:
    """The numbers of edges that the shares come to, none twice."""
    return sorted({round(share * n_edges) for share in SHARES})


def faithfulness_curves(
    model: Model,
    sequences: Sequence[TokenSequence],
    scores: Mapping[str, EdgeScores],
    *,
    ablation: Leaves = "mean",
    n_random: int = 10,
    signed: bool = False,
    greedy: bool = False,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> tuple[Curve, ...]:
    """Measure circuits of growing size.

    Args:
        model: The model.
        sequences: What to measure on; best other questions than those that were scored.
        scores: What ranks the edges, by the names of methods; all of one graph.
        ablation: What is left of a removed output; see `intervene`.
        n_random: How many random circuits of each size stand beside.
        signed: Whether edges that harm come last; else the size of the score counts.
        greedy: Whether circuits grow from the logits; else they are the top of the ranking.
        seed: Seed of the random circuits, and of `resample`.
        progress: Called with how many rows, a circuit on a sequence each, have come.

    Raises:
        ProbeError: As `intervene`; no scores, or of several graphs; or there is nothing to share
            out, as the edges do nothing.
    """
    graphs = {found.graph for found in scores.values()}
    if len(graphs) != 1:
        raise ProbeError(f"scores are of {len(graphs)} graphs; give those of one")
    check_count("n_random", n_random)
    (graph,) = graphs
    n_edges = int(graph.mask.sum())
    sizes = sizes_of(n_edges)
    grow = Circuit.greedy if greedy else Circuit.top
    own = torch.stack(
        [grow(found, size, signed).edges for found in scores.values() for size in sizes]
    )
    drawn = torch.cat([random_circuits(graph, n_random, size, seed + size) for size in sizes])
    masks = torch.cat([own, graph.mask & ~own, drawn])
    found = _kept(model, sequences, masks, graph, ablation, seed, progress)
    scale = _Scale.of(found, len(sizes))
    shares, accuracy = scale.shares(found), found.accuracy.double().mean(1)
    circuits, without = shares[: len(own)], shares[len(own) : 2 * len(own)]
    beside = shares[2 * len(own) :].view(len(sizes), n_random)
    low, high = beside.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), 1)
    at = torch.tensor(sizes, dtype=torch.float64) / n_edges
    curves = []
    for number, method in enumerate(scores):
        first = number * len(sizes)
        points = tuple(
            Point(
                share=float(at[place]),
                edges=size,
                faithfulness=float(circuits[first + place]),
                without=float(without[first + place]),
                random=float(beside[place].mean()),
                random_low=float(low[place]),
                random_high=float(high[place]),
                accuracy=float(accuracy[first + place]),
            )
            for place, size in enumerate(sizes)
        )
        curves.append((method, points, own[first : first + len(sizes)]))
    needless = [
        _needless(model, sequences, points, of_method, graph, ablation, seed, scale)
        for _, points, of_method in curves
    ]
    return tuple(
        _curve(method, points, rest)
        for (method, points, _), rest in zip(curves, needless, strict=True)
    )


def _curve(method: str, points: tuple[Point, ...], needless: float | None) -> Curve:
    """Points with the areas below and above them."""
    return Curve(
        method,
        points,
        cpr=_area(points, "faithfulness", distance=False),
        cmd=_area(points, "faithfulness", distance=True),
        random_cpr=_area(points, "random", distance=False),
        random_cmd=_area(points, "random", distance=True),
        needless=needless,
    )


@dataclass(frozen=True)
class _Scale:
    """From losses to f."""

    none: float
    """The loss without any edge, in nats."""

    whole: float
    """The loss with all."""

    @classmethod
    def of(cls, found: Outcomes, n_sizes: int) -> "_Scale":
        """The first circuit of a method has no edge, the last one all.

        Raises:
            ProbeError: Both do the same.
        """
        losses = found.loss.double().mean(1)
        none, whole = float(losses[0]), float(losses[n_sizes - 1])
        if abs(none - whole) < 1e-9:
            raise ProbeError("the edges of this model do nothing together, so none does a share")
        return cls(none, whole)

    def shares(self, found: Outcomes) -> torch.Tensor:
        """F of each set: [set]."""
        return (self.none - found.loss.double().mean(1)) / (self.none - self.whole)


def _kept(
    model: Model,
    sequences: Sequence[TokenSequence],
    sets: torch.Tensor,
    graph: Graph,
    ablation: Leaves,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> Outcomes:
    """Keep each of some sets."""
    return intervene(
        model,
        sequences,
        sets,
        "keep",
        granularity=graph.granularity,
        ablation=ablation,
        seed=seed,
        progress=progress,
    )


def _area(
    points: Sequence[Point], what: Literal["faithfulness", "random"], distance: bool
) -> float:
    """The area under f over the share of edges, or between f and 1."""
    at = torch.tensor([point.share for point in points], dtype=torch.float64)
    values = torch.tensor([getattr(point, what) for point in points], dtype=torch.float64)
    return float(torch.trapezoid((1 - values).abs() if distance else values, at))


def _needless(
    model: Model,
    sequences: Sequence[TokenSequence],
    points: Sequence[Point],
    circuits: torch.Tensor,
    graph: Graph,
    ablation: Leaves,
    seed: int,
    scale: _Scale,
) -> float | None:
    """See `Curve.needless`."""
    enough = [place for place, point in enumerate(points) if point.faithfulness >= ENOUGH]
    if not enough or not points[enough[0]].edges:
        return None
    circuit = circuits[enough[0]]
    fewer = circuit.repeat(int(circuit.sum()), 1, 1)
    for number, (source, target) in enumerate(circuit.nonzero().tolist()):
        fewer[number, source, target] = False
    found = _kept(model, sequences, fewer, graph, ablation, seed)
    lost = points[enough[0]].faithfulness - scale.shares(found)
    return float((lost < 0.01).double().mean())
