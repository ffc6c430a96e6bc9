"""Accuracy: whether one model solves more questions than the other, question by question.

What counts are the questions that only one of the two solves. McNemar's exact test asks whether
they are as many on both sides, which is the sign-flip test of the differences; the interval is
Tango's score interval for a difference of paired proportions (Tango 1998), which holds where few
differ, too. Where questions come in clusters, both are over clusters: whole clusters are flipped,
and the interval is the t interval of `_statistics`.

    >>> found = compare_accuracy([True] * 66 + [False] * 34, [True] * 46 + [False] * 54)
    >>> found.p_value < 1e-4
    True
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import bdtr, ndtri

from probe.stats._statistics import Interval, flip_all, t_interval, units_of
from probe.vocabulary import FLIPS


@dataclass(frozen=True)
class PairedAccuracy:
    """How many questions two models solve."""

    before: float
    """Share of right answers of the model before."""

    after: float
    """Of the model after."""

    questions: int
    """How many were asked."""

    gained: int
    """How many only the model after solves."""

    lost: int
    """How many only the model before solves."""

    clusters: int
    """How many clusters the questions are in; as many as questions, where there are none."""

    interval: Interval | None
    """95 % interval of after - before; None for fewer than two questions (clusters)."""

    p_value: float
    """McNemar's exact p; over clusters, that of flipping their signs."""


def compare_accuracy(
    before: Sequence[bool],
    after: Sequence[bool],
    clusters: Sequence[str | None] | None = None,
    flips: int = FLIPS,
) -> PairedAccuracy:
    """Compare which questions two models solve.

    Args:
        before: Whether the model before solves each question.
        after: Whether the model after does, of the same questions in the same order.
        clusters: The cluster of each question; None: of a question that is alone.
        flips: How many random sign flips a p-value is from, where there are too many for all.
    """
    old, new = np.array(before, dtype=np.float64), np.array(after, dtype=np.float64)
    differences = new - old
    gained, lost = int((differences > 0).sum()), int((differences < 0).sum())
    units = units_of(clusters, len(old))
    groups = len(np.unique(units))
    if groups == len(old):
        interval = tango_interval(gained, lost, len(old)) if len(old) > 1 else None
        p_value = mcnemar(gained, lost)
    else:
        interval = t_interval(differences, units)
        (p_value,) = flip_all([(differences, units)], flips)
    return PairedAccuracy(
        float(old.mean()), float(new.mean()), len(old), gained, lost, groups, interval, p_value
    )


def mcnemar(gained: int, lost: int) -> float:
    """McNemar's exact two-sided p: how often a fair coin falls as unevenly."""
    return min(1.0, 2 * float(bdtr(min(gained, lost), gained + lost, 0.5)))


def tango_interval(gained: int, lost: int, questions: int) -> Interval:
    """95 % score interval of (gained - lost) / questions (Tango 1998).

    Its ends are the differences at which the score statistic of the paired table reaches the
    normal quantile.
    """
    reach = float(ndtri(0.975))
    middle = (gained - lost) / questions

    def score(difference: float) -> float:
        half = -gained - lost + (2 * questions - gained + lost) * difference
        rest = -lost * difference * (1 - difference)
        # The likeliest share of questions that only the model before solves, at this difference.
        share = (np.sqrt(half**2 - 8 * questions * rest) - half) / (4 * questions)
        variance = questions * (2 * share + difference * (1 - difference))
        distance = gained - lost - questions * difference
        if variance > 0:
            return float(distance / np.sqrt(variance))
        return float(np.sign(distance)) and float(np.copysign(np.inf, distance))

    def end(inside: float, outside: float) -> float:
        for _ in range(60):
            between = (inside + outside) / 2
            if abs(score(between)) <= reach:
                inside = between
            else:
                outside = between
        return inside

    return end(middle, -1.0), end(middle, 1.0)
