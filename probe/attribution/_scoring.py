"""Attribution: the score of every edge of the residual graph, for each sequence by itself.

A sequence is a prompt and an answer. The model is fed the prompt and all but the last token of
the answer, and every token of the answer is scored; cut the answer before, not here.

    >>> model = probe.load_model("probe:tiny-math/sft")
    >>> sequence = probe.TokenSequence(prompt=[5, 16, 4], answer=[5, 16, 4, 17])
    >>> edges = probe.attribute(model, [sequence])
    >>> edges.scores.shape
    torch.Size([1, 9, 17])
"""

import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, get_args

import torch

from probe.attribution._batching import Batching, BatchSize
from probe.attribution._edges import Edge, EdgeScores, checked_edges
from probe.attribution._methods import Method, Options, edge_effects, make_batch, method_named
from probe.attribution._row_checks import check_before, check_roles, check_row
from probe.attribution._sequences import (
    MAX_NEW_TOKENS,
    Given,
    TokenSequence,
    as_sequences,
    corrupted_beside,
)
from probe.errors import ProbeError, check_count
from probe.models import Graph, Model, as_model
from probe.tracing import (
    LOSS,
    EdgeBatch,
    MemoryMode,
    Target,
    Value,
    exact_dtype,
    send_module,
    source_sums,
)
from probe.vocabulary import Ablation, Granularity, Steps

LARGEST_GAP = 0.05
"""A share of what an integral should give that is more than a matter of a few points."""


def attribute(
    model: Model | str | Path,
    sequences: Given,
    method: str = "eap",
    granularity: Granularity = "qkv",
    batch_size: BatchSize = "auto",
    *,
    ablation: Ablation = "zero",
    ig_steps: Steps = "auto",
    target: Target | str | Value = LOSS,
    corrupted: Given | None = None,
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
        granularity: `qkv`, `block`, `head` or `expert`; see `probe.models.Graph`.
        batch_size: How many sequences (for `exact`: edges) run at once; `auto` for as many as make
            it faster and fit into memory.
        ablation: What is left of a removed output: `zero`, or its `mean` over all positions of
            these sequences.
        ig_steps: Points of the integral of `eap-ig`, on the way from what an ablation leaves of the
            embedding. `auto`: 60; with zero ablation, the way then begins at the mean of a
            sequence's own embeddings, and that is what an edge out of `input` leaves.
        target: What is differentiated: a name in `probe.tracing.TARGETS`, a `Target`, or a function
            of logits [token, vocabulary] and labels [token] that gives a value for each token.
        corrupted: A text beside each sequence with a prompt as long as its own. A removed output
            then leaves what its source writes there, position by position. The answer is that of
            the sequence where it has none itself.
        answer: The answer to a prompt that is given as text, or one for each of several.
        max_new_tokens: The longest answer that the model writes itself.
        done: Indices of sequences that are left out; their scores stay 0.
        finished: Called with the indices of each batch's sequences and their edges, while the
            next batch is running.

    Raises:
        ProbeError: An unknown method, granularity or ablation, an empty prompt or answer, a token
            that the model does not have, a score that is not finite (the message names the
            sequence), sources that do not sum to the residual stream, corrupted texts of another
            length, or a target without a slope.
    """
    way, target = method_named(method), Target.of(target)
    model = as_model(model)
    check_method(model, method, way, ig_steps)
    graph = model.graph(granularity)
    check_roles(model, graph)
    sequences = as_sequences(model, sequences, answer, max_new_tokens)
    texts = _corrupted(model, corrupted, sequences, ablation)
    check_target(model, target, sequences, way, ig_steps)
    steps = way.steps(ig_steps)
    found = _Collected(model, graph, [s.id for s in sequences], finished, integrated=steps > 1)
    baseline = ablation_means(model, sequences, graph, ablation, batch_size)
    rows = steps + (steps > 1 or texts is not None)
    batching = Batching(model, graph, batch_size if way.passes else 1, rows, way.may_recompute)
    lengths = [sequence.length for sequence in sequences]
    unchecked = {graph.granularity} - model.readings_known  # until one batch has been

    def score(indices: list[int], memory: MemoryMode) -> EdgeBatch:
        references = target.beside(indices, [len(sequences[i].answer) for i in indices])
        beside = None if texts is None else [texts[i] for i in indices]
        parts = (ig_steps, baseline, batch_size, memory, target, references, beside)
        options = Options(*parts, check=bool(unchecked), record=batching.recording)
        batch = way.score(model, [sequences[i] for i in indices], graph, options)
        unchecked.clear()  # not before: one that did not fit into memory comes again
        return batch

    found.add_all(batching.run(lengths, score, done))
    found.warn(method, steps, zero=ig_steps != "auto" and baseline is None and texts is None)
    return found.edges


class _Collected:
    """The edges of all sequences, as batches come."""

    def __init__(
        self,
        model: Model,
        graph: Graph,
        names: list[str],
        finished: Callable[[list[int], EdgeScores], None] | None,
        integrated: bool,
    ) -> None:
        """Make room for the named sequences."""
        self.model, self.names, self.finished = model, names, finished
        dtype, count = exact_dtype(model), len(names)
        scores = torch.zeros(count, *graph.mask.shape, dtype=dtype)
        losses, entropies, values, gaps = torch.zeros(4, count, dtype=dtype)
        self.edges = EdgeScores(
            scores,
            losses,
            entropies,
            graph,
            0.0,
            tuple(names),
            values,
            gaps if integrated else None,
        )

    def add_all(self, batches: Iterable[tuple[list[int], EdgeBatch]]) -> None:
        """Take batches as they come.

        One is looked at once the next is on its way, so that a GPU never waits for Python.
        """
        last: tuple[list[int], _Home] | None = None
        for indices, batch in batches:
            home = _Home.sent(batch)
            if last:
                self.add(*last)
            last = indices, home
        if last:
            self.add(*last)

    def add(self, indices: list[int], home: "_Home") -> None:
        """Check a batch and keep it.

        Raises:
            ProbeError: A score is not finite, or the sources do not sum to the stream.
        """
        batch, finite = home.arrived()
        part = EdgeScores(
            batch.scores,
            batch.losses,
            batch.entropies,
            self.edges.graph,
            float(batch.residual_error),
            tuple(self.names[index] for index in indices),
            batch.values,
            None if self.edges.gaps is None else _gaps(batch),
        )
        if not finite.all():
            name = self.names[indices[int((~finite).nonzero()[0])]]
            raise ProbeError(
                f"sequence {name}: its loss or a score is NaN or infinite in "
                f"{self.model.reference}; try another dtype (bfloat16 or float32 instead of "
                "float16), or check the weights"
            )
        check_row(self.model, self.edges.graph, batch)
        self.edges.scores[indices] = part.scores
        self.edges.losses[indices] = part.losses
        self.edges.entropies[indices] = part.entropies
        self.edges.values[indices] = part.values
        if self.edges.gaps is not None and part.gaps is not None:
            self.edges.gaps[indices] = part.gaps
        worst = max(self.edges.residual_error, part.residual_error)
        self.edges = replace(self.edges, residual_error=worst)
        if self.finished:
            self.finished(indices, part)

    def warn(self, method: str, steps: int, zero: bool) -> None:
        """Say so where an integral is far from what it should be."""
        gap = self.edges.completeness_gap
        if gap > LARGEST_GAP:
            what = "leave ig_steps at auto, or take ablation mean" if zero else "take more ig_steps"
            warnings.warn(
                f"{method}: {steps} steps miss {gap:.0%} of what the integral should give; {what}",
                stacklevel=3,
            )


class _Home(NamedTuple):
    """A batch on its way to the CPU."""

    batch: EdgeBatch
    """It, once it has arrived."""

    finite: torch.Tensor
    """bool [sequence]: whether all scores are."""

    arrivals: list[torch.cuda.Event]
    """When it has arrived from each GPU."""

    @classmethod
    def sent(cls, batch: EdgeBatch) -> "_Home":
        """Send a batch, right behind what computes it and before what is computed next."""
        parts = [*batch, batch.scores.isfinite().flatten(1).all(1)]
        *home, finite = (part.to("cpu", non_blocking=True) for part in parts)
        arrivals = []
        for device in {part.device for part in parts if part.is_cuda}:
            arrivals.append(torch.cuda.Event())
            arrivals[-1].record(torch.cuda.current_stream(device))
        return cls(EdgeBatch(*home), finite, arrivals)

    def arrived(self) -> tuple[EdgeBatch, torch.Tensor]:
        """Wait for it: the batch, and bool [sequence]: whether all that counts is finite."""
        for arrival in self.arrivals:
            arrival.synchronize()
        batch = self.batch
        return batch, self.finite & batch.losses.isfinite() & batch.values.isfinite()


def _gaps(batch: EdgeBatch) -> torch.Tensor:
    """What the edges out of the input give more than the target's difference: [sequence]."""
    return batch.scores[:, 0].sum(1) - (batch.ablated_values - batch.values)


def _corrupted(
    model: Model, given: Given | None, sequences: Sequence[TokenSequence], ablation: Ablation
) -> list[TokenSequence] | None:
    """The corrupted texts, checked."""
    if given is None:
        return None
    if ablation != "zero":
        raise ProbeError(f"give corrupted texts or ablation {ablation}, not both")
    return corrupted_beside(model, given, sequences)


def check_method(model: Model, name: str, way: Method, ig_steps: Steps) -> None:
    """Check that a method runs with a model's kernels, and with its blocks, in so many steps."""
    if ig_steps != "auto":
        check_count("ig_steps", ig_steps, " or auto")
    mixers = [here.attention for here in model.blocks if here.attention and not here.splits]
    if way.rules and (mixers or not model.architecture.relp):
        what = mixers[0] if mixers else "blocks"
        raise ProbeError(
            f"{name} has no rules for the {what} of {model.config.model_type}; use another method"
        )
    if model.kernels not in way.kernels:
        raise ProbeError(
            f"{name} needs what fused kernels leave out; load the model with "
            f"{' or '.join(way.kernels)} ones"
        )


def check_target(
    model: Model, target: Target, sequences: Sequence[TokenSequence], way: Method, ig_steps: Steps
) -> None:
    """Check that a target fits the sequences, and that a method can take it."""
    if target.compares_itself and way.passes and way.steps(ig_steps) == 1:
        raise ProbeError(
            f"{target.name} to what the model itself says has no slope there; give a reference, or "
            "use a method that integrates or removes edges (eap-ig, exact)"
        )
    if target.temperatures is not None and len(target.temperatures) != len(sequences):
        raise ProbeError(
            f"{len(target.temperatures)} temperatures do not fit {len(sequences)} sequences"
        )
    if target.reference is not None:
        shapes = [tuple(part.shape) for part in target.reference]
        wanted = [(len(s.answer), int(model.config.vocab_size)) for s in sequences]
        if shapes != wanted:
            raise ProbeError(
                "a reference needs log probabilities [answer token, vocabulary] for each sequence: "
                f"{wanted[:3]}..., not {shapes[:3]}..."
            )
    if model.deployment is not None and not target.function.__module__.startswith("probe."):
        send_module(target.function.__module__)


def exact_effects(
    model: Model | str | Path,
    sequences: Given,
    edges: Sequence[Edge],
    granularity: Granularity = "qkv",
    batch_size: BatchSize = "auto",
    progress: Callable[[int], None] | None = None,
    ablation: Ablation = "zero",
    baseline: torch.Tensor | None = None,
    target: Target | str | Value = LOSS,
    corrupted: Given | None = None,
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
        target: L, as `attribute` takes it.
        corrupted: As `attribute` takes it.

    Returns:
        float32 [edge] (float64 for a float64 model): L(without the edge) - L, in nats or in what
        the target is in.

    Raises:
        ProbeError: As `attribute`, or an edge that the graph does not have.
    """
    model = as_model(model)
    graph = model.graph(granularity)
    sequences = as_sequences(model, sequences)
    edges, target = checked_edges(edges, graph, len(sequences)), Target.of(target)
    texts = _corrupted(model, corrupted, sequences, ablation)
    check_target(model, target, sequences, method_named("exact"), 1)
    check_before(model, graph, sequences)
    if baseline is None:
        baseline = ablation_means(model, sequences, graph, ablation, batch_size)
    index = {edge: number for number, edge in enumerate(dict.fromkeys(edges))}
    effects = torch.zeros(len(index), dtype=exact_dtype(model))
    options = Options(
        baseline=baseline,
        batch_size=batch_size,
        target=target,
        references=target.beside(range(len(sequences)), [len(s.answer) for s in sequences]),
        corrupted=texts,
    )
    for part, values in edge_effects(model, sequences, list(index), graph, options):
        for edge, value in zip(part, values, strict=True):
            if not value.isfinite():
                raise ProbeError(
                    f"sequence {sequences[edge.sequence].id}: the loss is NaN or infinite"
                )
            effects[index[edge]] = value
        if progress:
            progress(len(part))
    return effects[[index[edge] for edge in edges]]


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
