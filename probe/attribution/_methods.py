"""Methods: the ways to score edges, one row each.

>>> METHODS["eap-ig"].passes(5)
5
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from probe.attribution._batching import Batching, BatchSize
from probe.attribution._edges import Edge
from probe.attribution._sequences import TokenSequence
from probe.errors import ProbeError, not_known
from probe.models import Graph, Model
from probe.registry import Registry
from probe.tracing import (
    AUTO_STEPS,
    FASTEST,
    HERE,
    LOSS,
    Batch,
    EdgeBatch,
    MemoryMode,
    Path,
    Target,
    ablated_values,
    edge_scores,
    edge_scores_again,
    even,
    from_zero,
)
from probe.vocabulary import Steps


@dataclass(frozen=True)
class Options:
    """What a method may be told; each takes what concerns it."""

    ig_steps: Steps = "auto"
    """Points of the integral of `eap-ig`; 1 is `eap`."""

    baseline: torch.Tensor | None = None
    """What an ablation leaves of each source, [source, d_model]; nothing if not given."""

    batch_size: BatchSize = "auto"
    """How many rows `exact` runs at once."""

    memory: MemoryMode = FASTEST
    """What is done for the sake of memory."""

    target: Target = LOSS
    """What is differentiated."""

    references: Sequence[torch.Tensor] | None = None
    """What the target compares with, [scored, vocabulary] for each sequence."""

    corrupted: Sequence[TokenSequence] | None = None
    """A text beside each sequence, as long as it, whose activations an ablation leaves."""

    check: bool = True
    """Whether to compare what branches read with what the graph says."""

    positions: bool = False
    """Whether scores are position by position."""

    record: bool = False
    """Whether a pass may be recorded on a GPU, and its memory stay taken."""


def eap(
    model: Model, sequences: Sequence[TokenSequence], graph: Graph, options: Options
) -> EdgeBatch:
    """Edge attribution patching: -<dL/dH, O> (paper, Eq. 9)."""
    return _gradients(model, sequences, graph, options)


def eap_ig(
    model: Model, sequences: Sequence[TokenSequence], graph: Graph, options: Options
) -> EdgeBatch:
    """EAP with the gradient integrated on the way from the ablated to the real embedding.

    Hanna et al. 2024 (arXiv 2403.17806), "EAP-IG inputs". The scores out of `input` sum to the
    target with an ablated embedding, minus the target, as the steps become many. How near they
    came is told with them. From a zero embedding they hardly come near (`from_zero`), so where the
    number of steps is not said either, the way begins at the mean of a sequence's own embeddings,
    and that is what is left of `input`.
    """
    steps, zero = steps_of(options.ig_steps), options.baseline is None and options.corrupted is None
    if zero and options.ig_steps == "auto":
        path = even(steps)._replace(from_mean=True)
    else:
        path = (from_zero if zero else even)(steps)
    return _gradients(model, sequences, graph, options, path)


def steps_of(ig_steps: Steps) -> int:
    """How many points an integral has."""
    return AUTO_STEPS if ig_steps == "auto" else ig_steps


def relp(
    model: Model, sequences: Sequence[TokenSequence], graph: Graph, options: Options
) -> EdgeBatch:
    """Relevance patching: EAP with gradients by rules (Jafari et al. 2025, arXiv 2508.21258).

    Norms' denominators are constant, activations lines, and the gradients of products of gate
    and input halved; attention patterns keep their gradients.
    """
    return _gradients(model, sequences, graph, options, relp=True)


def _gradients(
    model: Model,
    sequences: Sequence[TokenSequence],
    graph: Graph,
    options: Options,
    path: Path = HERE,
    relp: bool = False,
) -> EdgeBatch:
    """Scores from gradients, as `edge_scores` says."""
    batch = make_batch(sequences, options.corrupted, options.references)
    before = (path, relp, options.baseline)
    behind = (options.target, options.check, options.positions)
    if options.record:
        return edge_scores_again(model, batch, graph, *before, *behind)
    return edge_scores(model, batch, graph, *before, options.memory, *behind)


def exact(
    model: Model, sequences: Sequence[TokenSequence], graph: Graph, options: Options
) -> EdgeBatch:
    """Run the model again without each edge: L(f without the edge) - L(f) (paper, Eq. 8)."""
    every = graph.mask.nonzero().tolist()
    edges = [Edge(number, *edge) for number in range(len(sequences)) for edge in every]
    first = eap(model, sequences, graph, options)
    scores = torch.zeros_like(first.scores, device="cpu")
    for part, effects in edge_effects(model, sequences, edges, graph, options):
        for edge, effect in zip(part, effects, strict=True):
            scores[edge] = effect
    return first._replace(scores=scores)


def one_pass(ig_steps: Steps) -> int:
    """A forward and backward pass for each sequence."""
    return 1


def pass_a_step(ig_steps: Steps) -> int:
    """A forward and backward pass for each point of the integral."""
    return steps_of(ig_steps)


@dataclass(frozen=True)
class Method:
    """A way to score edges: all that the package knows of it."""

    score: Callable[[Model, Sequence[TokenSequence], Graph, Options], EdgeBatch]
    """Scores a few sequences: about how much the target grows when an edge is removed."""

    passes: Callable[[Steps], int] | None = one_pass
    """How many forward and backward passes a sequence takes with so many `ig_steps`; None for a
    forward pass for each edge, in batches that the method makes itself."""

    may_recompute: bool = True
    """Whether activations may be dropped and computed again in the backward pass."""

    rules: bool = False
    """Whether it follows rules of its own inside blocks, which not every architecture has."""

    kernels: tuple[str, ...] = ("eager", "liger")
    """What it runs with; see `probe.models`."""

    def steps(self, ig_steps: Steps) -> int:
        """How many rows a sequence has in a batch."""
        return self.passes(ig_steps) if self.passes else 1


_ROWS: dict[str, Method] = {
    "eap": Method(eap),
    "eap-ig": Method(eap_ig, passes=pass_a_step),
    "relp": Method(relp, may_recompute=False, rules=True, kernels=("eager",)),
    "exact": Method(exact, passes=None),
}

METHODS = Registry("method", Method, _ROWS, takes="score")
"""Every attribution method by its name; the one place to add one."""


def method_named(name: str) -> Method:
    """A method by its name.

    Raises:
        ProbeError: There is none of that name.
    """
    if name not in METHODS:
        raise ProbeError(not_known("method", name, METHODS))
    return METHODS[name]


def edge_effects(
    model: Model,
    sequences: Sequence[TokenSequence],
    edges: Sequence[Edge],
    graph: Graph,
    options: Options,
) -> Iterator[tuple[list[Edge], torch.Tensor]]:
    """Exact effects batch by batch; a batch holds each of its sequences once more, whole.

    The whole sequence runs beside its ablations so that both round alike: effects are small
    differences of two values. What lies before the first target of a batch is the whole sequence's
    in all its rows; where these are all of one sequence, it runs in one.
    """
    order = sorted(edges, key=lambda edge: (edge.sequence, edge.target, edge.source))
    batching = Batching(model, graph, options.batch_size, recompute=False)

    def effects(indices: list[int], memory: MemoryMode) -> torch.Tensor:
        part = [order[index] for index in sorted(indices)]
        whole = sorted({edge.sequence for edge in part})
        rows = [*whole, *(edge.sequence for edge in part)]
        removed = [None] * len(whole) + [(edge.source, edge.target) for edge in part]
        texts, beside = [sequences[i] for i in rows], []
        wholes = [whole.index(i) for i in rows]
        if options.corrupted is not None:
            # Their corrupted texts come last, once each.
            beside = [len(rows) + row for row in wholes]
            texts += [options.corrupted[i] for i in whole]
            removed += [None] * len(whole)
            wholes += range(len(whole))
        elif len(whole) == 1:
            texts = texts[:1]
        found = options.references
        first = wholes[: len(texts)]
        references = None if found is None else [found[whole[row]] for row in first]
        batch = make_batch(texts, references=references)
        values = ablated_values(
            model, batch, graph, removed, options.baseline, options.target, wholes, beside
        )[: len(rows)]
        before = values[wholes[len(whole) : len(rows)]]
        return values[len(whole) :] - before

    lengths = [sequences[edge.sequence].length for edge in order]
    for indices, found in batching.run(lengths, effects):
        yield [order[index] for index in sorted(indices)], found


def make_batch(
    sequences: Sequence[TokenSequence],
    corrupted: Sequence[TokenSequence] | None = None,
    references: Sequence[torch.Tensor] | None = None,
) -> Batch:
    """Lay sequences side by side, filled up on the right.

    Args:
        sequences: The sequences.
        corrupted: A text beside each, as long as it.
        references: Log probabilities beside each, [scored, vocabulary].
    """
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
    beside = reference = None
    if corrupted is not None:
        beside = torch.zeros_like(input_ids)
        for row, text in enumerate(corrupted):
            beside[row, : text.length] = torch.tensor([*text.prompt, *text.answer[:-1]])
    if references is not None:
        reference = torch.nn.utils.rnn.pad_sequence(list(references), batch_first=True)
    return Batch(input_ids, lengths, positions, labels, beside, reference)
