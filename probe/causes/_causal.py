"""The causal test of a pair of models.

Its questions are halved. On one half edges are ranked by how much they were strengthened; on the
other they are changed, beside edges that are like them.

>>> found = causal_test(before, after, sequences)
>>> found.test.sets[0].verdict
'no sign'
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch

from probe.attribution import BatchSize, Given, TokenSequence, as_sequences, attribute
from probe.causes._halves import halves
from probe.causes._interventions import outcomes_of
from probe.causes._plans import Changes, Do, Plan, same_graph
from probe.errors import check_count
from probe.metrics import Array
from probe.models import Graph, Model, Node, as_model
from probe.stats import (
    ActingEdge,
    CausalTest,
    Damages,
    Label,
    Matching,
    Places,
    Units,
    acting_edges,
    judged_test,
    make_edge_test,
    make_set_test,
    match_edges,
    shares_of_edges,
    units_of,
)
from probe.tracing import OUTCOMES
from probe.vocabulary import Ablation, Granularity, Steps

MEASURED = 1000
"""So many edges are changed one by one, at most."""

# Sets are matrices; as many at once as hold so many numbers (256 MB).
_NUMBERS = 2**28


class Kept(Protocol):
    """Where measurements are kept while a test goes on, so that it can go on after a kill."""

    def read(self, name: str) -> torch.Tensor | None:
        """A measurement from before."""

    def write(self, name: str, values: torch.Tensor) -> None:
        """Keep a measurement."""


class Intervention(NamedTuple):
    """What is done to edges of the model after."""

    do: Do
    """What."""

    factor: float | None
    """By what they are scaled."""

    levels: Literal["after", "both"]
    """Whose levels matched edges share: `after`, or `both`, the mean of both models. What is
    patched goes from the one model's value to the other's."""

    sizes: bool = False
    """Whether single edges are ranked by the sizes of strengthening and damage. What a source's own
    change does to the loss goes up at some readers and down at others."""


INTERVENTIONS = {
    "scaled by 0.75": Intervention("scale", 0.75, "after"),
    "removed": Intervention("remove", None, "after"),
    "patched": Intervention("patch", None, "both"),
    "swapped": Intervention("swap", None, "both", sizes=True),
}
"""Every intervention by what tables call it; the one place to add one."""


@dataclass(frozen=True, eq=False)
class Causes:
    """The causal test of a pair, and what it is from."""

    test: CausalTest
    """What was found."""

    graph: Graph
    """The graph."""

    strengthening: Array
    """How much each edge was strengthened, in the graph's order: the rise of its share, [edge]."""

    levels: Array
    """Its share in the model after, [edge]."""

    damages: dict[str, Array]
    """Rise of the loss by each edge alone, in nats, by intervention; NaN of those not changed."""

    treated: dict[str, dict[Label, list[tuple[str, str]]]]
    """The treated edges by intervention and label, the most changed first."""

    ranked_on: tuple[str, ...]
    """The questions of the first half."""

    measured_on: tuple[str, ...]
    """Those of the other."""

    loss: float
    """Mean loss of the model after on these, in nats."""

    right: float
    """The share of the answers there that it writes as they are, token by token."""


def causal_test(
    before: Model | str | Path,
    after: Model | str | Path,
    sequences: Given,
    *,
    measure: str = "eap",
    granularity: Granularity = "head",
    edges: int = 10,
    sets: int = 500,
    ablation: Ablation = "zero",
    ig_steps: Steps = "auto",
    clusters: Mapping[str, str] | None = None,
    batch_size: BatchSize = "auto",
    seed: int = 42,
    kept: Kept | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Causes:
    """Test whether the edges that a training strengthened, or weakened, do more than others.

    Both models read the same texts. Everything is done in the model after; `patched` edges carry
    what the model before writes, `swapped` ones what its source makes of what the model after
    holds: the source's own change, without what comes through it from further up.

    Args:
        before: The model before training.
        after: The one after it.
        sequences: Questions with right answers of the model after.
        measure: The method whose shares of |score| say how strong an edge is; see `attribute`.
        granularity: That of the edges; the finer, the more edges are alike.
        edges: How many of the most strengthened and of the most weakened edges make a set.
        sets: How many random sets stand beside each.
        ablation: What a removed edge leaves.
        ig_steps: Points of the integral of `eap-ig`.
        clusters: The cluster of each question that has one, by its id.
        batch_size: How many rows run at once.
        seed: Seed of the halves, draws and exchanges.
        kept: Where measurements are kept.
        progress: Called with how many rows, a set on a question each, have come, and how many
            there are.

    Raises:
        ProbeError: As `attribute` and `intervene`; too few questions.
    """
    check_count("edges", edges)
    check_count("sets", sets)
    before, after = as_model(before), as_model(after)
    graph = same_graph(after, before, granularity)
    ranked, held_out = halves(as_sequences(after, sequences), seed, clusters)
    score = partial(
        attribute,
        sequences=ranked,
        method=measure,
        granularity=granularity,
        batch_size=batch_size,
        ablation=ablation,
        ig_steps=ig_steps,
    )
    old, new = (shares_of_edges(score(model).scores, graph).mean(0) for model in (before, after))
    design = _Design.of(graph, old, new, edges, sets, seed)
    total = len(held_out) * sum(len(design.rows(way)) for way in INTERVENTIONS.values())
    measured = {}
    for name, way in INTERVENTIONS.items():
        plan = Plan.of(
            way.do, way.factor, ablation, before if way.do in ("patch", "swap") else None
        )
        rows = design.rows(way)
        union = _matrices(graph, design.places, [np.unique(np.concatenate(rows))])
        changes = Changes(after, graph, plan, held_out, union, seed, batch_size)
        measure_one = partial(_on_question, changes, design.places, rows, batch_size)
        found = []
        for place, text in enumerate(held_out):
            found.append(
                _read_or_measure(kept, f"{name}-{place}", partial(measure_one, place, text))
            )
            if progress:
                progress(len(rows), total)
        measured[name] = torch.stack(found, 2)
    groups = None if clusters is None else [clusters.get(text.id) for text in held_out]
    return design.judged(measured, ranked, held_out, units_of(groups, len(held_out)))


def _read_or_measure(
    kept: Kept | None, name: str, measure: Callable[[], torch.Tensor]
) -> torch.Tensor:
    """What is kept under a name, or else is measured and kept."""
    values = None if kept is None else kept.read(name)
    if values is None:
        values = measure()
        if kept is not None:
            kept.write(name, values)
    return values


@dataclass(frozen=True, eq=False)
class _Design:
    """What is compared with what; nothing of it depends on what the edges do."""

    graph: Graph
    """The graph."""

    places: Places
    """Source and target of each edge, [edge, 2]."""

    levels: Array
    """Of the model after, [edge]."""

    strengthening: Array
    """[edge]."""

    matchings: dict[str, Matching]
    """By whose levels edges are matched."""

    single: Places
    """The edges that are changed one by one."""

    seed: int
    """Seed of all draws."""

    @classmethod
    def of(
        cls, graph: Graph, before: Array, after: Array, edges: int, sets: int, seed: int
    ) -> "_Design":
        """Design the test from the levels of both models."""
        places: Places = graph.mask.nonzero().numpy()
        readers = [Node.parse(graph.targets[target]) for target in places[:, 1]]
        kinds = [reader.branch or reader.kind for reader in readers]
        cells = [[reader.whole for reader in readers], kinds, [""] * len(readers)]
        change = np.sqrt(after) - np.sqrt(before)
        matchings = {
            "after": match_edges(cells, after, change, edges, sets, seed),
            "both": match_edges(cells, (before + after) / 2, change, edges, sets, seed),
        }
        single = np.arange(len(places))
        if len(single) > MEASURED:
            single = _some(matchings["after"].strata.numbers, seed)
        return cls(graph, places, after, change, matchings, single, seed)

    def rows(self, way: Intervention) -> list[Places]:
        """The sets that are changed: each single edge, and for each label its own and matched."""
        matching = self.matchings[way.levels]
        rows = list(self.single[:, None])
        for label, drawn in matching.drawn.items():
            rows += [matching.treated[label], *drawn]
        return rows

    def judged(
        self,
        measured: Mapping[str, torch.Tensor],
        ranked: Sequence[TokenSequence],
        held_out: Sequence[TokenSequence],
        units: Units,
    ) -> Causes:
        """Test what was measured: [loss and right, 1 + set, question] by intervention."""
        edge_tests, set_tests, damages, treated = [], [], {}, {}
        acting: list[ActingEdge] = []
        tried = {}
        for name, values in measured.items():
            way = INTERVENTIONS[name]
            matching = self.matchings[way.levels]
            loss, right = (part.double().numpy() for part in values)
            found = Damages(loss[1:] - loss[0], right[0] - right[1:])
            count = len(self.single)
            own = found.loss[:count].mean(1)
            damages[name] = np.full(len(self.places), np.nan)
            damages[name][self.single] = own
            if way.levels == "both":
                named = [self._named(edge) for edge in self.single]
                tried[name] = count
                acting += acting_edges(name, named, found.loss[:count], loss[0], units)
            labels = self.strengthening
            edge_tests.append(
                make_edge_test(name, matching, labels, own, self.single, self.seed, way.sizes)
            )
            start = count
            for label, drawn in matching.drawn.items():
                part = slice(start, start + 1 + len(drawn))
                some = Damages(found.loss[part], found.lost[part])
                set_tests.append(make_set_test(label, name, matching, some, units))
                start = part.stop
            treated[name] = {
                label: [self._named(edge) for edge in edges]
                for label, edges in matching.treated.items()
            }
        return Causes(
            replace(judged_test(edge_tests, set_tests), acting=tuple(acting), tried=tried),
            self.graph,
            self.strengthening,
            self.levels,
            damages,
            treated,
            tuple(text.id for text in ranked),
            tuple(text.id for text in held_out),
            loss=float(loss[0].mean()),
            right=float(right[0].mean()),
        )

    def _named(self, edge: int) -> tuple[str, str]:
        source, target = self.places[edge]
        return self.graph.sources[source], self.graph.targets[target]


def _some(strata: Units, seed: int) -> Places:
    """Some edges of strata drawn at random, up to ten of each."""
    random = np.random.default_rng(seed)
    order = random.permutation(len(strata))
    order = order[np.argsort(strata[order], kind="stable")]  # by stratum, at random within
    starts = np.flatnonzero(np.diff(strata[order], prepend=-1))
    parts = [part[:10] for part in np.split(order, starts[1:]) if len(part) > 1]
    found: list[Places] = []
    for number in random.permutation(len(parts)):
        if sum(map(len, found)) + len(parts[number]) > MEASURED:
            break
        found.append(parts[number])
    return np.sort(np.concatenate(found)) if found else np.arange(MEASURED)


def _on_question(
    changes: Changes,
    places: Places,
    rows: Sequence[Places],
    batch_size: BatchSize,
    place: int,
    text: TokenSequence,
) -> torch.Tensor:
    """Loss, and whether the answer is still written, of all sets on one question.

    Returns:
        [loss and right, 1 + set]; the model as it is comes first.
    """
    step = max(1, _NUMBERS // changes.graph.mask.numel())
    parts = []
    for start in range(0, len(rows), step):
        changed = _matrices(changes.graph, places, rows[start : start + step])
        found = outcomes_of(changes, changed, place, text, batch_size)
        parts.append(found if not start else found[:, 1:])
    values = torch.cat(parts, 1).double()
    right = values[OUTCOMES.index("accuracy")] == 1
    return torch.stack([values[OUTCOMES.index("loss")], right.to(values.dtype)])


def _matrices(graph: Graph, places: Places, rows: Sequence[Places]) -> torch.Tensor:
    """Sets of edges as bool [set, source, target]."""
    found = torch.zeros(len(rows), *graph.mask.shape, dtype=torch.bool)
    for matrix, edges in zip(found, rows, strict=True):
        sources, targets = torch.from_numpy(places[edges]).T
        matrix[sources, targets] = True
    return found
