"""Attribution: the score of every edge of the residual graph, for each sequence by itself.

A sequence is a prompt and an answer. The model is fed the prompt and all but the last token of
the answer, and every token of the answer is scored; cut the answer before, not here.

    >>> model = probe.load_model("probe:tiny-math/sft")
    >>> sequence = probe.TokenSequence(prompt=[5, 16, 4], answer=[5, 16, 4, 17])
    >>> edges = probe.attribute(model, [sequence])
    >>> edges.scores.shape
    torch.Size([1, 9, 17])
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import torch

from probe.architectures import GUIDE
from probe.batching import Batching, BatchSize
from probe.edges import Edge, EdgeScores, checked_edges
from probe.errors import ProbeError, check_count
from probe.graph import Graph
from probe.layers import exact_dtype
from probe.models import Model, as_model
from probe.registry import Registry
from probe.sequences import MAX_NEW_TOKENS, Given, TokenSequence, as_sequences
from probe.tracing import (
    FASTEST,
    Batch,
    EdgeBatch,
    MemoryMode,
    ablated_losses,
    edge_scores,
    source_sums,
)
from probe.vocabulary import Ablation, Granularity


@dataclass(frozen=True)
class Options:
    """What a method may be told; each takes what concerns it."""

    ig_steps: int = 5
    """Points of the integral of `eap-ig`; 1 is `eap`."""

    baseline: torch.Tensor | None = None
    """What an ablation leaves of each source, [source, d_model]; nothing if not given."""

    batch_size: BatchSize = "auto"
    """How many rows `exact` runs at once."""

    memory: MemoryMode = FASTEST
    """What is done for the sake of memory."""


def eap(
    model: Model, sequences: Sequence[TokenSequence], graph: Graph, options: Options
) -> EdgeBatch:
    """Edge attribution patching: -<dL/dH, O> (paper, Eq. 9)."""
    batch = make_batch(sequences)
    return edge_scores(model, batch, graph, baseline=options.baseline, memory=options.memory)


def eap_ig(
    model: Model, sequences: Sequence[TokenSequence], graph: Graph, options: Options
) -> EdgeBatch:
    """EAP with the gradient averaged on the way from the ablated to the real embedding.

    Hanna et al. 2024 (arXiv 2403.17806), "EAP-IG inputs". The scores out of `input` sum to the
    loss with a zero embedding, minus the loss, as the steps become many.
    """
    return edge_scores(
        model,
        make_batch(sequences),
        graph,
        steps=options.ig_steps,
        baseline=options.baseline,
        memory=options.memory,
    )


def relp(
    model: Model, sequences: Sequence[TokenSequence], graph: Graph, options: Options
) -> EdgeBatch:
    """Relevance patching: EAP with gradients by rules (Jafari et al. 2025, arXiv 2508.21258).

    Norms' denominators are constant, activations lines, and the gradients of products of gate
    and input halved; attention patterns keep their gradients.
    """
    return edge_scores(
        model,
        make_batch(sequences),
        graph,
        relp=True,
        baseline=options.baseline,
        memory=options.memory,
    )


def exact(
    model: Model, sequences: Sequence[TokenSequence], graph: Graph, options: Options
) -> EdgeBatch:
    """Run the model again without each edge: L(f without the edge) - L(f) (paper, Eq. 8)."""
    every = graph.mask.nonzero().tolist()
    edges = [Edge(number, *edge) for number in range(len(sequences)) for edge in every]
    first = eap(model, sequences, graph, options)
    scores = torch.zeros_like(first.scores, device="cpu")
    for part, effects in _effects(model, sequences, edges, graph, options):
        for edge, effect in zip(part, effects, strict=True):
            scores[edge] = effect
    return first._replace(scores=scores)


def one_pass(ig_steps: int) -> int:
    """A forward and backward pass for each sequence."""
    return 1


def pass_a_step(ig_steps: int) -> int:
    """A forward and backward pass for each point of the integral."""
    return ig_steps


@dataclass(frozen=True)
class Method:
    """A way to score edges: all that the package knows of it."""

    score: Callable[[Model, Sequence[TokenSequence], Graph, Options], EdgeBatch]
    """Scores a few sequences: about how much the loss grows when an edge is removed."""

    passes: Callable[[int], int] | None = one_pass
    """How many forward and backward passes a sequence takes with so many `ig_steps`; None for a
    forward pass for each edge, in batches that the method makes itself."""

    may_recompute: bool = True
    """Whether activations may be dropped and computed again in the backward pass."""

    kernels: tuple[str, ...] = ("eager", "liger")
    """What it runs with; see `probe.kernels`."""

    def steps(self, ig_steps: int) -> int:
        """How many rows a sequence has in a batch."""
        return self.passes(ig_steps) if self.passes else 1


_ROWS: dict[str, Method] = {
    "eap": Method(eap),
    "eap-ig": Method(eap_ig, passes=pass_a_step),
    "relp": Method(relp, may_recompute=False, kernels=("eager",)),
    "exact": Method(exact, passes=None),
}

METHODS = Registry("method", Method, _ROWS, takes="score")
"""Every attribution method by its name; the one place to add one."""

# A relative distance from what the model itself computes that is no rounding any more.
_LARGEST_ERROR = {torch.bfloat16: 3e-2, torch.float16: 3e-2}


def method_named(name: str) -> Method:
    """A method by its name.

    Raises:
        ProbeError: There is none of that name.
    """
    if name not in METHODS:
        raise ProbeError(f"method {name!r} is not known; one of: {', '.join(METHODS)}")
    return METHODS[name]


def attribute(
    model: Model | str | Path,
    sequences: Given,
    method: str = "eap",
    granularity: Granularity = "qkv",
    batch_size: BatchSize = "auto",
    *,
    ablation: Ablation = "zero",
    ig_steps: int = 5,
    answer: str | Sequence[str] | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    done: Collection[int] = (),
    finished: Callable[[list[int], EdgeScores], None] | None = None,
) -> EdgeScores:
    """Score every edge of the residual graph, for each sequence.

    Sequences of similar length run together; a sequence's scores do not depend on the others in
    its batch, beyond rounding.

    Args:
        model: A model from `load_model`, or its reference.
        sequences: What to attribute: a text, a pair (prompt, answer), a `TokenSequence`, or a list
            of these. A text without an answer is answered by the model, greedily.
        method: A name in `METHODS`.
        granularity: `qkv`, an attention's query, key and value apart; `block`; or `head`.
        batch_size: How many sequences (for `exact`: edges) run at once; `auto` for as many as make
            it faster and fit into memory.
        ablation: What is left of a removed output: `zero`, or its `mean` over all positions of
            these sequences.
        ig_steps: Points of the integral of `eap-ig`.
        answer: The answer to a prompt that is given as text, or one for each of several.
        max_new_tokens: The longest answer that the model writes itself.
        done: Indices of sequences that are left out; their scores stay 0.
        finished: Called with the indices of each batch's sequences and their edges, while the
            next batch is running.

    Raises:
        ProbeError: An unknown method, granularity or ablation, an empty prompt or answer, a token
            that the model does not have, a score that is not finite (the message names the
            sequence), or sources that do not sum to the residual stream.
    """
    way = method_named(method)
    check_count("ig_steps", ig_steps)
    model = as_model(model)
    if model.kernels not in way.kernels:
        raise ProbeError(
            f"{method} needs what fused kernels leave out; load the model with "
            f"{' or '.join(way.kernels)} ones"
        )
    graph = model.graph(granularity)
    sequences = as_sequences(model, sequences, answer, max_new_tokens)
    found = _Collected(model, graph, [sequence.id for sequence in sequences], finished)
    baseline = ablation_means(model, sequences, graph, ablation, batch_size)
    size = batch_size if way.passes else 1
    batching = Batching(model, graph, size, way.steps(ig_steps), way.may_recompute)

    def score(indices: list[int], memory: MemoryMode) -> EdgeBatch:
        options = Options(ig_steps, baseline, batch_size, memory)
        return way.score(model, [sequences[i] for i in indices], graph, options)

    # A batch is fetched once the next one is on its way, so that a GPU never waits for Python.
    last: tuple[list[int], EdgeBatch] | None = None
    for indices, batch in batching.run([s.length for s in sequences], score, done):
        if last:
            found.add(*last)
        last = indices, batch
    if last:
        found.add(*last)
    return found.edges


class _Collected:
    """The edges of all sequences, as batches come."""

    def __init__(
        self,
        model: Model,
        graph: Graph,
        names: list[str],
        finished: Callable[[list[int], EdgeScores], None] | None,
    ) -> None:
        """Make room for the named sequences."""
        self.model, self.names, self.finished = model, names, finished
        dtype, count = exact_dtype(model), len(names)
        scores = torch.zeros(count, *graph.mask.shape, dtype=dtype)
        losses, entropies = torch.zeros(2, count, dtype=dtype)
        self.edges = EdgeScores(scores, losses, entropies, graph, 0.0, tuple(names))

    def add(self, indices: list[int], batch: EdgeBatch) -> None:
        """Check a batch and keep it.

        Raises:
            ProbeError: A score is not finite, or the sources do not sum to the stream.
        """
        part = EdgeScores(
            batch.scores.cpu(),
            batch.losses.cpu(),
            batch.entropies.cpu(),
            self.edges.graph,
            float(batch.residual_error),
            tuple(self.names[index] for index in indices),
        )
        finite = part.scores.isfinite().all(2).all(1) & part.losses.isfinite()
        if not finite.all():
            name = self.names[indices[int((~finite).nonzero()[0])]]
            raise ProbeError(
                f"sequence {name}: its loss or a score is NaN or infinite in "
                f"{self.model.reference}; try another dtype (bfloat16 or float32 instead of "
                "float16), or check the weights"
            )
        _check_sums(self.model, batch)
        self.edges.scores[indices] = part.scores
        self.edges.losses[indices] = part.losses
        self.edges.entropies[indices] = part.entropies
        worst = max(self.edges.residual_error, part.residual_error)
        self.edges = replace(self.edges, residual_error=worst)
        if self.finished:
            self.finished(indices, part)


def exact_effects(
    model: Model | str | Path,
    sequences: Given,
    edges: Sequence[Edge],
    granularity: Granularity = "qkv",
    batch_size: BatchSize = "auto",
    progress: Callable[[int], None] | None = None,
    ablation: Ablation = "zero",
    baseline: torch.Tensor | None = None,
) -> torch.Tensor:
    """Remove each of some edges and run the model again (paper, Eq. 8).

    Args:
        model: A model from `load_model`, or its reference.
        sequences: The sequences that the edges speak of, as `attribute` takes them.
        edges: Which edges, in any order.
        granularity: That of the edges.
        batch_size: How many edges run at once, or `auto`.
        progress: Called after each batch with the number of edges in it.
        ablation: What is left of a removed output, `zero` or `mean`.
        baseline: That of these sequences, where `ablation_means` has given it already.

    Returns:
        float32 [edge] (float64 for a float64 model): L(without the edge) - L, in nats.

    Raises:
        ProbeError: As `attribute`, or an edge that the graph does not have.
    """
    model = as_model(model)
    graph = model.graph(granularity)
    model = as_model(model)
    graph = model.graph(granularity)
    sequences = as_sequences(model, sequences)
    edges = checked_edges(edges, graph, len(sequences))
    if baseline is None:
        baseline = ablation_means(model, sequences, graph, ablation, batch_size)
    index = {edge: number for number, edge in enumerate(dict.fromkeys(edges))}
    effects = torch.zeros(len(index), dtype=exact_dtype(model))
    options = Options(baseline=baseline, batch_size=batch_size)
    for part, values in _effects(model, sequences, list(index), graph, options):
        for edge, value in zip(part, values, strict=True):
            if not value.isfinite():
                raise ProbeError(
                    f"sequence {sequences[edge.sequence].id}: the loss is NaN or infinite"
                )
            effects[index[edge]] = value
        if progress:
            progress(len(part))
    return effects[[index[edge] for edge in edges]]


def _effects(
    model: Model,
    sequences: Sequence[TokenSequence],
    edges: Sequence[Edge],
    graph: Graph,
    options: Options,
) -> Iterator[tuple[list[Edge], torch.Tensor]]:
    """Exact effects batch by batch; a batch holds each of its sequences once more, whole.

    The whole sequence runs beside its ablations so that both round alike: effects are small
    differences of two losses.
    """
    order = sorted(edges)
    batching = Batching(model, graph, options.batch_size, recompute=False)

    def effects(indices: list[int], memory: MemoryMode) -> torch.Tensor:
        part = [order[index] for index in indices]
        whole = sorted({edge.sequence for edge in part})
        batch = make_batch([sequences[i] for i in (*whole, *(edge.sequence for edge in part))])
        removed = [None] * len(whole) + [(edge.source, edge.target) for edge in part]
        losses = ablated_losses(model, batch, graph, removed, options.baseline)
        before = losses[[whole.index(edge.sequence) for edge in part]]
        return losses[len(whole) :] - before

    lengths = [sequences[edge.sequence].length for edge in order]
    for indices, found in batching.run(lengths, effects):
        yield [order[index] for index in indices], found


def make_batch(sequences: Sequence[TokenSequence]) -> Batch:
    """Lay sequences side by side, filled up on the right."""
    length = max(s.length for s in sequences)
    scored = max(len(s.answer) for s in sequences)
    input_ids = torch.zeros(len(sequences), length, dtype=torch.int64)
    positions = torch.zeros(len(sequences), scored, dtype=torch.int64)
    labels = torch.full((len(sequences), scored), -100)
    for row, sequence in enumerate(sequences):
        fed = [*sequence.prompt, *sequence.answer[:-1]]
        answer = len(sequence.answer)
        input_ids[row, : len(fed)] = torch.tensor(fed)
        positions[row] = len(sequence.prompt) - 1
        positions[row, :answer] += torch.arange(answer)
        labels[row, :answer] = torch.tensor(list(sequence.answer))
    lengths = torch.tensor([sequence.length for sequence in sequences])
    return Batch(input_ids, lengths, positions, labels)


def ablation_means(
    model: Model,
    sequences: Sequence[TokenSequence],
    graph: Graph,
    ablation: Ablation,
    batch_size: BatchSize,
) -> torch.Tensor | None:
    """What an ablation leaves of each source: its mean over all positions of some sequences.

    Returns:
        [source, d_model], or None for nothing.

    Raises:
        ProbeError: An unknown ablation.
    """
    if ablation not in get_args(Ablation):
        raise ProbeError(f"ablation {ablation!r} is not known; use zero or mean")
    if ablation == "zero" or not sequences:
        return None

    def sums(indices: list[int], memory: MemoryMode) -> torch.Tensor:
        return source_sums(model, make_batch([sequences[i] for i in indices]), graph)

    lengths = [sequence.length for sequence in sequences]
    parts = Batching(model, graph, batch_size, recompute=False).run(lengths, sums)
    return torch.stack([part for _, part in parts]).sum(0) / sum(lengths)


def _check_sums(model: Model, batch: EdgeBatch) -> None:
    """Refuse a model whose row of the architecture table does not describe it."""
    largest = _LARGEST_ERROR.get(model.dtype, 1e-3)
    for error, what in (
        (float(batch.residual_error), "the sources do not sum to the residual stream"),
        (float(batch.logits_error), "the logits are not the model's own"),
    ):
        if not error <= largest:
            raise ProbeError(
                f"{model.reference}: {what} (relative error {error:.1e}; rounding is at most "
                f"{largest:g}): the row {model.config.model_type!r} of the architecture table is "
                f"wrong for this checkpoint; see {GUIDE}"
            )
