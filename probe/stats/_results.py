"""Results: what is known of a change, as plain records that need nothing to be read.

`_cells` computes them, and a report that was stored is made of them again without any of that.

    >>> Change(before=2.0, after=1.0, change=-0.5).change
    -0.5
"""

from dataclasses import dataclass
from typing import Literal

LEVEL = 0.05
"""How often a report may call a cell significant where nothing has changed."""

SMALLEST = 0.01
"""Smaller relative changes are never called significant: rounding weights to bfloat16 moves metrics
as far, and where changes are as small as that, a few questions can hold all of them."""

LARGE_SHARE = 0.2
"""A report warns where one question holds more of a change."""


@dataclass(frozen=True)
class Influence:
    """How much of a change is one question's."""

    question: int | str
    """The question that holds the largest share: its row, or, in a report, its id."""

    share: float
    """Its share of the sum of all questions' |contributions| to after - before."""

    sign_survives: bool
    """Whether the change has the same sign without it."""


@dataclass(frozen=True)
class Change:
    """One value of two models."""

    before: float | None
    """The model before; None where the metric is not defined (diversity of one sample)."""

    after: float | None
    """The model after."""

    change: float | None
    """(after - before) / |before|; None where that is not defined."""


@dataclass(frozen=True)
class Cell:
    """One metric of one pair on one benchmark at one alpha."""

    pair: str
    """The pair's name."""

    benchmark: str
    """The benchmark's name."""

    alpha: float
    """Scored length as a share of the reference length."""

    metric: str
    """A name in `probe.metrics.METRICS`, or in `TOKEN_METRICS`."""

    paper: Change
    """The paper's number of this metric, over the dense matrix with its structural zeros."""

    real_edges: Change
    """The same over real edges only; of a metric that is of no edges, the same again."""

    control: str = ""
    """What was held fixed in it; empty for the change as it is."""

    before: float | None = None
    """Our number of this metric, `Metric.estimand`, of the model before. This and what follows is
    None where it is not defined, or the recipe leaves statistics out."""

    after: float | None = None
    """Of the model after."""

    change: float | None = None
    """(after - before) / |before|, a fraction."""

    interval: tuple[float, float] | None = None
    """95 % t interval of the change over questions, or over clusters of them."""

    p_value: float | None = None
    """How often flipping the signs of what questions contribute does as much."""

    p_holm: float | None = None
    """The same, adjusted by Holm's method for all cells of the report."""

    significant: bool | None = None
    """Whether p_holm is below 0.05, and |change| at least 1 %."""

    effect_size: float | None = None
    """Mean contribution of a question in standard deviations of a question's."""

    samples: int = 0
    """How many questions our number is from."""

    clusters: int = 0
    """How many clusters these are in; as many as questions, where there are none."""

    left_out: int = 0
    """How many questions the number is not defined for."""

    influence: Influence | None = None
    """The question that holds most of our change."""

    paper_influence: Influence | None = None
    """The question that holds most of the change of the paper's number."""

    paper_direction: Literal["up", "down"] | None = None
    """How the paper reports that online RL moves this metric; None where it has no such metric."""

    as_in_paper: bool | None = None
    """Whether our number moved that way; None where the change or the way is not defined."""

    published: Change | None = None
    """What was printed elsewhere for this cell, where the recipe says."""

    as_published: bool | None = None
    """Whether the paper's number moved the way that the published value did."""


@dataclass(frozen=True)
class Accuracy:
    """How many questions of a benchmark the two models of a pair solve."""

    pair: str
    """The pair's name."""

    benchmark: str
    """The benchmark's name."""

    before: float
    """Share of right answers of the model before."""

    after: float
    """Share of right answers of the model after."""

    questions: int
    """How many were asked."""

    gained: int = 0
    """How many only the model after solves."""

    lost: int = 0
    """How many only the model before solves."""

    clusters: int = 0
    """How many clusters the questions are in; as many as questions, where there are none."""

    interval: tuple[float, float] | None = None
    """95 % interval of after - before, paired over questions or clusters."""

    p_value: float | None = None
    """McNemar's exact p; over clusters, that of flipping their signs."""

    p_holm: float | None = None
    """The same, adjusted by Holm's method for all accuracies of the report."""

    significant: bool | None = None
    """Whether p_holm is below 0.05."""

    cut_off: tuple[int, int] = (0, 0)
    """How many answers of the model before and of the one after are as long as `max_new_tokens`
    lets them be: they did not end. Answers made elsewhere are not counted."""

    published: Change | None = None
    """What was printed elsewhere, where the recipe says."""

    as_published: bool | None = None
    """Whether it moved the way that the published value did."""
