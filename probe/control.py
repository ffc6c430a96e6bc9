"""The cross-text control: how much of a change is the model, and how much the text?

Each model is scored on its own answers, so between before and after two things differ: the model,
and the text that it is scored on. The control also scores each model on the other's answers to the
same questions, cut to the same length. With V[M, T] a metric of model M on the answers of model T:

    change = V[after, after] - V[before, before]
    model  = mean over T of V[after, T] - V[before, T]
    text   = mean over M of V[M, after] - V[M, before]

`model` and `text` sum to the change: they are its Shapley split among two causes. How far the two
depend on each other, V[after, after] - V[after, before] - V[before, after] + V[before, before], is
the `interaction`; the split gives half of it to each, so where it is large, the split says little.

    >>> float(split(np.array([[1.0, 2.0], [3.0, 7.0]])).model)
    3.5
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from probe.metrics import METRICS, Array
from probe.statistics import interval_of, resample
from probe.vocabulary import BINS, RESAMPLES

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
    """95 % paired bootstrap interval of that, over questions."""

    text: float | None = None
    """The text's part of it."""

    text_interval: Interval = None
    """95 % paired bootstrap interval of that."""

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
    sides: Sequence[Sequence[torch.Tensor]],
    *,
    bins: int = BINS,
    resamples: int = RESAMPLES,
    metrics: Iterable[str] = METRICS,
) -> list[Control]:
    """Split the change of every metric.

    Args:
        sides: Scores [question, source, target] of each side, by [model][text] as in `SIDES`, of
            the same questions in the same order; entropies [question] for `TOKEN_METRICS`.
        bins: Bins of the histograms.
        resamples: How many times questions are drawn for the intervals; 0 for none.
        metrics: Names of the metrics.
    """
    flat = [scores for row in sides for scores in row]
    found = []
    for name in metrics:
        values, drawn = resample(name, flat, bins=bins, resamples=resamples)
        old = values[0]
        if not np.isfinite(values).all() or old == 0:
            found.append(Control(name))
            continue
        whole = split(values.reshape(2, 2) / abs(old))
        with np.errstate(divide="ignore", invalid="ignore"):
            parts = split((drawn / np.abs(drawn[0])).T.reshape(-1, 2, 2))
        found.append(
            Control(
                metric=name,
                change=float(whole.change),
                model=float(whole.model),
                model_interval=interval_of(parts.model),
                text=float(whole.text),
                text_interval=interval_of(parts.text),
                interaction=float(whole.interaction),
            )
        )
    return found
