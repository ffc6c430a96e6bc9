"""Statistics: how far chance alone could have moved a metric, so that a change can be a finding.

Row i of both sides is question i, so everything is paired over questions. They are drawn again
with repetition for an interval, their two sides are exchanged for a p-value, and one model's
questions are split into halves for a noise floor. All of these are weights on sequences, and a
metric that is a mean, a histogram or a mean over pairs is computed for thousands of weightings at
once. docs/statistics.md has the equations and the limits.

    >>> found = compare_sides(before.scores, after.scores)["activation_intensity"]
    >>> found.interval, found.p_value
    ((-0.78, -0.65), 9.999e-05)
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from probe.errors import ProbeError
from probe.metrics import METRICS, Array, compute_metric, entropy, metric_named
from probe.vocabulary import BINS, RESAMPLES

PERMUTATIONS = 10_000
SPLITS = 200
SEED = 42
LEVEL = 0.05
"""How often a report may call a cell significant where nothing has changed."""

# As many weights at once as keep an array of them small (32 MB).
_WEIGHTS = 2**22
# Differences this much smaller than the values are rounding.
_ROUNDING = 1e-10

Weighted = Callable[[Array], Array]
"""A metric of weighted sequences: weights [weighting, sequence] to values [weighting]."""


@dataclass(frozen=True)
class Statistics:
    """What is known about the change of one metric; None where it is not defined."""

    interval: tuple[float, float] | None = None
    """95 % paired bootstrap interval (percentiles) of (after - before) / |before|."""

    p_value: float | None = None
    """Share of the exchanges of questions' two sides whose |after - before| is at least as large
    as the observed one; the observed one counts among them. Before sides are exchanged under a
    histogram, they are brought to one scale, on which its entropy does not depend."""

    effect_size: float | None = None
    """(after - before) in standard deviations of a question's contribution to it. For a mean over
    questions these are the paired differences; otherwise their standard deviation is taken to be
    sqrt(questions) times that of the bootstrapped difference, which for a mean is the same."""

    noise_floor: float | None = None
    """95th percentile of |relative change| from one random half of a model's questions to the
    other, over the changes in the direction that the metric moved (a fall ends at -100 %, a rise
    nowhere), of the noisier model. Halves share no question and hold half of them, so this is a
    generous bound: two sets of all questions differ by less."""


def compare_sides(
    before: torch.Tensor,
    after: torch.Tensor,
    *,
    bins: int = BINS,
    resamples: int = RESAMPLES,
    permutations: int = PERMUTATIONS,
    metrics: Iterable[str] = METRICS,
) -> dict[str, Statistics]:
    """Compute the statistics of every metric between two sides of the same questions.

    Args:
        before: Scores [question, source, target] of the model before; entropies [question] for
            `metrics.TOKEN_METRICS`.
        after: Those of the model after, of the same questions in the same order.
        bins: Bins of the histograms.
        resamples: How many times questions are drawn for an interval.
        permutations: How many times sides are exchanged for a p-value.
        metrics: Names of the metrics.

    Raises:
        ProbeError: The sides differ in shape.
    """
    if before.shape != after.shape:
        raise ProbeError(
            f"scores before have shape {list(before.shape)} and after {list(after.shape)}; "
            "statistics need both of the same questions"
        )
    if len(before) < 2:
        return {name: Statistics() for name in metrics}
    draws = _Draws(len(before), resamples, permutations)
    with np.errstate(divide="ignore", invalid="ignore"):
        return {name: _compare(name, before, after, bins, draws) for name in metrics}


def resample(
    name: str,
    sides: Sequence[torch.Tensor],
    *,
    bins: int = BINS,
    resamples: int = RESAMPLES,
) -> tuple[Array, Array]:
    """A metric of several sides of the same questions, and of the same draws of these questions.

    Args:
        name: A name in `probe.metrics.METRICS` or `TOKEN_METRICS`.
        sides: Scores [question, source, target] of each side; entropies [question] for the latter.
        bins: Bins of the histograms.
        resamples: How many times questions are drawn.

    Returns:
        The metric [side], and of the drawn questions [side, draw]; NaN where it is not defined.
    """
    draws = _Draws(len(sides[0]), resamples, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        metrics = [_weighted(name, scores, bins) for scores in sides]
        values = np.array([metric(draws.observed)[0] for metric in metrics])
        return values, np.stack([_evaluate(metric, draws.resampled) for metric in metrics])


def resample_means(sides: Array, resamples: int = RESAMPLES) -> Array:
    """Means [side, draw] of drawn questions, the same ones on every side.

    Args:
        sides: A value of each question on each side, [side, question].
        resamples: How many times questions are drawn.
    """
    questions = sides.shape[1]
    return (sides / questions) @ _Draws(questions, resamples, 0).resampled.T


def halves(questions: int) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """The random halves [split, question] of a noise floor; with an odd number, one is left."""
    return _Draws(questions, 0, 0).halves


def interval_of(values: Array) -> tuple[float, float] | None:
    """95 % of the values of resampled questions (percentiles); None where none is finite."""
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for their number by Holm's method; they may depend on each other.

    The smallest of m is multiplied by m, the next by m - 1, ...; none becomes smaller than one
    before it, or larger than 1.
    """
    adjusted = [1.0] * len(p_values)
    largest = 0.0
    for rank, place in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, (len(p_values) - rank) * p_values[place])
        adjusted[place] = min(1.0, largest)
    return adjusted


def permutations_for(cells: int) -> int:
    """How many exchanges let a cell be significant after Holm among so many cells."""
    return max(PERMUTATIONS, 100 * cells)


class _Draws:
    """The weights [draw, question] that every metric of a pair of sides is computed with."""

    def __init__(self, questions: int, resamples: int, permutations: int) -> None:
        self.observed = np.ones((1, questions))
        even = np.full(questions, 1 / questions)
        self.resampled = np.random.default_rng([SEED, 0]).multinomial(questions, even, resamples)
        self.kept = np.random.default_rng([SEED, 1]).random((permutations, questions)) < 0.5
        rank = np.random.default_rng([SEED, 2]).random((SPLITS, questions)).argsort(1)
        half = questions // 2  # with an odd number, one question is in neither half
        self.halves = (rank < half, (rank >= half) & (rank < 2 * half))


def _compare(
    name: str, before: torch.Tensor, after: torch.Tensor, bins: int, draws: _Draws
) -> Statistics:
    sides = [_weighted(name, scores, bins) for scores in (before, after)]
    old, new = (float(side(draws.observed)[0]) for side in sides)
    if not np.isfinite([old, new]).all() or old == 0:
        return Statistics()
    rounding = _ROUNDING * max(abs(old), abs(new))

    both = _exchangeable(name, before, after, bins)
    kept = np.vstack([draws.observed > 0, draws.kept])
    exchanged = np.abs(_evaluate(both, ~kept, kept) - _evaluate(both, kept, ~kept))
    # What is not defined cannot be called less extreme; the first one is the observed difference.
    extreme = ~(exchanged < exchanged[0] - rounding)
    p_value = float(extreme.mean())

    olds, news = (_evaluate(side, draws.resampled) for side in sides)
    interval = interval_of((news - olds) / np.abs(olds))

    per_sample = metric_named(name).per_sample
    if per_sample:
        deviation = float((per_sample(after) - per_sample(before)).std(ddof=1))
    else:
        differences = (news - olds)[np.isfinite(news - olds)]
        spread = differences.std(ddof=1) if len(differences) > 1 else np.nan
        deviation = float(spread * np.sqrt(len(before)))
    effect_size = (new - old) / deviation if deviation > rounding else None
    floors = [_noise_floor(side, draws, new < old) for side in sides]
    known = [floor for floor in floors if floor is not None]
    return Statistics(interval, p_value, effect_size, max(known) if len(known) == 2 else None)


def _noise_floor(side: Weighted, draws: _Draws, falls: bool) -> float | None:
    one, other = (_evaluate(side, half) for half in draws.halves)
    # Both orders: each split is a rise one way and a fall the other way.
    old, new = np.concatenate([one, other]), np.concatenate([other, one])
    changes = ((new - old) / np.abs(old))[new <= old if falls else new >= old]
    sizes = np.abs(changes[~np.isnan(changes)])
    # A value that occurs: one between two infinite ones would not be a number.
    floor = np.percentile(sizes, 95, method="higher") if len(sizes) else np.nan
    return float(floor) if np.isfinite(floor) else None


def _evaluate(metric: Weighted, *weights: npt.NDArray[np.generic]) -> Array:
    """The metric of many weightings, a bounded number at once; several `weights` stand in a row."""
    rows = max(1, _WEIGHTS // sum(part.shape[1] for part in weights))
    blocks = [
        metric(np.hstack([part[start : start + rows] for part in weights]).astype(np.float64))
        for start in range(0, len(weights[0]), rows)
    ]
    return np.concatenate(blocks) if blocks else np.empty(0)


def _weighted(name: str, scores: torch.Tensor, bins: int) -> Weighted:
    """Prepare a metric of these sequences for many weightings."""
    metric = metric_named(name)
    if metric.per_sample:
        return _mean(metric.per_sample(scores))
    if metric.pooled:
        return _Histograms(metric.pooled(scores), bins)
    if metric.pairwise:
        return _mean_of_pairs(metric.pairwise(scores))
    return _computed_anew(name, scores, bins)


def _exchangeable(name: str, before: torch.Tensor, after: torch.Tensor, bins: int) -> Weighted:
    """Prepare a metric of both sides' sequences together.

    A histogram's range is the largest value's. If one model's scores were all a quarter of the
    other's, every mixture would fill that range otherwise than either model does, though the
    entropies were equal; so each side is divided by the geometric mean over questions of its means.
    """
    pooled = metric_named(name).pooled
    if pooled is None:
        return _weighted(name, torch.cat([before, after]), bins)
    sides = []
    for values in (pooled(before), pooled(after)):
        means = values.mean(1)
        means = means[means > 0]
        sides.append(values / np.exp(np.log(means).mean()) if len(means) else values)
    return _Histograms(np.concatenate(sides), bins)


def _mean(values: Array) -> Weighted:
    return lambda weights: weights @ values / weights.sum(1)


def _mean_of_pairs(values: Array) -> Weighted:
    """The mean over pairs of different sequences.

    A sequence drawn twice makes no pair with its copy: the distance to itself, 0, is none between
    questions, and would pull every resampled diversity down by about 1 / questions.
    """
    apart = values.copy()
    np.fill_diagonal(apart, 0)

    def weighted(weights: Array) -> Array:
        pairs = weights.sum(1) ** 2 - (weights**2).sum(1)
        return ((weights @ apart) * weights).sum(1) / pairs

    return weighted


class _Histograms:
    """The entropy of the histogram of all weighted sequences' values.

    Its range ends at the largest value with a weight, which some sequence holds. Nearly always it
    is one of the few sequences with the largest values of all, so each of these few ranges gets
    its histogram of every sequence once, and a weighting is a sum of rows of them.
    """

    def __init__(self, values: Array, bins: int) -> None:
        self._values = np.sort(values, axis=1)
        self._bins = bins
        self._order = np.argsort(-self._values[:, -1], kind="stable")
        self._known: dict[int, Array] = {}

    def __call__(self, weights: Array) -> Array:
        tops = self._order[(weights[:, self._order] > 0).argmax(1)]
        found = np.empty(len(weights))
        for top in np.unique(tops):
            rows = tops == top
            found[rows] = entropy(weights[rows] @ self._counts(int(top)))
        return found

    def _counts(self, top: int) -> Array:
        """Histograms [sequence, bin] where sequence `top` holds the largest value.

        Sequences with larger values are counted wrongly, and have no weight then.
        """
        if top not in self._known:
            edges = np.linspace(0, self._values[top, -1] or 1, self._bins + 1)
            below = np.stack([np.searchsorted(row, edges[1:-1]) for row in self._values])
            size = self._values.shape[1]
            self._known[top] = np.diff(below, axis=1, prepend=0, append=size).astype(np.float64)
        return self._known[top]


def _computed_anew(name: str, scores: torch.Tensor, bins: int) -> Weighted:
    """Compute the metric of each weighting from the sequences themselves: right, but slow."""

    def weighted(weights: Array) -> Array:
        counts = torch.from_numpy(weights.astype(np.int64))
        return np.array(
            [compute_metric(name, scores.repeat_interleave(row, 0), bins=bins) for row in counts]
        )

    return weighted
