"""The cross-text control: how much of a change is the model, and how much the text?

Each model is scored on its own answers, so between before and after two things differ: the model,
and the text that it is scored on. The control also scores each model on the other's answers to the
same questions, cut to the same length. With V[M, T] a metric of model M on the answers of model T,
or its logarithm where the metric is compared by ratios:

    change = V[after, after] - V[before, before]
    model  = mean over T of V[after, T] - V[before, T]
    text   = mean over M of V[M, after] - V[M, before]

`model` and `text` sum to the change (as ratios, they multiply to it): they are its Shapley split
among two causes. How far the two depend on each other, V[after, after] - V[after, before] -
V[before, after] + V[before, before], is the `interaction`; the split gives half of it to each, so
where it is large, the split says little.

    >>> float(split(np.array([[1.0, 2.0], [3.0, 7.0]])).model)
    3.5
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from probe.metrics import METRICS, Array, Entries, Form, metric_named
from probe.stats._statistics import Units, defined, pseudo_values, t_interval, units_of

SIDES = (("before", "before-on-after"), ("after-on-before", "after"))
"""The sides [model, text] of a cell, by their names in the run folder."""

Interval = tuple[float, float] | None


class Split(NamedTuple):
    """The change of a metric and its parts, in the metric's unit: numbers, or arrays of them."""

    change: Array
    """V[after, after] - V[before, before]."""

    model: Array
    """What the other model changes, on the mean of both texts."""

    text: Array
    """What the other text changes, on the mean of both models."""

    interaction: Array
    """How much more the model changes on the text after than on the text before."""


@dataclass(frozen=True)
class Control:
    """The split of one metric's relative change; None where it is not defined."""

    metric: str
    """A name in `probe.metrics.METRICS` or `TOKEN_METRICS`."""

    change: float | None = None
    """(after - before) / |before|, each on its own answers."""

    model: float | None = None
    """The model's part of it."""

    model_interval: Interval = None
    """95 % t interval of that, over questions or clusters of them."""

    text: float | None = None
    """The text's part of it."""

    text_interval: Interval = None
    """95 % t interval of that."""

    interaction: float | None = None
    """What the split shares among both, as a part of |before| too."""


def split(values: Array) -> Split:
    """Split a change into model, text and what depends on both.

    Args:
        values: V [..., model, text], before first in both.
    """
    (bb, ba), (ab, aa) = np.moveaxis(values, (-2, -1), (0, 1))
    return Split(
        change=aa - bb,
        model=(ab - bb + aa - ba) / 2,
        text=(ba - bb + aa - ab) / 2,
        interaction=aa - ab - ba + bb,
    )


def cross_text(
    sides: Sequence[Sequence[Entries]],
    *,
    clusters: Sequence[str | None] | None = None,
    metrics: Iterable[str] = METRICS,
) -> list[Control]:
    """Split the change of every metric's own number, `Metric.estimand`.

    Args:
        sides: Edges of each side, by [model][text] as in `SIDES`, of the same questions in the
            same order.
        clusters: The cluster of each question; None: of a question that is alone.
        metrics: Names of the metrics.
    """
    flat = [edges for row in sides for edges in row]
    units = units_of(clusters, len(flat[0]))
    found = []
    for name in metrics:
        estimand = metric_named(name).estimand
        if estimand is None:
            continue
        values = [edges.parts(estimand.values) for edges in flat]
        rows = np.all([defined(estimand.form, side, side) for side in values], axis=0)
        if rows.sum() < 3:
            found.append(Control(name))
            continue
        table = np.stack([_of_questions(estimand.form, side, rows) for side in values], axis=-1)
        found.append(_split_metric(name, estimand.form, table, units[rows]))
    return found


def _of_questions(form: Form, values: Array, rows: Array) -> Array:
    """What each question that counts adds to the mean of a side, [question]."""
    if form == "pairs":
        return pseudo_values(values[np.ix_(rows, rows)])
    return np.log(values[rows]) if form == "ratio" else values[rows]


def _split_metric(name: str, form: Form, table: Array, units: Units) -> Control:
    """Split one metric's change, from what questions add to each side, [question, side]."""
    parts = split(table.reshape(-1, 2, 2))
    if form == "ratio":
        numbers = {key: float(np.expm1(part.mean())) for key, part in parts._asdict().items()}
        ends = [t_interval(part, units) for part in (parts.model, parts.text)]
        spans = [end and (float(np.expm1(end[0])), float(np.expm1(end[1]))) for end in ends]
    else:
        old = table[:, 0]
        base = float(old.mean())
        if base == 0:
            return Control(name)
        numbers = {key: float(part.mean()) / abs(base) for key, part in parts._asdict().items()}
        # To first order: the value before, by which all is divided, is uncertain too.
        spans = [
            t_interval(
                part.mean() / abs(base) + (part - part.mean() / base * old) / abs(base), units
            )
            for part in (parts.model, parts.text)
        ]
    return Control(name, model_interval=spans[0], text_interval=spans[1], **numbers)
