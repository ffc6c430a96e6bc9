"""Statistics: how far chance alone could have moved a metric, so that a change can be a finding.

Row i of both sides is question i, so everything is paired. Each question contributes a number to a
change, and the change is their mean: the log of a question's ratio, a difference, or, of a metric
of pairs, the jackknife's pseudo-value. From these numbers come a t interval, a p-value (their signs
are flipped), and how much of it all one question holds. Questions of one cluster stay together.
docs/statistics.md has the equations, and what `benchmarks/calibration.py` measured of them.

    >>> edges = [Entries(side.scores, graph.mask, dense=True) for side in (before, after)]
    >>> found = compare_sides(*edges)["activation_intensity"]
    >>> found.change, found.interval, found.p_value
    (-0.789, (-0.807, -0.769), 4.9998e-05)
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

from probe.errors import ProbeError
from probe.metrics import (
    METRICS,
    Array,
    Entries,
    Form,
    Metric,
    entropy,
    histograms,
    metric_named,
    paper_number,
)
from probe.stats._results import Influence
from probe.vocabulary import FLIPS

EXACT = 14
"""Of so many clusters and fewer, all sign flips are gone through."""

SEED = 42

# As many signs at once as keep an array of them small (32 MB).
_SIGNS = 2**22
# Scores are float32: what is this much smaller than what it is from is rounding.
_ROUNDING = 1e-6
# Sums are float64.
_ROUNDING_OF_SUMS = 1e-10

Interval = tuple[float, float]
Units = npt.NDArray[np.int64]
"""The cluster of each question, as a number from 0 on."""


@dataclass(frozen=True)
class Statistics:
    """What is known about the change of one metric; None where it is not defined."""

    before: float | None = None
    """The model before: the geometric mean, mean or mean over pairs of its questions' values."""

    after: float | None = None
    """The model after."""

    change: float | None = None
    """(after - before) / |before|."""

    interval: Interval | None = None
    """95 % t interval of the change over questions, or over clusters of them; of a ratio, that of
    the mean log ratio, taken back."""

    p_value: float | None = None
    """Share of the sign flips of the questions' (clusters') contributions whose sum is at least as
    far from 0 as the observed one, which counts among them."""

    effect_size: float | None = None
    """Mean contribution to after - before (of a ratio, to its log) in their standard deviations."""

    samples: int = 0
    """How many questions it is from: those where both values are defined, and above 0 for a
    ratio."""

    clusters: int = 0
    """How many clusters these are in; as many as questions, where there are none."""

    influence: Influence | None = None
    """What the question with the most influence holds."""


class Contributions(NamedTuple):
    """What each question contributes to a change."""

    before: float
    """The metric before."""

    after: float
    """The metric after."""

    to_difference: Array
    """[question]; their mean is after - before, of a ratio its log."""

    to_change: Array
    """[question]; their mean is the relative change to first order, of a ratio again its log."""

    change: float | None
    """The relative change; None from 0."""


def compare_sides(
    before: Entries,
    after: Entries,
    *,
    clusters: Sequence[str | None] | None = None,
    flips: int = FLIPS,
    metrics: Iterable[str] = METRICS,
) -> dict[str, Statistics]:
    """Compute the statistics of every metric between two sides of the same questions.

    Args:
        before: Edges of the model before.
        after: Those of the model after, of the same questions in the same order.
        clusters: The cluster of each question; None: of a question that is alone.
        flips: How many random sign flips a p-value is from, where there are too many for all; 0
            leaves p-values and intervals out.
        metrics: Names of the metrics.

    Raises:
        ProbeError: The sides differ in shape.
    """
    if before.values.shape != after.values.shape:
        raise ProbeError(
            f"scores before have shape {list(before.values.shape)} and after "
            f"{list(after.values.shape)}; statistics need both of the same questions"
        )
    units = units_of(clusters, len(before))
    found: dict[str, Statistics] = {}
    tested: dict[str, tuple[Array, Units]] = {}
    for name in metrics:
        estimand = metric_named(name).estimand
        if estimand is None:
            found[name] = Statistics()
            continue
        values = before.parts(estimand.values), after.parts(estimand.values)
        found[name], contributed, rows = describe(estimand.form, *values, units)
        if contributed is not None:
            tested[name] = contributed, units[rows]
    if not flips:
        return {
            name: replace(statistics, interval=None, effect_size=None)
            for name, statistics in found.items()
        }
    for name, p_value in zip(tested, flip_all(list(tested.values()), flips), strict=True):
        found[name] = replace(found[name], p_value=p_value)
    return found


def describe(
    form: Form, before: Array, after: Array, units: Units
) -> tuple[Statistics, Array | None, npt.NDArray[np.bool_]]:
    """All of a metric's statistics but its p-value.

    Args:
        form: How the values of questions become one.
        before: [question], or [question, question] for pairs.
        after: Likewise.
        units: The cluster of each question.

    Returns:
        The statistics; the contributions that a p-value is from, of the questions that count, or
        None; and which questions these are.
    """
    rows = defined(form, before, after)
    count = int(rows.sum())
    least = 3 if form == "pairs" else 2
    if form == "pairs":
        before, after = (side[np.ix_(rows, rows)] for side in (before, after))
    else:
        before, after = before[rows], after[rows]
    units = np.unique(units[rows], return_inverse=True)[1]
    groups = int(units.max(initial=-1)) + 1
    if count < least - 1:
        return Statistics(samples=count, clusters=groups), None, rows
    found = contributions(form, before, after)
    statistics = Statistics(
        _known(found.before), _known(found.after), found.change, samples=count, clusters=groups
    )
    if count < least:
        return statistics, None, rows
    parts = found.to_difference
    interval = t_interval(found.to_change, units) if found.change is not None else None
    if interval is not None and form == "ratio":
        interval = float(np.expm1(interval[0])), float(np.expm1(interval[1]))
    deviation = parts.std(ddof=1)
    certain = deviation > _ROUNDING * np.abs(parts).max(initial=0)
    statistics = replace(
        statistics,
        interval=interval,
        effect_size=float(parts.mean() / deviation) if certain else None,
        influence=influence(parts, np.flatnonzero(rows)),
    )
    return statistics, parts if groups > 1 else None, rows


def contributions(form: Form, before: Array, after: Array) -> Contributions:
    """What each question contributes to the change of a metric.

    Args:
        form: How the values of questions become one.
        before: [question], or [question, question] for pairs.
        after: Likewise.
    """
    if form == "ratio":
        logs = np.log(before), np.log(after)
        old, new = (float(np.exp(side.mean())) for side in logs)
        parts = without_rounding(logs[1] - logs[0], 1)
        return Contributions(old, new, parts, parts, float(np.expm1(parts.mean())))
    if form == "pairs":
        before, after = pseudo_values(before), pseudo_values(after)
    old, new = float(before.mean()), float(after.mean())
    parts = without_rounding(after - before, abs(old))
    if old == 0:
        return Contributions(old, new, parts, parts, None)
    change = float(parts.mean()) / abs(old)
    to_change = change + (parts - before * (change * abs(old) / old)) / abs(old)
    return Contributions(old, new, parts, to_change, change)


def pseudo_values(pairs: Array) -> Array:
    """The jackknife's pseudo-values [question] of a mean over pairs; their mean is that mean.

    Args:
        pairs: A value of each pair, [question, question]; the diagonal does not count.
    """
    count = len(pairs)
    means = (pairs.sum(1) - np.diag(pairs)) / max(1, count - 1)
    if count < 3:
        return means
    whole = means.mean()
    return whole + 2 * (count - 1) / (count - 2) * (means - whole)


def t_interval(parts: Array, units: Units | None = None) -> Interval | None:
    """95 % t interval of the mean of what questions contribute.

    Without clusters it is the ordinary one. With clusters, the variance is that of the jackknife
    that leaves out one cluster at a time, and the degrees of freedom are the effective number of
    clusters, 1 / (the sum of the squares of their shares of the questions), less one: with clusters
    of one size, the t interval of their means.

    Args:
        parts: [question].
        units: The cluster of each question.

    Returns:
        The ends; None for fewer than two clusters.
    """
    count = len(parts)
    units = np.arange(count) if units is None else units
    mean = parts.mean()
    shares = np.bincount(units) / count
    if len(shares) < 2:
        return None
    left_out = np.bincount(units, parts - mean) / (count * (1 - shares))
    error = np.sqrt((1 - 1 / len(shares)) * (left_out**2).sum())
    reach = float(stdtrit(1 / (shares**2).sum() - 1, 0.975) * error)
    return float(mean - reach), float(mean + reach)


def flip_all(tested: Sequence[tuple[Array, Units]], flips: int = FLIPS) -> list[float]:
    """The p-values of several contributions, by flipping the signs of whole clusters.

    Of up to `EXACT` clusters all flips are gone through; of more, `flips` random ones, and then
    p = (1 + how many are as extreme) / (1 + flips).

    Args:
        tested: Contributions [question], and the cluster of each question.
        flips: How many random ones.
    """
    sums: list[Array] = [
        np.bincount(np.unique(units, return_inverse=True)[1], parts).astype(np.float64)
        for parts, units in tested
    ]
    found = [0.0] * len(sums)
    for size in {len(part) for part in sums}:
        indices = [index for index, part in enumerate(sums) if len(part) == size]
        columns = np.stack([sums[index] for index in indices], axis=1)
        for index, p_value in zip(indices, _flip(columns, flips), strict=True):
            found[index] = float(p_value)
    return found


def flip_largest(parts: Array, units: Units, flips: int = FLIPS) -> Array:
    """The p-values of the means of many tests, adjusted for their number by flipping all together.

    Each is held against the largest of all (Westfall and Young 1993), however they depend on each
    other. Means are compared as they are, not relative to their errors: where a few questions hold
    most of an edge's effect, a sample without these has a small mean and a far smaller error.

    Args:
        parts: Contributions, in one unit, [question, test].
        units: The cluster of each question.
        flips: How many random flips; up to `EXACT` clusters, all are gone through.

    Returns:
        [test]
    """
    sums = np.stack([np.bincount(units, column) for column in parts.T], axis=1)
    bar = np.abs(sums.sum(0)) - _ROUNDING_OF_SUMS * np.abs(sums).sum(0)
    largest = [np.abs(signs @ sums).max(1) for signs in _signs(len(sums), flips, max(sums.shape))]
    return (np.concatenate(largest)[:, None] >= bar).mean(0)


def _flip(columns: Array, flips: int) -> Array:
    """The p-values of sums [cluster, test] of contributions."""
    bar = np.abs(columns.sum(0)) - _ROUNDING_OF_SUMS * np.abs(columns).sum(0)
    extreme, count = np.zeros(columns.shape[1]), 0
    for sums in _flipped_sums(columns, flips):
        extreme += (np.abs(sums) >= bar).sum(0)
        count += len(sums)
    return extreme / count


def _flipped_sums(columns: Array, flips: int) -> Iterator[Array]:
    """The sums of [cluster, test] under the flips of `_signs`, [flip, test].

    Eight clusters have 256 ways to be flipped. What these add to the sums is looked up, which is
    several times as fast as a product with a matrix of signs for the few tests that there are.
    """
    if len(columns) <= EXACT:
        yield from (signs @ columns for signs in _signs(len(columns), flips, len(columns)))
        return
    yield columns.sum(0, keepdims=True)
    eights = -(-len(columns) // 8)
    padded = np.zeros((8 * eights, columns.shape[1]))
    padded[: len(columns)] = columns
    ways = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1) * 2.0 - 1
    tables = ways @ padded.reshape(eights, 8, -1)  # [eight, way, test]
    for bits in _bits(len(columns), flips, len(columns)):
        packed = np.packbits(bits, axis=1).T
        yield sum(
            (table.take(way, axis=0) for table, way in zip(tables, packed, strict=True)),
            start=np.zeros((len(bits), columns.shape[1])),
        )


def _signs(clusters: int, flips: int, width: int) -> Iterator[Array]:
    """Flips, [flip, cluster], as many at once as suit rows so wide; none flipped comes first."""
    if clusters <= EXACT:
        # A flip and its opposite are as extreme, so the last sign may stay.
        turned = np.arange(2 ** (clusters - 1))[:, None] >> np.arange(clusters) & 1
        yield 1.0 - 2 * turned.astype(np.float64)
        return
    yield np.ones((1, clusters))
    for bits in _bits(clusters, flips, width):
        yield bits.astype(np.float64) * 2 - 1


def _bits(clusters: int, flips: int, width: int) -> Iterator[npt.NDArray[np.uint8]]:
    """Random flips, [flip, cluster]: 0 where a cluster's sign changes."""
    random = np.random.default_rng([SEED, 1])
    rows = max(1, _SIGNS // width)
    for start in range(0, flips, rows):
        shape = min(rows, flips - start), clusters
        bits = np.unpackbits(np.frombuffer(random.bytes(-(-shape[0] * clusters // 8)), np.uint8))
        yield bits[: shape[0] * clusters].reshape(shape)


def influence(parts: Array, rows: npt.NDArray[np.int64] | None = None) -> Influence | None:
    """What the question that contributes most holds; None where none contributes anything.

    Args:
        parts: What each question contributes to after - before, [question].
        rows: The numbers of these questions; from 0 on if not given.
    """
    sizes = np.abs(parts)
    if not sizes.sum() > 0 or not np.isfinite(sizes).all():
        return None
    top = int(sizes.argmax())
    whole = parts.sum()
    survives = bool(np.sign(whole - parts[top]) == np.sign(whole))
    question = top if rows is None else int(rows[top])
    return Influence(question, float(sizes[top] / sizes.sum()), survives)


def paper_numbers(
    metric: Metric, before: Entries, after: Entries, bins: int
) -> tuple[float, float, Influence | None]:
    """The paper's number of a metric of two models, and the influence on their difference.

    Of a histogram, a question contributes what the jackknife gives it: what is lost without it.
    """
    sides = before, after
    old, new = (paper_number(metric, side, bins) for side in sides)
    parts = [side.parts(metric.parts) for side in sides]
    if len(before) < 2:
        return old, new, None
    if metric.form == "pairs":
        parts = [pseudo_values(part) for part in parts]
    if metric.form == "histogram":
        parts = [
            len(side) * whole - (len(side) - 1) * entropies_without(side, metric, bins)
            for side, whole in zip(sides, (old, new), strict=True)
        ]
    return old, new, influence(parts[1] - parts[0])


def entropies_without(edges: Entries, metric: Metric, bins: int) -> Array:
    """The entropy of the histogram of all sequences but one, for each one, [sequence]."""
    values, counts = edges.parts(metric.parts), edges.counted(metric.parts, bins)
    found = entropy(counts.sum(0) - counts)
    # The range of all others ends elsewhere without the one that holds the largest value.
    top = int(values.max(1).argmax())
    rest = histograms(np.delete(values, top, 0), bins, edges.zeros_of(values))
    found[top] = entropy(rest.sum(0))
    return found


def units_of(clusters: Sequence[str | None] | None, count: int) -> Units:
    """The cluster of each question as a number; a question without one is alone.

    Raises:
        ProbeError: There are not as many clusters as questions.
    """
    if clusters is None:
        return np.arange(count)
    if len(clusters) != count:
        raise ProbeError(f"{len(clusters)} clusters were given for {count} questions")
    known: dict[object, int] = {}
    keys = (index if name is None else name for index, name in enumerate(clusters))
    return np.array([known.setdefault(key, len(known)) for key in keys], dtype=np.int64)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for their number by Holm's method; they may depend on each other.

    The smallest of m is multiplied by m, the next by m - 1, ...; none becomes smaller than one
    before it, or larger than 1.
    """
    adjusted = [1.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, (len(p_values) - rank) * p_values[index])
        adjusted[index] = min(1.0, largest)
    return adjusted


def flips_for(cells: int) -> int:
    """How many sign flips let a cell be significant after Holm among so many cells."""
    return max(FLIPS, 200 * cells)


def defined(form: Form, before: Array, after: Array) -> npt.NDArray[np.bool_]:
    """Which questions have a value on both sides."""
    if form == "pairs":
        # A matrix that is constant has no correlation with any: its whole row is undefined.
        apart = [np.isfinite(side) | np.eye(len(side), dtype=bool) for side in (before, after)]
        return np.all([side.sum(1) > min(1, len(side) - 1) for side in apart], axis=0)
    found = np.isfinite(before) & np.isfinite(after)
    return found & (before > 0) & (after > 0) if form == "ratio" else found


def without_rounding(parts: Array, size: float | Array) -> Array:
    """Contributions, 0 where scores in float32 of values of this size do not tell them from it."""
    return np.where(np.abs(parts) <= _ROUNDING * size, 0, parts)


def _known(value: float) -> float | None:
    return value if np.isfinite(value) else None
