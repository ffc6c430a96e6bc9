"""The causal test: do the edges that a training strengthened carry more than others as strong?

Two kinds of test, of each intervention. The primary one is of single edges: within strata of edges
that are alike, do those that were strengthened more do more damage when they are changed? The other
one is of sets: the edges most strengthened, or most weakened, changed together, beside random sets
that are matched to them. `_matching` says what is exchanged and why the p-values are exact. Which
edges change anything at all when they are as before is a third question, and `acting_edges` has it.

    >>> test = judged_test(edge_tests, set_tests)
    >>> test.sets[0].verdict
    'no sign'
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import numpy as np

from probe.metrics import Array
from probe.stats._matching import (
    SEEN,
    UNBALANCED,
    Correlated,
    Places,
    Strata,
    balance,
    matched_sets,
    rank_correlation,
    strata_of,
    treated_edges,
    two_sided,
)
from probe.stats._results import LEVEL
from probe.stats._statistics import (
    Interval,
    Units,
    flip_largest,
    holm,
    t_interval,
    without_rounding,
)

Label = Literal["strengthened", "weakened"]
"""Which edges are treated: those whose share grew most, or fell most."""

LABELS: tuple[Label, ...] = ("strengthened", "weakened")

POINTS = 0.03
"""The loss of right answers for which the number of questions is said that it needs."""

Verdict = Literal["more", "less", "no sign", "unbalanced", "no comparison"]
"""Whether treated edges do more damage than edges like them, less, or neither measurably; or why
there is no verdict: matched sets are not as strong, or no edges are alike."""


@dataclass(frozen=True)
class EdgeTest:
    """Damage of single edges against how much they were strengthened: a rank regression."""

    intervention: str
    """What is done to each edge."""

    edges: int
    """How many edges are compared: those that others are like."""

    correlation: float
    """Partial rank correlation of damage and strengthening, or of their sizes, given level and
    stratum."""

    detectable: float
    """The smallest correlation that is found in 4 of 5 cases."""

    p_value: float
    """By exchanging strengthening within strata."""

    p_holm: float = 1.0
    """The same, adjusted by Holm's method for all tests of the pair."""

    verdict: Verdict = "no sign"
    """What follows."""

    sizes: bool = False
    """Whether the sizes of damage and strengthening are ranked, whatever their signs."""


@dataclass(frozen=True)
class SetTest:
    """Damage of a set of edges beside that of matched random sets."""

    treated: Label
    """Which edges."""

    intervention: str
    """What is done to them."""

    edges: int
    """How many edges the set has."""

    alike: tuple[int, ...]
    """How many of them are matched by reader kind, layer and level; by kind and level; and by level
    alone, as no edge is as strong there."""

    unlike: int
    """How many edges with larger changes are left out, as none is as strong anywhere."""

    level_before: float
    """Mean log level of the set less that of all other edges, in standard deviations."""

    level_after: float
    """The same against the matched sets: the balance."""

    damage: float
    """Rise of the mean loss of right answers, in nats."""

    matched: float
    """Mean of that over the matched sets."""

    interval: Interval | None
    """95 % t interval of the difference, over questions or clusters of them."""

    detectable: float
    """The smallest difference that is found in 4 of 5 cases, from the matched sets' spread."""

    lost: float
    """The share of right answers that the model does not write any more."""

    lost_matched: float
    """Mean of that over the matched sets."""

    lost_interval: Interval | None
    """95 % t interval of the difference."""

    lost_detectable: float
    """The smallest difference that is found in 4 of 5 cases."""

    questions_needed: int | None
    """So many questions let a difference of 3 points be found in 4 of 5 cases; None where no number
    does, as the sets themselves differ as much, or where all answers are lost or none."""

    p_value: float
    """How often a matched set's damage is as far out."""

    p_holm: float = 1.0
    """The same, adjusted by Holm's method for all tests of the pair."""

    verdict: Verdict = "no sign"
    """What follows."""


@dataclass(frozen=True)
class ActingEdge:
    """An edge that changes the loss when it is as it was before the training."""

    intervention: str
    """What is done to it."""

    source: str
    """What writes."""

    target: str
    """What reads."""

    damage: float
    """Rise of the mean loss of right answers, in nats: above 0 where its change helps."""

    interval: Interval | None
    """95 % t interval of that, over questions or clusters of them; of this edge alone."""

    p_value: float
    """By flipping the signs of questions, adjusted for all edges."""


@dataclass(frozen=True)
class CausalTest:
    """All tests of a pair."""

    edges: tuple[EdgeTest, ...]
    """Of single edges, an intervention each: the primary analysis."""

    sets: tuple[SetTest, ...]
    """Of sets."""

    acting: tuple[ActingEdge, ...] = ()
    """The edges that alone change the loss measurably when they are as before, by what is done; the
    largest first."""

    tried: dict[str, int] = field(default_factory=dict)
    """How many edges were tried for that, by what is done."""


class Matching(NamedTuple):
    """Which edges are compared with which."""

    levels: Array
    """How strong each edge is, [edge]."""

    strata: Strata
    """Which edges are alike."""

    treated: dict[Label, Places]
    """The treated edges."""

    unlike: dict[Label, int]
    """How many edges with larger changes were left out."""

    drawn: dict[Label, Places]
    """Matched sets, [set, edge of the set]."""


class Damages(NamedTuple):
    """What an intervention costs, one row for each set of edges."""

    loss: Array
    """Rise of the loss, in nats: [set, question]."""

    lost: Array
    """1 where the model does not write its answer any more: [set, question]."""


def match_edges(
    cells: Sequence[Sequence[str]],
    levels: Array,
    strengthening: Array,
    count: int,
    sets: int,
    seed: int,
) -> Matching:
    """Choose the treated edges, and draw sets that are matched to them.

    Args:
        cells: What edges that are alike have in common, the closest first; see `strata_of`.
        levels: [edge].
        strengthening: How much each edge was strengthened, [edge].
        count: How many edges are treated.
        sets: How many matched sets are drawn.
        seed: Seed of the draws.
    """
    strata = strata_of(cells, levels)
    treated: dict[Label, Places] = {}
    unlike: dict[Label, int] = {}
    drawn: dict[Label, Places] = {}
    for number, (label, sign) in enumerate(zip(LABELS, (1, -1), strict=True)):
        found, left_out = treated_edges(sign * strengthening, strata.numbers, count)
        treated[label], unlike[label] = found, left_out
        if len(found):
            drawn[label] = matched_sets(found, strata.numbers, sets, seed + number)
    return Matching(levels, strata, treated, unlike, drawn)


def make_edge_test(
    intervention: str,
    matching: Matching,
    strengthening: Array,
    damage: Array,
    measured: Places,
    seed: int,
    sizes: bool = False,
) -> EdgeTest:
    """Test single edges.

    Args:
        intervention: What is done to them.
        matching: Which are alike.
        strengthening: [edge].
        damage: Rise of the loss by each measured edge, [measured].
        measured: Which edges were changed one by one.
        seed: Seed of the exchanges.
        sizes: Whether the sizes of both are ranked.
    """
    if sizes:
        strengthening, damage = np.abs(strengthening), np.abs(damage)
    strata = matching.strata.numbers[measured]
    alike = np.bincount(strata)[strata] > 1
    if not alike.any():
        return EdgeTest(intervention, 0, 0.0, 1.0, 1.0, verdict="no comparison", sizes=sizes)
    found: Correlated = rank_correlation(
        damage[alike],
        strengthening[measured][alike],
        matching.levels[measured][alike],
        strata[alike],
        seed,
    )
    return EdgeTest(
        *(intervention, int(alike.sum()), found.correlation, found.detectable, found.p_value),
        sizes=sizes,
    )


def make_set_test(
    treated: Label, intervention: str, matching: Matching, damages: Damages, units: Units
) -> SetTest:
    """Test a set.

    Args:
        treated: Which edges were changed.
        intervention: How.
        matching: What they are matched with.
        damages: Of the set first, and then of the matched sets.
        units: The cluster of each question.
    """
    own = matching.treated[treated]
    before, after = balance(matching.levels, own, matching.drawn[treated])
    means = damages.loss.mean(1)
    lost = damages.lost.mean(1)
    excess, lost_excess = (part[0] - part[1:].mean(0) for part in damages)
    constant = not np.ptp(matching.drawn[treated], axis=0).any()
    unfair: Verdict = "no comparison" if constant else "unbalanced"
    return SetTest(
        treated,
        intervention,
        edges=len(own),
        alike=tuple(int((matching.strata.stages[own] == stage).sum()) for stage in range(3)),
        unlike=matching.unlike[treated],
        level_before=before,
        level_after=after,
        damage=float(means[0]),
        matched=float(means[1:].mean()),
        interval=t_interval(excess, units),
        detectable=float(SEEN * means[1:].std()),
        lost=float(lost[0]),
        lost_matched=float(lost[1:].mean()),
        lost_interval=t_interval(lost_excess, units),
        lost_detectable=float(SEEN * lost[1:].std()),
        questions_needed=questions_needed(damages.lost[1:], POINTS),
        p_value=two_sided(float(means[0]), means[1:]),
        verdict=unfair if constant or abs(after) > UNBALANCED else "no sign",
    )


def acting_edges(
    intervention: str, edges: Sequence[tuple[str, str]], damages: Array, loss: Array, units: Units
) -> list[ActingEdge]:
    """The edges that alone change the loss, the largest change first.

    Args:
        intervention: What was done to each.
        edges: Source and target of each.
        damages: Rise of the loss, in nats, [edge, question].
        loss: Of the model as it is, in nats, [question].
        units: The cluster of each question.
    """
    # An edge that nothing changed differs by the rounding of the loss, and by that every time.
    parts = without_rounding(damages, loss + 1).T
    p_values = flip_largest(parts, units)
    means = parts.mean(0)
    return [
        ActingEdge(
            intervention,
            edges[place][0],
            edges[place][1],
            float(means[place]),
            t_interval(parts[:, place], units),
            float(p_values[place]),
        )
        for place in np.argsort(-np.abs(means), kind="stable")
        if p_values[place] < LEVEL
    ]


def questions_needed(damages: Array, effect: float) -> int | None:
    """How many questions let a difference from matched sets be found in 4 of 5 cases.

    Sets differ from each other, and that no number of questions mends.

    Args:
        damages: Of matched sets, [set, question].
        effect: The difference.
    """
    own = damages - damages.mean(0)
    questions = own.shape[1]
    if min(own.shape) < 2:
        return None
    of_questions = float(own.var(1, ddof=1).mean())
    of_sets = max(0.0, float(own.mean(1).var(ddof=1)) - of_questions / questions)
    room = (effect / SEEN) ** 2 - of_sets
    return int(np.ceil(of_questions / room)) if room > 0 and of_questions > 0 else None


def judged_test(edges: Sequence[EdgeTest], sets: Sequence[SetTest]) -> CausalTest:
    """Adjust the p-values of all tests of a pair together, and say what follows.

    Tests without a fair comparison count among the tests, and have no verdict.
    """
    adjusted = holm([*(row.p_value for row in edges), *(row.p_value for row in sets)])
    return CausalTest(
        tuple(
            replace(row, p_holm=p, verdict=_verdict(row.verdict, p, row.correlation))
            for row, p in zip(edges, adjusted[: len(edges)], strict=True)
        ),
        tuple(
            replace(row, p_holm=p, verdict=_verdict(row.verdict, p, row.damage - row.matched))
            for row, p in zip(sets, adjusted[len(edges) :], strict=True)
        ),
    )


def _verdict(verdict: Verdict, p_holm: float, difference: float) -> Verdict:
    """A verdict, now that the adjusted p-value is known."""
    if verdict != "no sign" or p_holm >= LEVEL:
        return verdict
    return "more" if difference > 0 else "less"
