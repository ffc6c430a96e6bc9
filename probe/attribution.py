"""Attribution: the score of every edge of the residual graph, for each sequence by itself.

A sequence is a prompt and an answer. The model is fed the prompt and all but the last token of
the answer, and every token of the answer is scored; cut the answer before, not here.

    >>> model = probe.load_model("probe:tiny-math/sft")
    >>> edges = probe.attribute(model, [probe.Sequence(prompt=[5, 16, 4], answer=[5, 16, 4, 17])])
    >>> edges.scores.shape
    torch.Size([1, 9, 17])
"""

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

import torch

from probe.errors import ProbeError
from probe.graph import Granularity, Graph
from probe.models import Model
from probe.tracing import Batch, edge_scores


class Sequence(NamedTuple):
    """One text to attribute, as token ids."""

    prompt: SequenceOf[int]
    """What the model is given; at least one token."""

    answer: SequenceOf[int]
    """What is scored; at least one token."""

    id: str = ""
    """A name for messages; its place in the list where empty."""


class EdgeScores(NamedTuple):
    """The edges of several sequences."""

    scores: torch.Tensor
    """float32 [sequence, source, target] (float64 for a float64 model); 0 where no edge is."""

    losses: torch.Tensor
    """float32 [sequence]: mean negative log-likelihood of the answer tokens, in nats."""

    graph: Graph
    """Which row and column is which node."""


Method = Callable[[Model, Batch, Graph], tuple[torch.Tensor, torch.Tensor]]
"""Scores [sequence, source, target] and losses [sequence] of one batch."""

METHODS: dict[str, Method] = {"eap": edge_scores}
"""Every attribution method by its name; the one place to add one."""


def attribute(
    model: Model,
    sequences: SequenceOf[Sequence],
    method: str = "eap",
    granularity: Granularity = "qkv",
    batch_size: int = 8,
    progress: Callable[[int], None] | None = None,
) -> EdgeScores:
    """Score every edge of the residual graph, for each sequence.

    Sequences of similar length run together; a sequence's scores do not depend on the others in
    its batch, beyond rounding.

    Args:
        model: A model from `load_model`.
        sequences: What to attribute.
        method: A name in `METHODS`.
        granularity: `qkv`, an attention's query, key and value apart, or `block`.
        batch_size: How many sequences run at once.
        progress: Called after each batch with the number of sequences in it.

    Raises:
        ProbeError: An unknown method or granularity, an empty prompt or answer, a token that the
            model does not have, or a score that is not finite (the message names the sequence).
    """
    if method not in METHODS:
        raise ProbeError(f"method {method!r} is not known; one of: {', '.join(METHODS)}")
    if batch_size < 1:
        raise ProbeError(f"batch_size is {batch_size}; it must be at least 1")
    graph = Graph.build(model.n_layers, granularity)
    names = [str(s.id) or str(place) for place, s in enumerate(sequences)]
    for name, sequence in zip(names, sequences, strict=True):
        _check(name, sequence, int(model.config.vocab_size))

    exact = torch.promote_types(model.dtype, torch.float32)
    scores = torch.zeros(len(sequences), len(graph.sources), len(graph.targets), dtype=exact)
    losses = torch.zeros(len(sequences), dtype=exact)
    # The longest first: if memory does not suffice, that shows at once.
    order = sorted(range(len(sequences)), key=lambda i: -_length(sequences[i]))
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        part, loss = METHODS[method](model, make_batch([sequences[i] for i in places]), graph)
        finite = part.isfinite().all(2).all(1) & loss.isfinite()
        if not finite.all():
            name = names[places[int((~finite).nonzero()[0])]]
            raise ProbeError(
                f"sequence {name}: its loss or a score is NaN or infinite in {model.reference}; "
                "try another dtype (bfloat16 or float32 instead of float16), or check the weights"
            )
        scores[places], losses[places] = part, loss
        if progress:
            progress(len(places))
    return EdgeScores(scores, losses, graph)


def make_batch(sequences: SequenceOf[Sequence]) -> Batch:
    """Lay sequences side by side, filled up on the right."""
    length = max(_length(s) for s in sequences)
    scored = max(len(s.answer) for s in sequences)
    input_ids = torch.zeros(len(sequences), length, dtype=torch.int64)
    positions = torch.zeros(len(sequences), scored, dtype=torch.int64)
    labels = torch.full((len(sequences), scored), -100)
    for place, sequence in enumerate(sequences):
        fed = [*sequence.prompt, *sequence.answer[:-1]]
        answer = len(sequence.answer)
        input_ids[place, : len(fed)] = torch.tensor(fed)
        positions[place] = len(sequence.prompt) - 1
        positions[place, :answer] += torch.arange(answer)
        labels[place, :answer] = torch.tensor(list(sequence.answer))
    return Batch(input_ids, positions, labels)


def _length(sequence: Sequence) -> int:
    return len(sequence.prompt) + len(sequence.answer) - 1


def _check(name: str, sequence: Sequence, vocabulary: int) -> None:
    if not sequence.prompt or not sequence.answer:
        part = "answer" if sequence.prompt else "prompt"
        raise ProbeError(f"sequence {name}: the {part} is empty; it needs at least one token")
    for token in (*sequence.prompt, *sequence.answer):
        if not 0 <= token < vocabulary:
            raise ProbeError(
                f"sequence {name}: token {token} is outside the model's vocabulary "
                f"(0 to {vocabulary - 1})"
            )
