"""Matching: is what happens to some edges more than what happens to others that are like them?

Edges of one stratum are read by the same kind of branch of the same layer and are about equally
strong. If a label of edges (here: how much an edge was strengthened) says nothing about what they
do, it makes no difference which edges of a stratum bear which label. So labels are exchanged within
strata, and what is measured of the labels as they are is one of many such measurements: that makes
the p-value exact, whatever the spread of effects, and whatever their relation to strength, layer
and kind. For a set of edges the same is a draw, from each stratum, of as many edges as the set has
there, its own among those that may be drawn.

    >>> strata_of([["m3", "m3", "m3", "logits"]], np.array([0.1, 0.11, 0.4, 0.1])).numbers
    array([0, 0, 1, 2])
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from probe.metrics import Array
from probe.stats._statistics import Units

CALIPER = 0.2
"""Edges of a stratum are no farther apart than this, in standard deviations of log levels
(Austin 2011, doi 10.1002/pst.433)."""

UNBALANCED = 0.1
"""A set whose mean log level is off by more than so many standard deviations is no fair one."""

FLOOR = 0.1
"""Levels below this part of an even share count as that: such edges do next to nothing."""

PERMUTATIONS = 9999
"""How many times labels are exchanged within strata."""

# 1.96 + 0.84 standard deviations of the null are seen in 4 of 5 cases at the level of 0.05.
SEEN = 2.802

# As many labels at once as keep an array of them small (32 MB).
_VALUES = 2**22
_ROUNDING = 1e-12
# Values this much apart, as a share of the largest, are the same: losses are of float32.
_SAME = 1e-6

Places = npt.NDArray[np.int64]


class Correlated(NamedTuple):
    """A rank correlation within strata."""

    correlation: float
    """Of damage and label, both as ranks, less what strata and the ranks of levels explain."""

    p_value: float
    """How often labels that are exchanged within strata correlate as far out, on two sides."""

    detectable: float
    """The smallest correlation that is found in 4 of 5 cases, from the spread when exchanged."""


def log_levels(levels: Array) -> Array:
    """Logarithms of levels, none below the floor."""
    floor = FLOOR * levels.mean()
    return np.log(np.maximum(levels, floor if floor > 0 else 1.0))


class Strata(NamedTuple):
    """Which edges are alike."""

    numbers: Units
    """The stratum of each edge, as a number from 0 on, [edge]."""

    stages: Places
    """By which of the cells it was matched, [edge]: 0 by the first ones, ...; as many as there are
    cells for edges that none is like."""


def strata_of(cells: Sequence[Sequence[str]], levels: Array, caliper: float = CALIPER) -> Strata:
    """Divide edges into strata.

    Args:
        cells: What edges of a stratum have in common, [cells, edge]: the branch that reads them,
            say. Edges that are alone there are matched among themselves by the next cells.
        levels: How strong each edge is, from 0 on.
        caliper: How far apart the strongest and weakest of a stratum may be, in standard
            deviations of the log levels of all edges.
    """
    logs = log_levels(levels)
    width = caliper * logs.std() + _ROUNDING
    numbers = np.arange(len(logs))
    stages = np.full(len(logs), len(cells))
    for stage, names in enumerate(cells):
        alone = np.flatnonzero(stages == len(cells))
        start = -1  # a stratum's weakest edge stands for it
        for place in sorted(map(int, alone), key=lambda place: (names[place], logs[place])):
            if start < 0 or names[place] != names[start] or logs[place] - logs[start] > width:
                start = place
            numbers[place] = start
        alike = np.bincount(numbers, minlength=len(logs))[numbers[alone]] > 1
        stages[alone[alike]] = stage
    return Strata(np.unique(numbers, return_inverse=True)[1], stages)


def treated_edges(labels: Array, strata: Units, count: int) -> tuple[Places, int]:
    """The edges of the largest labels among those that have others like them.

    Args:
        labels: [edge]; the largest are wanted.
        strata: [edge].
        count: How many are wanted.

    Returns:
        Their places, and how many edges with larger labels are left out as none is like them.
    """
    order = np.argsort(-labels, kind="stable")
    alike = np.bincount(strata)[strata][order] > 1
    ends = np.flatnonzero(alike)[:count]
    return order[ends], int((~alike[: ends[-1] + 1 if len(ends) else 0]).sum())


def matched_sets(treated: Places, strata: Units, count: int, seed: int) -> Places:
    """Draw sets like one: of each stratum as many edges as it has there, [set, edge of the set].

    The edges of the set itself may be drawn too, or it would not be one of the sets.
    """
    random = np.random.default_rng([seed, len(treated)])
    needed = np.bincount(strata[treated], minlength=int(strata.max()) + 1)
    parts = []
    for stratum in np.flatnonzero(needed):
        members = np.flatnonzero(strata == stratum)
        order = np.argsort(random.random((count, len(members))), axis=1)
        parts.append(members[order[:, : needed[stratum]]])
    return np.concatenate(parts, axis=1)


def balance(levels: Array, treated: Places, drawn: Places) -> tuple[float, float]:
    """How far the mean log level of a set is from that of the other edges, and of matched sets.

    Both in standard deviations of the log levels of all edges.
    """
    logs = log_levels(levels)
    spread = logs.std() or 1.0
    own, others = logs[treated].mean(), np.delete(logs, treated)
    before = (own - others.mean()) / spread if len(others) else 0.0
    return float(before), float((own - logs[drawn].mean()) / spread)


def rank_correlation(
    damage: Array,
    labels: Array,
    levels: Array,
    strata: Units,
    seed: int,
    permutations: int = PERMUTATIONS,
) -> Correlated:
    """Regress the ranks of damage on those of labels and levels, within strata.

    Edges that are alone in their stratum say nothing.

    Args:
        damage: [edge].
        labels: [edge].
        levels: [edge].
        strata: [edge].
        seed: Seed of the exchanges.
        permutations: How many exchanges.
    """
    from scipy.stats import rankdata

    random = np.random.default_rng(seed)
    units = np.unique(strata, return_inverse=True)[1]
    y, x, level = (_within(rankdata(values), units) for values in (damage, labels, levels))
    slope = level @ level
    y = y - level * (level @ y / slope if slope > _ROUNDING else 0.0)
    order = np.argsort(units, kind="stable")
    found = [_against(x[None], y, level)]
    step = max(1, _VALUES // max(1, len(x)))
    for start in range(0, permutations, step):
        rows = min(step, permutations - start)
        exchanged = np.empty((rows, len(x)))
        exchanged[:, order] = x[np.argsort(units + random.random((rows, len(x))), axis=1)]
        found.append(_against(exchanged, y, level))
    values = np.concatenate(found)
    return Correlated(
        float(values[0]), two_sided(values[0], values[1:]), float(SEEN * values[1:].std())
    )


def two_sided(value: float, null: Array) -> float:
    """How often a draw is as far out as a value, which counts as one; of both sides together."""
    slack = _SAME * float(np.abs(null).max(initial=0))
    above = 1 + int((null >= value - slack).sum())
    below = 1 + int((null <= value + slack).sum())
    return min(1.0, 2 * min(above, below) / (1 + len(null)))


def _within(values: Array, units: Units) -> Array:
    """Values less the mean of their stratum."""
    return values - (np.bincount(units, values) / np.bincount(units))[units]


def _against(labels: Array, damage: Array, level: Array) -> Array:
    """The partial correlation of each row of labels with damage, all centred: [row]."""
    slope = level @ level
    if slope > _ROUNDING:
        labels = labels - np.outer(labels @ level / slope, level)
    sizes = np.sqrt((labels**2).sum(1) * (damage @ damage))
    return np.where(sizes > _ROUNDING, labels @ damage / np.where(sizes > 0, sizes, 1), 0.0)
