"""Faithfulness: what the fast methods say of some edges, beside what these edges really do.

A fast method scores all edges from gradients; the exact effect of an edge is what the loss gains
when that edge is removed, one forward pass each. So a sample of edges is drawn, a third each from
the strongest, the middle and the rest, and every method is compared on it. In strata, because
nearly all edges are weak: a plain draw would hardly hold one that matters.

    >>> measure(model, sequences, ["eap", "relp"], edges=3)[0].scores
    {'eap': 0.21, 'relp': 0.24}
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch

from probe.attribution import Edge, TokenSequence, ablation_means, attribute, exact_effects
from probe.concurrency import in_flight
from probe.models import Model
from probe.recipe import AttributionOptions
from probe.stats import MeasuredEdge, Stratum

EDGES = 400


class DrawnEdge(NamedTuple):
    """One edge of the sample."""

    edge: Edge
    """Which."""

    stratum: Stratum
    """From which part of the ranking."""


def draw_edges(
    scores: torch.Tensor, mask: torch.Tensor, count: int, seed: int
) -> tuple[DrawnEdge, ...]:
    """Draw real edges of all sequences together, none twice, a third from each stratum.

    `top` are the strongest by |score|; `middle` is drawn from the middle third of the ranking;
    `random` from all that is left, and it makes up for what the middle third cannot give.

    Args:
        scores: [sequence, source, target].
        mask: The real edges, [source, target].
        count: How many to draw; all of them where there are fewer.
        seed: Seed of the draw.
    """
    every = mask.expand(scores.shape).nonzero()  # [edge, (sequence, source, target)]
    strengths = scores[tuple(every.T)].abs()
    ranking: list[int] = torch.argsort(strengths, descending=True, stable=True).tolist()
    real = len(ranking)
    count = min(count, real)
    generator = random.Random(seed)

    top = ranking[: -(-count // 3)]
    middle = ranking[max(len(top), real // 3) : real - real // 3]
    middle = generator.sample(middle, min((count + 1) // 3, len(middle)))
    taken = {*top, *middle}
    rest = [index for index in ranking if index not in taken]
    rest = generator.sample(rest, count - len(taken))
    strata: dict[Stratum, list[int]] = {"top": top, "middle": middle, "random": rest}
    return tuple(
        DrawnEdge(Edge(*every[index].tolist()), stratum)
        for stratum, drawn in strata.items()
        for index in drawn
    )


def measure(
    model: Model,
    sequences: Sequence[TokenSequence],
    methods: Sequence[str],
    edges: int = EDGES,
    seed: int = 42,
    options: AttributionOptions | None = None,
    batch_size: int = 32,
    known: Mapping[tuple[str, str, str], float] | None = None,
    progress: Callable[[list[MeasuredEdge], int], None] | None = None,
) -> list[MeasuredEdge]:
    """Score a sample of edges by each method, and compute what they really do.

    Args:
        model: A model from `load_model`.
        sequences: What to measure on.
        methods: Names in `probe.attribution.METHODS`; the first one's scores make the strata.
        edges: How many edges to draw.
        seed: Seed of the draw.
        options: Granularity, ablation, steps and batch size of the methods; their defaults if
            not given.
        batch_size: How many edges run at once where the exact effects are computed.
        known: Exact effects from before, by sequence, source and target.
        progress: Called with the sample so far and the number of exact effects that have come to
            it: first with those that were known, then after each batch.
    """
    options = options or AttributionOptions()
    granularity, ablation = options.granularity, options.ablation
    names = [sequence.id or str(index) for index, sequence in enumerate(sequences)]
    found = {
        method: attribute(
            model,
            sequences,
            method,
            granularity,
            options.batch_size,
            ablation=ablation,
            ig_steps=options.ig_steps,
            target=options.target,
        )
        for method in methods
    }
    strata, graph = found[methods[0]].scores, found[methods[0]].graph
    sample = draw_edges(strata, graph.mask, edges, seed)
    drawn = [edge for edge, _ in sample]
    rows = []
    for edge, stratum in sample:
        name = names[edge.sequence], graph.sources[edge.source], graph.targets[edge.target]
        scores = {method: float(found[method].scores[edge]) for method in methods}
        rows.append(MeasuredEdge(*name, stratum, scores, (known or {}).get(name)))
    if progress:
        progress(rows, sum(row.exact is not None for row in rows))

    # Sequence by sequence, so that a batch holds next to no filling. The batches do not depend on
    # what is known: a run that was stopped between two of them ends in the same numbers.
    order = sorted(range(len(rows)), key=lambda index: drawn[index])
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    batches = [[index for index in batch if rows[index].exact is None] for batch in batches]
    batches = [batch for batch in batches if batch]
    baseline = ablation_means(model, sequences if batches else [], graph, ablation, batch_size)
    exact = partial(
        exact_effects,
        model,
        sequences,
        granularity=granularity,
        batch_size=batch_size,
        ablation=ablation,
        baseline=baseline,
        target=options.target,
    )
    calls = (partial(exact, [drawn[index] for index in batch]) for batch in batches)
    for batch, effects in zip(batches, in_flight(calls, model.jobs), strict=True):
        for index, effect in zip(batch, effects.tolist(), strict=True):
            rows[index] = replace(rows[index], exact=effect)
        if progress:
            progress(rows, len(batch))
    return rows
