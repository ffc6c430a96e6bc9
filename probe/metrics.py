"""Metrics of a set of edge matrices, one number each (paper, section 4.2).

Every metric takes scores [sequence, source, target] and, as `mask`, the real edges. Without a mask
it runs over the dense matrix, structural zeros included: that is the paper's convention, whose
means run over n_o * n_i entries. With `Graph.mask` it runs over real edges only. One more metric,
`token_entropy`, is of what a model predicts.

    >>> activation_intensity(torch.tensor([[[1.0, -3.0], [0.0, 2.0]]]))
    1.5
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from probe.errors import ProbeError
from probe.vocabulary import BINS

EPS = 1e-10


Array = npt.NDArray[np.float64]


def activation_intensity(scores: torch.Tensor, mask: torch.Tensor | None = None) -> float:
    """Mean of |W| over sequences and entries (Eq. 14)."""
    return float(intensities(scores, mask).mean())


def intensities(scores: torch.Tensor, mask: torch.Tensor | None = None) -> Array:
    """Mean of |W| of each sequence; their mean is the activation intensity."""
    return strengths(scores, mask).mean(1)


def information_complexity(
    scores: torch.Tensor, mask: torch.Tensor | None = None, *, bins: int = BINS, eps: float = EPS
) -> float:
    """Shannon entropy, in nats, of the histogram of |W|, all sequences pooled (Eq. 15).

    The histogram has `bins` equal bins from 0 to the largest |W|; p log(p + eps) is summed. Bins
    and eps are not published: compare values of this metric only under the same `bins`.
    """
    return _histogram_entropy(strengths(scores, mask), bins, eps)


def strengths(scores: torch.Tensor, mask: torch.Tensor | None = None) -> Array:
    """Every |W| of each sequence: what information complexity makes a histogram of."""
    return np.abs(_entries(scores, mask))


def distribution_kurtosis(scores: torch.Tensor, mask: torch.Tensor | None = None) -> float:
    """Excess kurtosis of each sequence's entries, averaged over sequences (Eq. 16).

    Population moments. NaN if a sequence's entries are all equal.
    """
    return float(kurtoses(scores, mask).mean())


def kurtoses(scores: torch.Tensor, mask: torch.Tensor | None = None) -> Array:
    """Excess kurtosis of each sequence's entries; their mean is the distribution kurtosis."""
    entries = _entries(scores, mask)
    centred = entries - entries.mean(1, keepdims=True)
    variance = (centred**2).mean(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (centred**4).mean(1) / variance**2 - 3


def sample_diversity(scores: torch.Tensor, mask: torch.Tensor | None = None) -> float:
    """1 - Pearson correlation of two sequences' matrices, averaged over all pairs (Fig. 3a).

    NaN for fewer than two sequences.
    """
    if len(scores) == 1:
        return float("nan")
    between = distances(scores, mask)
    return float(between[np.triu_indices(len(between), k=1)].mean())


def distances(scores: torch.Tensor, mask: torch.Tensor | None = None) -> Array:
    """1 - Pearson correlation [sequence, sequence]; the pairs' mean is the sample diversity."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return 1 - np.atleast_2d(np.corrcoef(_entries(scores, mask)))


def output_entropy(
    scores: torch.Tensor, mask: torch.Tensor | None = None, *, bins: int = BINS, eps: float = EPS
) -> float:
    """Information complexity of the edges into the final node alone (Fig. 3b).

    The paper gives no formula. This one is the reading under which its values (about 0.01, and
    rises of several hundred percent) are possible: with few edges pooled over sequences, one bin
    holds nearly all. Every edge into `logits` is real, so the mask changes nothing.
    """
    return _histogram_entropy(output_strengths(scores, mask), bins, eps)


def output_strengths(scores: torch.Tensor, mask: torch.Tensor | None = None) -> Array:
    """Every |W| into the final node: what output entropy makes a histogram of."""
    del mask
    return strengths(scores[..., -1:])


def token_entropy(entropies: torch.Tensor) -> float:
    """Mean entropy of the next-token distribution at the scored tokens: Fig. 3b's other reading.

    Args:
        entropies: `EdgeScores.entropies`, [sequence], in nats.
    """
    return float(token_entropies(entropies).mean())


def token_entropies(entropies: torch.Tensor) -> Array:
    """The predictive token entropy of each sequence; their mean is the token entropy."""
    return entropies.detach().cpu().double().numpy()


def entropy(counts: Array, eps: float = EPS) -> Array:
    """Shannon entropy, in nats, of histograms [..., bin]: what both entropies end with."""
    shares = counts / counts.sum(-1, keepdims=True)
    return -(shares * np.log(shares + eps)).sum(-1)


Parts = Callable[[torch.Tensor], Array]


class Metric(NamedTuple):
    """A metric as the report knows it."""

    function: Callable[..., float]
    """`function(scores, mask)`; those of a histogram also take `bins`."""

    label: str
    """Its name in tables; the paper's where it has one."""

    direction: Literal["up", "down"] | None = None
    """How the paper reports that online RL moves it; None where it has no such metric."""

    histogram: bool = False
    """Whether it takes `bins`."""

    per_sample: Parts | None = None
    """For a mean over sequences: its value of each, [sequence]."""

    pooled: Parts | None = None
    """For the entropy of a histogram: what it counts, not negative, [sequence, entry]."""

    pairwise: Parts | None = None
    """For a mean over pairs of sequences: its value of each pair, [sequence, sequence]."""


METRICS: dict[str, Metric] = {
    "activation_intensity": Metric(
        activation_intensity, "Act.Intens.", "up", per_sample=intensities
    ),
    "information_complexity": Metric(
        information_complexity, "Info.Complex.", "up", histogram=True, pooled=strengths
    ),
    "distribution_kurtosis": Metric(
        distribution_kurtosis, "Dist.Kurt.", "down", per_sample=kurtoses
    ),
    "sample_diversity": Metric(sample_diversity, "Diversity", "up", pairwise=distances),
    "output_entropy": Metric(
        output_entropy, "Out.Entropy", "up", histogram=True, pooled=output_strengths
    ),
}
"""Every metric by its name, in the order of the report; the one place to add one. With one of
`per_sample`, `pooled` and `pairwise`, `probe.statistics` is fast; without, it is right but slow."""


TOKEN_METRICS: dict[str, Metric] = {
    "token_entropy": Metric(token_entropy, "Tok.Entropy", "up", per_sample=token_entropies),
}
"""Metrics of what a model predicts instead of its edges; `function(entropies)`."""


def metric_named(name: str) -> Metric:
    """A metric of either kind.

    Raises:
        ProbeError: There is no metric of that name.
    """
    known = METRICS | TOKEN_METRICS
    if name not in known:
        raise ProbeError(f"metric {name!r} is not known; one of: {', '.join(known)}")
    return known[name]


def compute_metric(
    name: str, scores: torch.Tensor, mask: torch.Tensor | None = None, *, bins: int = BINS
) -> float:
    """Compute a metric of edges by its name.

    Raises:
        ProbeError: There is no metric of that name.
    """
    if name not in METRICS:
        raise ProbeError(f"metric {name!r} is not known; one of: {', '.join(METRICS)}")
    metric = METRICS[name]
    options = {"bins": bins} if metric.histogram else {}
    return metric.function(scores, mask, **options)


def _entries(scores: torch.Tensor, mask: torch.Tensor | None) -> Array:
    """The entries of each sequence as float64 [sequence, entry]."""
    if scores.ndim != 3 or not len(scores):
        raise ProbeError(
            f"scores have shape {list(scores.shape)}; a metric needs [sequence, source, target] "
            "with at least one sequence"
        )
    flat = scores.flatten(1) if mask is None else scores[:, mask]
    return flat.detach().cpu().double().numpy()


def _histogram_entropy(values: Array, bins: int, eps: float) -> float:
    counts, _ = np.histogram(values, bins=bins, range=(0, values.max() or 1))
    return float(entropy(counts.astype(np.float64), eps))
