"""Plans: which edges of each set carry what instead, and where that comes from.

Every intervention gives edges kept O + given B instead of O, what their source writes:

| do     | on which edges        | kept   | given      | B                                  |
|--------|-----------------------|--------|------------|------------------------------------|
| remove | those of the set      | 0      | 1          | what the ablation leaves           |
| keep   | all that are not      | 0      | 1          | likewise                           |
| scale  | those of the set      | factor | 1 - factor | likewise                           |
| patch  | those of the set      | 0      | 1          | O of the other model               |
| swap   | those of the set      | 0      | 1          | O of its source on what is read here |
| add    | those of the set      | 1      | factor     | O of the other model, less O here  |
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Literal, get_args

import torch

from probe.attribution import (
    BatchSize,
    Given,
    TokenSequence,
    ablation_means,
    as_sequences,
    check_before,
    make_batch,
)
from probe.causes._edge_sets import Sets, as_sets
from probe.errors import ProbeError, not_known
from probe.models import Graph, Model, cpu_threads
from probe.tracing import Batch, ChangedBatch, changed_outcomes, read_values, written_values
from probe.vocabulary import Granularity

Do = Literal["remove", "keep", "scale", "patch", "swap", "add"]
"""What is done with edges."""

Leaves = Literal["zero", "mean", "resample"]
"""What is left of a removed output: nothing, its mean, or what it is on another question."""

Values = Mapping[int, torch.Tensor] | torch.Tensor | None


@dataclass(frozen=True)
class Plan:
    """What is done with edges."""

    do: Do
    """What."""

    kept: float
    """The share of O."""

    given: float
    """The share of B."""

    leaves: Leaves
    """What an ablation leaves."""

    other: Model | None
    """The other model of the pair."""

    @classmethod
    def of(cls, do: Do, factor: float | None, leaves: Leaves, other: Model | None) -> "Plan":
        """Check what a user asks for.

        Raises:
            ProbeError: It is not known, or something is missing or of no use.
        """
        for what, value, known in (("do", do, Do), ("ablation", leaves, Leaves)):
            if value not in get_args(known):
                raise ProbeError(not_known(what, value, get_args(known)))
        if (other is not None) != (do in ("patch", "swap", "add")):
            needed = "needs" if other is None else "has no use for"
            raise ProbeError(f"{do} {needed} the other model")
        if do not in ("scale", "add"):
            if factor is not None:
                raise ProbeError(f"{do} has no use for a factor; scale and add have")
            return cls(do, 0.0, 1.0, leaves, other)
        number = 1.0 if factor is None and do == "add" else factor
        if isinstance(number, bool) or not isinstance(number, int | float) or not isfinite(number):
            raise ProbeError(f"factor is {factor!r}; {do} needs a number")
        kept, given = (1.0, float(number)) if do == "add" else (float(number), 1 - float(number))
        return cls(do, kept, given, leaves, other)

    def changed(self, graph: Graph, sets: torch.Tensor) -> torch.Tensor:
        """The edges that carry something else: bool [set, source, target]."""
        if self.kept == 1 and self.given == 0:
            return torch.zeros_like(sets)
        return graph.mask & ~sets if self.do == "keep" else sets


class Changes:
    """A plan for one model: what runs with changed edges, and where B comes from."""

    def __init__(
        self,
        model: Model,
        graph: Graph,
        plan: Plan,
        sequences: Sequence[TokenSequence],
        changed: torch.Tensor,
        seed: int,
        batch_size: BatchSize,
    ) -> None:
        """Prepare it.

        Args:
            model: The model in which edges change.
            graph: Its graph.
            plan: What is done.
            sequences: The sequences, whose means are taken and which stand for each other.
            changed: The changed edges of all sets.
            seed: Which sequence stands for which.
            batch_size: How many run at once where means are taken.

        Raises:
            ProbeError: There is no other sequence to take values from.
        """
        self.model, self.graph, self.plan = model, graph, plan
        self.wanted: list[int] = changed.any(0).any(1).nonzero()[:, 0].tolist()
        self._means: torch.Tensor | None = None
        self._partners: list[TokenSequence] = []
        ablates = plan.other is None
        if ablates and plan.leaves == "mean":
            self._means = ablation_means(model, sequences, graph, "mean", batch_size)
        elif ablates and plan.leaves == "resample":
            self._partners = [sequences[place] for place in partners(len(sequences), seed)]

    def run(self, batch: Batch, rows: torch.Tensor, values: Values) -> ChangedBatch:
        """Run a batch with the edges of each row changed, bool [row, source, target]."""
        plan = self.plan
        return changed_outcomes(self.model, batch, self.graph, rows, plan.kept, plan.given, values)

    def values(self, place: int, batch: Batch) -> Values:
        """B on one sequence, or on rows of that sequence with other answers.

        Args:
            place: The sequence's place.
            batch: What the model is fed.
        """
        if not self.wanted:
            return None
        if self.plan.other is not None:
            there = self._written(self.plan.other, batch, self.plan.do == "swap")
            if self.plan.do != "add":
                return there
            here = self._written(self.model, batch)
            return {key: value.to(here[key].device) - here[key] for key, value in there.items()}
        if self._partners:
            found = self._written(self.model, make_batch([self._partners[place]]))
            length = batch.input_ids.shape[1]
            # A text that is shorter stays at its last position.
            at = torch.arange(length).clamp_max(self._partners[place].length - 1)
            return {key: value[:, at.to(value.device)] for key, value in found.items()}
        return self._means

    def _written(
        self, model: Model, batch: Batch, swapped: bool = False
    ) -> dict[int, torch.Tensor]:
        """What sources of a model write; if `swapped`, of what this model's stream holds."""
        with cpu_threads(model.threads):
            read = read_values(self.model, batch) if swapped else None
            return written_values(model, batch, self.graph, self.wanted, read)


def prepare(
    model: Model,
    plan: Plan,
    sequences: Given,
    sets: Sets,
    granularity: Granularity,
    seed: int,
    batch_size: BatchSize,
) -> tuple[Changes, torch.Tensor, list[TokenSequence]]:
    """What runs, the changed edges of each set (bool [set, source, target]), and the sequences."""
    graph = same_graph(model, plan.other, granularity)
    changed = plan.changed(graph, as_sets(graph, sets))
    texts = as_sequences(model, sequences)
    for one in filter(None, (model, plan.other)):
        check_before(one, graph, texts)
    return Changes(model, graph, plan, texts, changed, seed, batch_size), changed, texts


def partners(count: int, seed: int) -> list[int]:
    """For each of so many sequences another one; each stands for one, and none for itself.

    Raises:
        ProbeError: There is only one.
    """
    if count < 2:
        raise ProbeError("resample takes values from another sequence; give at least two")
    order = list(range(count))
    random.Random(seed).shuffle(order)
    found = [0] * count
    for place, one in enumerate(order):
        found[one] = order[(place + 1) % count]
    return found


def same_graph(model: Model, other: Model | None, granularity: Granularity) -> Graph:
    """The graph that both models have.

    Raises:
        ProbeError: They have two.
    """
    graph = model.graph(granularity)
    if other is not None:
        there = other.graph(granularity)
        if (there.sources, there.targets) != (graph.sources, graph.targets):
            raise ProbeError(
                f"{model.reference} and {other.reference} have different graphs; edges can be "
                "carried over only between models of one architecture and depth"
            )
        if other.d_model != model.d_model:
            raise ProbeError(
                f"{model.reference} has a d_model of {model.d_model}, {other.reference} of "
                f"{other.d_model}"
            )
    return graph
