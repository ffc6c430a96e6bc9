"""Scores position by position: which tokens of a text an edge carries something at.

>>> found = attribute_positions(model, ("12+30=?", "12+30=42;"))
>>> found.top(1)
[PlacedEdge(position=6, source='m3', target='logits', score=0.21)]
>>> found.shares                                  # of each token, they sum to 1
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from probe.attribution._methods import Options, method_named
from probe.attribution._row_checks import check_roles, check_row
from probe.attribution._scoring import ablation_means, check_method, check_target
from probe.attribution._sequences import MAX_NEW_TOKENS, Given, TokenSequence, as_sequences
from probe.errors import ProbeError, check_count
from probe.models import Graph, Model, as_model
from probe.notebook import html_table
from probe.tracing import LOSS, Target, Value
from probe.vocabulary import Ablation, Granularity, Steps

LARGEST = 2**29
"""How many numbers the matrices of one text may have, twice which are in memory at once."""


class PlacedEdge(NamedTuple):
    """An edge at one position."""

    position: int
    """Its place among the tokens that the model reads."""

    source: str
    """What writes there."""

    target: str
    """What reads there."""

    score: float
    """In nats."""


@dataclass(frozen=True, eq=False)
class PositionScores:
    """The edges of one sequence, position by position."""

    sequence: TokenSequence
    """The sequence."""

    scores: torch.Tensor
    """float32 [position, source, target] (float64 for a float64 model), in nats; 0 where no edge
    is. Their sum over positions is what `attribute` gives."""

    graph: Graph
    """Which row and column is which node."""

    @property
    def tokens(self) -> tuple[int, ...]:
        """The token at each position; the answer's last one is never read."""
        return (*self.sequence.prompt, *self.sequence.answer[:-1])

    @property
    def shares(self) -> torch.Tensor:
        """What each position has of the sum of all |score|, float64 [position]."""
        sums = self.scores.double().abs().sum((1, 2))
        return sums / sums.sum().clamp_min(torch.finfo(sums.dtype).tiny)

    def __repr__(self) -> str:
        """What it holds, in a line."""
        edges = int(self.graph.mask.sum())
        return f"PositionScores({len(self.tokens)} tokens, {edges} edges at each)"

    def _repr_html_(self) -> str:
        """The strongest edges with their positions, for a notebook."""
        return html_table(repr(self), PlacedEdge._fields, self.top())

    def top(self, k: int = 10) -> list[PlacedEdge]:
        """The strongest edges, each at its position.

        Args:
            k: How many.

        Raises:
            ProbeError: `k` is no whole number from 1 on.
        """
        check_count("k", k)
        shape = self.scores.shape
        order = self.scores.abs().flatten().argsort(descending=True, stable=True)
        order = order[: min(k, shape[0] * int(self.graph.mask.sum()))]
        found = []
        for index in order.tolist():
            position, edge = divmod(index, shape[1] * shape[2])
            source, target = divmod(edge, shape[2])
            names = self.graph.sources[source], self.graph.targets[target]
            found.append(PlacedEdge(position, *names, float(self.scores[position, source, target])))
        return found


def attribute_positions(
    model: Model | str | Path,
    sequences: Given,
    method: str = "eap",
    granularity: Granularity = "qkv",
    ablation: Ablation = "zero",
    ig_steps: Steps = "auto",
    answer: str | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    target: Target | str | Value = LOSS,
) -> list[PositionScores]:
    """Score every edge at every position, a sequence at a time.

    An edge's score is a sum over positions (the product of gradient and output, Eq. 9); here the
    sum is left out. The arguments are those of `attribute`.

    Raises:
        ProbeError: As `attribute`; a method that is no such sum; a text of too many numbers.
    """
    model = as_model(model)
    texts = as_sequences(model, sequences, answer, max_new_tokens)
    return list(each_by_position(model, texts, method, granularity, ablation, ig_steps, target))


def each_by_position(
    model: Model,
    texts: Sequence[TokenSequence],
    method: str,
    granularity: Granularity,
    ablation: Ablation,
    ig_steps: Steps,
    target: Target | str | Value = LOSS,
) -> Iterator[PositionScores]:
    """The same one by one: nobody has to hold the matrices of many texts.

    Raises:
        ProbeError: As `attribute_positions`.
    """
    way, target = method_named(method), Target.of(target)
    check_placed(method)
    check_method(model, method, way, ig_steps)
    graph = model.graph(granularity)
    check_roles(model, graph)
    check_target(model, target, texts, way, ig_steps)
    baseline = ablation_means(model, texts, graph, ablation, "auto")
    for place, text in enumerate(texts):
        size = text.length * graph.mask.numel()
        if size > LARGEST:
            raise ProbeError(
                f"sequence {text.id}: {text.length} tokens of {graph.mask.numel()} edges each are "
                f"{size:.1e} numbers, and {LARGEST:.1e} is the most; use a shorter text or "
                "granularity qkv"
            )
        beside = target.beside([place], [len(text.answer)])
        options = Options(
            ig_steps, baseline, target=target, references=beside, check=place == 0, positions=True
        )
        batch = way.score(model, [text], graph, options)
        if not batch.scores.isfinite().all():
            raise ProbeError(f"sequence {text.id}: a score is NaN or infinite")
        check_row(model, graph, batch)
        yield PositionScores(text, batch.scores.cpu(), graph)


def check_placed(method: str) -> None:
    """Check that a method's scores are sums over positions.

    Raises:
        ProbeError: They are not.
    """
    if method_named(method).passes is None:
        raise ProbeError(f"{method} removes an edge at all positions at once; use another method")
