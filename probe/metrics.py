"""Metrics of a set of edge matrices: the paper's numbers (section 4.2), and what of them is tested.

Every metric has two numbers. The paper's is one number of all questions together, as its Eq. 14 to
16 say, over scores [sequence, source, target] and, as `mask`, the real edges. Without a mask it
runs over the dense matrix, structural zeros included: that is the paper's convention, whose means
run over n_o * n_i entries. Ours, its `Estimand`, is a number of each question, and does not depend
on how many there are; `probe.stats` compares it between two models.

    >>> activation_intensity(torch.tensor([[[1.0, -3.0], [0.0, 2.0]]]))
    1.5
"""

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from probe.errors import ProbeError, not_known
from probe.registry import Registry
from probe.vocabulary import BINS

if TYPE_CHECKING:
    import torch

EPS = 1e-10


Array = npt.NDArray[np.float64]


class Entries:
    """What metrics are computed from: the scores of each sequence as a row of float64."""

    def __init__(
        self,
        scores: "torch.Tensor",
        mask: "torch.Tensor | None" = None,
        *,
        dense: bool = False,
        entropies: "torch.Tensor | None" = None,
    ) -> None:
        """Take scores apart.

        Args:
            scores: [sequence, source, target], in nats; the last target is the final node.
            mask: The real edges [source, target]; all are if not given.
            dense: Whether what is no edge counts, as a zero.
            entropies: `EdgeScores.entropies`, [sequence], in nats, for the metric of these.

        Raises:
            ProbeError: There is no sequence, or the shape is another one.
        """
        if scores.ndim != 3 or not len(scores):
            raise ProbeError(
                f"scores have shape {list(scores.shape)}; a metric needs [sequence, source, "
                "target] with at least one sequence"
            )
        scores = scores.detach().cpu()
        flat = scores.flatten(1) if mask is None else scores[:, mask.cpu()]
        self.values: Array = flat.double().numpy()
        """Scores [sequence, entry] of real edges."""
        self.output: Array = np.abs(scores[..., -1].double().numpy())
        """|W| of the edges into the final node, [sequence, source]; all of them are real."""
        self.size = scores[0].numel() if dense else self.values.shape[1]
        """How many entries count; those that `values` lacks are zeros."""
        self.entropies: Array | None = (
            None if entropies is None else entropies.detach().cpu().double().numpy()
        )
        """The mean entropy of the next token of each sequence."""
        self._known: dict[Parts, Array] = {}
        self._counts: dict[tuple[Parts, int], tuple[Array, Array]] = {}

    def __len__(self) -> int:
        """How many sequences there are."""
        return len(self.values)

    @property
    def zeros(self) -> int:
        """How many entries are structural zeros that count."""
        return self.size - self.values.shape[1]

    def parts(self, function: "Parts") -> Array:
        """What a function makes of these entries, computed once."""
        if function not in self._known:
            self._known[function] = function(self)
        return self._known[function]

    def counted(self, function: "Parts", bins: int) -> Array:
        """Histograms [sequence, bin] of what a function makes of these entries, computed once."""
        parts, key = self.parts(function), (function, bins)
        # With and without zeros, a function may see the same parts.
        if key not in self._counts or self._counts[key][0] is not parts:
            self._counts[key] = parts, histograms(parts, bins)
        counts = self._counts[key][1].copy()
        counts[:, 0] += self.zeros_of(parts)
        return counts

    @cached_property
    def strengths(self) -> Array:
        """|W| of each sequence's real edges."""
        return np.abs(self.values)

    @cached_property
    def products(self) -> Array:
        """Sums of the products of two sequences' entries, [sequence, sequence]."""
        return self.values @ self.values.T

    def zeros_of(self, parts: Array) -> int:
        """How many zeros a histogram of these parts lacks: those of all edges, if it is of all."""
        return self.zeros if parts.shape == self.values.shape else 0

    def without_zeros(self) -> "Entries":
        """The same over real edges only."""
        other = Entries.__new__(Entries)
        other.__dict__ |= self.__dict__ | {
            "size": self.values.shape[1],
            "_known": {},
        }
        return other


def activation_intensity(scores: "torch.Tensor", mask: "torch.Tensor | None" = None) -> float:
    """Mean of |W| over sequences and entries (Eq. 14)."""
    return compute_metric("activation_intensity", scores, mask)


def intensities(edges: Entries) -> Array:
    """Mean of |W| of each sequence; their mean is the activation intensity."""
    return edges.strengths.sum(1) / edges.size


def information_complexity(
    scores: "torch.Tensor", mask: "torch.Tensor | None" = None, *, bins: int = BINS
) -> float:
    """Shannon entropy, in nats, of the histogram of |W|, all sequences pooled (Eq. 15).

    The histogram has `bins` equal bins from 0 to the largest |W|; p log(p + 1e-10) is summed. Bins
    and eps are not published. The range is the largest question's, so the value falls as more
    questions are pooled: compare it only under the same `bins` and number of questions.
    """
    return compute_metric("information_complexity", scores, mask, bins=bins)


def strengths(edges: Entries) -> Array:
    """Every |W| of each sequence: what information complexity makes a histogram of."""
    return edges.strengths


def distribution_kurtosis(scores: "torch.Tensor", mask: "torch.Tensor | None" = None) -> float:
    """Excess kurtosis of each sequence's entries, averaged over sequences (Eq. 16).

    Population moments. NaN if a sequence's entries are all equal.
    """
    return compute_metric("distribution_kurtosis", scores, mask)


def kurtoses(edges: Entries) -> Array:
    """Excess kurtosis of each sequence's entries; their mean is the distribution kurtosis."""
    return whole_kurtoses(edges) - 3


def whole_kurtoses(edges: Entries) -> Array:
    """m4 / m2^2 of each sequence's entries: the excess kurtosis + 3, which is never below 1."""
    mean = edges.values.sum(1, keepdims=True) / edges.size
    squares = (edges.values - mean) ** 2
    square = mean[:, 0] ** 2
    variance = (squares.sum(1) + edges.zeros * square) / edges.size
    fourth = (np.einsum("ij,ij->i", squares, squares) + edges.zeros * square**2) / edges.size
    with np.errstate(invalid="ignore", divide="ignore"):
        return fourth / variance**2


def sample_diversity(scores: "torch.Tensor", mask: "torch.Tensor | None" = None) -> float:
    """1 - Pearson correlation of two sequences' matrices, averaged over all pairs (Fig. 3a).

    NaN for fewer than two sequences.
    """
    return compute_metric("sample_diversity", scores, mask)


def distances(edges: Entries) -> Array:
    """1 - Pearson correlation [sequence, sequence]; the pairs' mean is the sample diversity."""
    means = edges.values.sum(1) / edges.size
    # The zeros add nothing to a product, and their distance from the mean is in size * means^2.
    covariances = edges.products - edges.size * np.outer(means, means)
    variances = np.diag(covariances)
    # What is left of the variance of a constant matrix is rounding.
    variances = np.where(variances > 1e-13 * np.diag(edges.products), variances, np.nan)
    deviations = np.sqrt(variances)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = 1 - covariances / np.outer(deviations, deviations)
    np.fill_diagonal(found, 0)
    return found


def output_entropy(
    scores: "torch.Tensor", mask: "torch.Tensor | None" = None, *, bins: int = BINS
) -> float:
    """Information complexity of the edges into the final node alone (Fig. 3b).

    The paper gives no formula. This one is the reading under which its values (about 0.01, and
    rises of several hundred percent) are possible: with few edges pooled over sequences, one bin
    holds nearly all. Every edge into `logits` is real, so the mask changes nothing.
    """
    return compute_metric("output_entropy", scores, mask, bins=bins)


def output_strengths(edges: Entries) -> Array:
    """Every |W| into the final node: what output entropy makes a histogram of."""
    return edges.output


def token_entropy(entropies: "torch.Tensor") -> float:
    """Mean entropy of the next-token distribution at the scored tokens: Fig. 3b's other reading.

    Args:
        entropies: `EdgeScores.entropies`, [sequence], in nats.
    """
    return float(entropies.detach().cpu().double().mean())


def token_entropies(edges: Entries) -> Array:
    """The predictive token entropy of each sequence; their mean is the token entropy."""
    return np.full(len(edges), np.nan) if edges.entropies is None else edges.entropies


def effective_edges(edges: Entries) -> Array:
    """Effective number of each question's edges: how concentrated its scores are."""
    return effective_number(edges.strengths)


def effective_outputs(edges: Entries) -> Array:
    """Effective number of each question's edges into the final node."""
    return effective_number(edges.output)


def effective_number(values: Array) -> Array:
    """exp(Shannon entropy) of each question's shares: how many equal edges are as spread out.

    The Hill number of order 1 (Hill 1973); NaN where all strengths are 0.

    Args:
        values: Strengths [question, edge], not negative.
    """
    totals = values.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        logs = np.log(np.where(values > 0, values, 1))
        return np.exp(np.log(totals) - np.einsum("ij,ij->i", values, logs) / totals)


Parts = Callable[[Entries], Array]

Form = Literal["ratio", "mean", "pairs"]
"""How values of questions become one number: their geometric mean, whose change is the geometric
mean of the questions' ratios; their mean; or the mean over pairs of different questions."""


class Estimand(NamedTuple):
    """What of a metric is tested: a number of each question (or pair), and how they are joined."""

    label: str
    """Its name in tables."""

    name: str
    """Its name in sentences."""

    form: Form
    """How the numbers become one."""

    values: Parts
    """The numbers: [question], above 0 for a ratio; [question, question] for pairs."""

    means: str = ""
    """What it is, for a legend."""


class Metric(NamedTuple):
    """A metric as the report knows it: the paper's number, and ours."""

    label: str
    """Its name in tables; the paper's where it has one."""

    parts: Parts
    """What the paper's number is made of, by `form`: its value of each sequence, [sequence]; what
    its histogram counts, not negative, [sequence, entry]; of each pair, [sequence, sequence]."""

    form: Literal["mean", "histogram", "pairs"] = "mean"
    """What the paper's number is: a mean over sequences, the entropy of a histogram of all
    sequences' entries, or a mean over pairs of sequences."""

    direction: Literal["up", "down"] | None = None
    """How the paper reports that online RL moves it; None where it has no such metric."""

    ours: Estimand | None = None
    """What is tested instead of it; None: the paper's number itself, unless it is a histogram's,
    which is never tested."""

    @property
    def estimand(self) -> Estimand | None:
        """What is tested; None where nothing is."""
        if self.ours or self.form == "histogram":
            return self.ours
        return Estimand(self.label, self.label, self.form, self.parts)


_ROWS: dict[str, Metric] = {
    "activation_intensity": Metric(
        "Act.Intens.",
        intensities,
        direction="up",
        ours=Estimand(
            "intensity",
            "intensity",
            "ratio",
            intensities,
            "mean strength |score| of an edge, in nats",
        ),
    ),
    "information_complexity": Metric(
        "Info.Complex.",
        strengths,
        "histogram",
        "up",
        Estimand(
            "eff. edges",
            "effective edges",
            "ratio",
            effective_edges,
            "how many edges of equal strength would be as spread out",
        ),
    ),
    "distribution_kurtosis": Metric(
        "Dist.Kurt.",
        kurtoses,
        direction="down",
        ours=Estimand(
            "kurtosis",
            "kurtosis",
            "ratio",
            whole_kurtoses,
            "how far a few edges stand out of all: fourth moment over squared variance",
        ),
    ),
    "sample_diversity": Metric(
        "Diversity",
        distances,
        "pairs",
        "up",
        Estimand(
            "diversity",
            "diversity",
            "pairs",
            distances,
            "how unlike the edges of two questions are: 1 - correlation",
        ),
    ),
    "output_entropy": Metric(
        "Out.Entropy",
        output_strengths,
        "histogram",
        "up",
        Estimand(
            "eff. outputs",
            "effective output edges",
            "ratio",
            effective_outputs,
            "eff. edges, of those into the logits alone",
        ),
    ),
}

METRICS = Registry("metric", Metric, _ROWS, takes="parts")
"""Every metric by its name, in the order of the report; the one place to add one."""


_TOKEN_ROWS: dict[str, Metric] = {
    "token_entropy": Metric(
        "Tok.Entropy",
        token_entropies,
        direction="up",
        ours=Estimand(
            "token entropy",
            "token entropy",
            "ratio",
            token_entropies,
            "how unsure the model is of each next token, in nats",
        ),
    ),
}

TOKEN_METRICS = Registry("metric of predictions", Metric, _TOKEN_ROWS, takes="parts")
"""Metrics of what a model predicts instead of its edges: of `Entries.entropies`."""


def metric_named(name: str) -> Metric:
    """A metric of either kind.

    Raises:
        ProbeError: There is no metric of that name.
    """
    known = METRICS | TOKEN_METRICS
    if name not in known:
        raise ProbeError(not_known("metric", name, known))
    return known[name]


def compute_metric(
    name: str, scores: "torch.Tensor", mask: "torch.Tensor | None" = None, *, bins: int = BINS
) -> float:
    """Compute the paper's number of a metric of edges, by its name.

    Raises:
        ProbeError: There is no metric of that name.
    """
    if name not in METRICS:
        raise ProbeError(not_known("metric", name, METRICS))
    return paper_number(METRICS[name], Entries(scores, mask), bins)


def paper_number(metric: Metric, edges: Entries, bins: int = BINS) -> float:
    """A metric as the paper defines it: one number of all sequences."""
    if metric.form == "histogram":
        return float(entropy(edges.counted(metric.parts, bins).sum(0)))
    parts = edges.parts(metric.parts)
    if metric.form == "mean":
        return float(parts.mean())
    count = len(parts)
    # The diagonal is no pair.
    return float(parts.sum() / (count * (count - 1))) if count > 1 else float("nan")


def histograms(values: Array, bins: int, zeros: int = 0) -> Array:
    """Histograms [sequence, bin] of values that are not negative, in equal bins up to the largest.

    Args:
        values: [sequence, entry].
        bins: How many bins.
        zeros: How many zeros more each sequence has.
    """
    edges = np.linspace(0, values.max() or 1, bins + 1)
    places = np.minimum((values * (bins / edges[-1])).astype(np.int64), bins - 1)
    # Rounding may put a value beside its bin, as `numpy.histogram` knows too.
    places -= values < edges[places]
    places += (values >= edges[places + 1]) & (places < bins - 1)
    rows = bins * np.arange(len(values))[:, None]
    counts = np.bincount((places + rows).ravel(), minlength=bins * len(values))
    found = counts.reshape(len(values), bins).astype(np.float64)
    found[:, 0] += zeros
    return found


def entropy(counts: Array, eps: float = EPS) -> Array:
    """Shannon entropy, in nats, of histograms [..., bin]: what both entropies end with."""
    shares = counts / counts.sum(-1, keepdims=True)
    return -(shares * np.log(shares + eps)).sum(-1)
