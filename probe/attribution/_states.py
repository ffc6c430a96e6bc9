"""States: how alike two models are inside, and what they say next, on the very same text.

Both models read the same prompts and answers. At every position where an answer's token is
predicted there are three numbers:

- the divergence of the next token, KL(after || before), in nats;
- the cosine of both residual streams, before each layer and at the end;
- linear CKA of both, which does not mind a rotation (Kornblith et al. 2019, arXiv 1905.00414). With
  fewer positions than dimensions the plain one is near 1 for any two models; this one takes the
  unbiased estimator (Nguyen, Raghu and Kornblith 2021, arXiv 2010.15327, Eq. 3).

    >>> found = compare_states(before, after, sequences)
    >>> len(found.cosines) == before.n_layers + 1
    True
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from probe.attribution._batching import ENOUGH_TOKENS, BatchSize
from probe.attribution._methods import make_batch
from probe.attribution._sequences import TokenSequence
from probe.models import Model
from probe.tracing import states

POSITIONS = 1000
"""Of how many positions CKA is computed, at most: its cost grows with their square."""

# A batch may have so many log probabilities, 4 bytes each on either model.
_LOGITS = 2**27


@dataclass(frozen=True)
class StateComparison:
    """Two models on the same text."""

    divergences: list[list[float]]
    """KL(after || before) of each scored token, in nats, by sequence."""

    cosines: list[float]
    """Mean cosine of both residual streams at each point, over all scored positions."""

    cka: list[float | None]
    """Unbiased linear CKA at each point; None where it is not defined."""

    positions: int
    """How many positions CKA is computed from."""


def compare_states(
    before: Model,
    after: Model,
    sequences: Sequence[TokenSequence],
    batch_size: BatchSize = "auto",
    progress: Callable[[int], None] | None = None,
) -> StateComparison:
    """Let both models read the same sequences, and compare them.

    Args:
        before: The model before.
        after: The model after, of the same shape.
        sequences: What both read.
        batch_size: How many sequences run at once, at most; `auto` for as many as are good.
        progress: Called with the number of sequences that are done, after each batch.
    """
    vocabulary = min(int(model.config.vocab_size) for model in (before, after))
    chosen = _positions([len(sequence.answer) for sequence in sequences])
    divergences, cosines = [], []
    streams: list[list[torch.Tensor]] = [[], []]
    start = 0
    while start < len(sequences):
        longest = max(len(s.prompt) + len(s.answer) for s in sequences[start:])
        size = ENOUGH_TOKENS[before.device.type] // longest if batch_size == "auto" else batch_size
        room = _LOGITS // (vocabulary * max(len(s.answer) for s in sequences[start:]))
        part = sequences[start : start + max(1, min(size, room))]
        part = _alike(part, before.turning_point or after.turning_point)
        batch = make_batch(part)
        old, new = (states(model, batch, vocabulary) for model in (before, after))
        new = type(new)(*(tensor.to(before.device) for tensor in new))
        token = divergence(new.log_probabilities, old.log_probabilities)
        alike = torch.cosine_similarity(new.residuals, old.residuals, dim=-1)
        for row, sequence in enumerate(part):
            length = len(sequence.answer)
            divergences.append(token[row, :length].tolist())
            cosines.append(alike[:, row, :length].cpu())
            for stream, side in zip(streams, (old, new), strict=True):
                stream.append(side.residuals[:, row, chosen[start + row]].float().cpu())
        start += len(part)
        if progress:
            progress(len(part))
    left, right = (torch.cat(stream, 1) for stream in streams)
    return StateComparison(
        divergences,
        torch.cat(cosines, 1).double().mean(1).tolist(),
        [linear_cka(*pair) for pair in zip(left, right, strict=True)],
        left.shape[1],
    )


def divergence(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """KL(new || old) in nats, [...], of log probabilities [..., token]."""
    return (new.exp() * (new - old)).sum(-1)


def linear_cka(left: torch.Tensor, right: torch.Tensor) -> float | None:
    """Unbiased linear CKA of two representations of the same positions.

    Args:
        left: [position, dimension].
        right: [position, dimension]; the dimensions may differ in number.

    Returns:
        None for fewer than four positions, or where one side has no structure at all.
    """
    if len(left) < 4:
        return None
    grams = [side.double() - side.double().mean(0) for side in (left, right)]
    one, other = (gram @ gram.T for gram in grams)
    own = _hsic(one, one) * _hsic(other, other)
    return float(_hsic(one, other) / own.sqrt()) if own > 0 else None


def _hsic(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The unbiased estimator of the Hilbert-Schmidt independence criterion."""
    n = len(one)
    one, other = (gram - gram.diag().diag() for gram in (one, other))
    sums = one.sum(0), other.sum(0)
    whole = (one * other).sum() + sums[0].sum() * sums[1].sum() / ((n - 1) * (n - 2))
    return (whole - 2 * (sums[0] @ sums[1]) / (n - 2)) / (n * (n - 3))


def _alike(sequences: Sequence[TokenSequence], point: int | None) -> Sequence[TokenSequence]:
    """Those at the start that lie on one side of the length at which a model becomes another."""
    if point is None:
        return sequences
    sides = [len(s.prompt) + len(s.answer) - 1 > point for s in sequences]
    return sequences[: next((n for n, side in enumerate(sides) if side != sides[0]), len(sides))]


def _positions(lengths: Sequence[int]) -> list[list[int]]:
    """Which scored positions of each sequence CKA takes: as many of each, spread out evenly."""
    most = max(1, POSITIONS // max(1, len(lengths)))
    return [
        [place * length // min(most, length) for place in range(min(most, length))]
        for length in lengths
    ]
