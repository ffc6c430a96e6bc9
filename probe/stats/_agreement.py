"""Agreement: how near a method's scores come to the exact effects of the same edges.

Five numbers, because a method may be good at one thing and bad at another: sums need values
(Pearson, relative error), circuits need ranks (Spearman, the top), signs need no more than signs.
Each has a 95 % interval from resampling the edges.

    >>> found = compare("sft", "eap", approximation=[1.0, 2.0, -3.0], exact=[1.1, 2.2, -2.9])
    >>> found.sign_agreement.value
    1.0
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from rich.console import Group, RenderableType
from rich.text import Text

from probe.fitted import Fitted, open_table
from probe.vocabulary import RESAMPLES

TOP = 0.1
TITLES = ("model", "method", "Pearson", "Spearman", "sign", "top 10 %", "error")

# As many values at once as keep a resampled array small (32 MB).
_VALUES = 2**22

Stratum = Literal["top", "middle", "random"]
Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class MeasuredEdge:
    """One edge of the sample, with all that is known of it."""

    sequence: str
    """The id of the sequence."""

    source: str
    """The node that writes."""

    target: str
    """The node that reads."""

    stratum: Stratum
    """From which part of the ranking it was drawn."""

    scores: dict[str, float]
    """Its score by each method, in nats."""

    exact: float | None = None
    """Its exact effect, in nats; None until it is computed."""


class Estimate(NamedTuple):
    """A number of a sample of edges, and how far another sample might move it."""

    value: float | None
    """The number; None where it is not defined (the correlation of a constant)."""

    low: float | None
    """Lower end of its 95 % bootstrap interval."""

    high: float | None
    """Upper end."""


@dataclass(frozen=True)
class Agreement:
    """One method of one model against the exact effects."""

    model: str
    """The model's name within the run."""

    method: str
    """A name in `probe.attribution.METHODS`."""

    edges: int
    """How many edges are compared."""

    pearson: Estimate
    """Linear correlation of the values; the strongest edges decide it."""

    spearman: Estimate
    """Correlation of the ranks."""

    sign_agreement: Estimate
    """Share of edges with the same sign."""

    top_overlap: Estimate
    """Of the tenth of edges with the largest |exact|, the share that is also in the tenth with
    the largest |approximation|."""

    median_relative_error: Estimate
    """Median of |approximation - exact| / |exact|."""

    @property
    def table(self) -> dict[str, object]:
        """The agreement as plain data; `agreement_from` takes it back."""
        return {
            name: value._asdict() if isinstance(value, Estimate) else value
            for name, value in vars(self).items()
        }


def agreement_from(table: Mapping[str, object]) -> Agreement:
    """Make an agreement from plain data.

    Raises:
        TypeError: A field is missing or unknown.
    """
    return Agreement(
        **{
            name: Estimate(**value) if isinstance(value, dict) else value  # type: ignore[arg-type]
            for name, value in table.items()
        }
    )


def compare(
    model: str,
    method: str,
    approximation: Sequence[float],
    exact: Sequence[float],
    resamples: int = RESAMPLES,
) -> Agreement:
    """Compare a method's scores with the exact effects of the same edges.

    Args:
        model: The model's name, for the record.
        method: The method's name, for the record.
        approximation: The method's score of each edge.
        exact: The exact effect of each edge.
        resamples: How many times the edges are drawn anew, with repetition, for the intervals.
    """
    edges = len(exact)
    generator = np.random.default_rng(0)
    blocks = []
    for start in range(0, 1 + resamples, max(1, _VALUES // max(1, edges))):
        rows = min(max(1, _VALUES // max(1, edges)), 1 + resamples - start)
        picks = generator.integers(max(1, edges), size=(rows, edges))
        if start == 0:
            picks[0] = np.arange(edges)  # the sample itself comes first
        blocks.append(_statistics(np.asarray(approximation)[picks], np.asarray(exact)[picks]))
    found = np.concatenate(blocks, 1)
    return Agreement(model, method, edges, *(_estimate(row[0], row[1:]) for row in found))


def compare_all(model: str, rows: Sequence[MeasuredEdge]) -> tuple[Agreement, ...]:
    """Compare each method of a finished sample with the exact effects."""
    exact = [row.exact for row in rows if row.exact is not None]
    assert len(exact) == len(rows), "an edge has no exact effect yet"
    methods = rows[0].scores if rows else {}
    return tuple(compare(model, m, [row.scores[m] for row in rows], exact) for m in methods)


def view(agreements: Sequence[Agreement]) -> RenderableType:
    """Lay out agreements for a terminal, each interval below its value."""
    table = open_table()
    for title in TITLES[:2]:
        table.add_column(title, overflow="fold")
    for title in TITLES[2:]:
        table.add_column(title, justify="right", no_wrap=True)
    for index, agreement in enumerate(agreements):
        values, intervals = shown_texts(agreement)
        if index and agreements[index - 1].model == agreement.model:
            values[0] = ""
        last = index + 1 == len(agreements) or agreements[index + 1].model != agreement.model
        cells = zip(values, intervals, strict=True)
        table.add_row(
            *(Text.assemble(value, (f"\n{interval}", "dim")) for value, interval in cells),
            end_section=last,
        )
    heading = Text("Faithfulness: scores against the exact effects of the same edges", style="bold")
    return Group(heading, Text(""), Fitted(table, 2), Text(explanation(agreements), style="dim"))


def explanation(agreements: Sequence[Agreement]) -> str:
    """How to read a table of agreements."""
    edges = " or ".join(str(n) for n in sorted({agreement.edges for agreement in agreements}))
    return (
        f"{edges} edges per model, a third each from the strongest, the middle and the rest; with "
        "each value its 95 % bootstrap interval over edges. Top 10 %: of the strongest edges, the "
        "share that the method also has there; error: median of |score - exact| / |exact|."
    )


def shown_texts(agreement: Agreement) -> tuple[list[str], list[str]]:
    """What tables show of an agreement, under `TITLES`: the values, and their intervals."""
    percent = {"sign_agreement", "top_overlap", "median_relative_error"}
    values, intervals = [agreement.model, agreement.method], ["", ""]
    for name, estimate in vars(agreement).items():
        if isinstance(estimate, Estimate):
            value, low, high = (
                "-" if x is None else f"{100 * x:.0f}" if name in percent else f"{x:.2f}"
                for x in estimate
            )
            values.append(f"{value} %" if name in percent else value)
            intervals.append(f"{low}..{high}")
    return values, intervals


def _statistics(approximation: Array, exact: Array) -> Array:
    """Every number of an agreement, in its order, for many samples at once: [number, sample]."""
    from scipy.stats import rankdata

    if not exact.shape[1]:
        return np.full((5, len(exact)), np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        error = np.abs(approximation - exact) / np.abs(exact)
    return np.stack(
        [
            _correlation(approximation, exact),
            _correlation(rankdata(approximation, axis=1), rankdata(exact, axis=1)),
            (np.sign(approximation) == np.sign(exact)).mean(1),
            (_top(approximation) & _top(exact)).sum(1) / _top(exact).sum(1),
            np.median(np.where(approximation == exact, 0, error), 1),
        ]
    )


def _correlation(left: Array, right: Array) -> Array:
    left, right = _centred(left), _centred(right)
    with np.errstate(divide="ignore", invalid="ignore"):
        return (left * right).sum(1) / np.sqrt((left**2).sum(1) * (right**2).sum(1))


def _centred(values: Array) -> Array:
    """Deviations from each sample's mean, as shares of the largest: squares stay above 0."""
    deviations = values - values.mean(1, keepdims=True)
    deviations[np.ptp(values, axis=1) == 0] = 0  # the mean of equal numbers may be off by rounding
    largest = np.abs(deviations).max(1, keepdims=True)
    return deviations / np.where(largest > 0, largest, 1)


def _top(values: Array) -> npt.NDArray[np.bool_]:
    """Which values of each sample are in the top tenth by size; of equals, the first."""
    count = max(1, round(TOP * values.shape[1]))
    order = np.argsort(-np.abs(values), axis=1, kind="stable")
    top = np.zeros(values.shape, dtype=bool)
    np.put_along_axis(top, order[:, :count], True, axis=1)
    return top


def _estimate(value: float, resampled: Array) -> Estimate:
    # A sample may hold one edge only, and then has no correlation.
    resampled = np.sort(resampled[~np.isnan(resampled)])
    ends = [np.nan, np.nan]
    if len(resampled):
        # Values that occur, not means of two: those of infinite errors would not be numbers.
        ends = [resampled[round(q * (len(resampled) - 1))] for q in (0.025, 0.975)]
    return Estimate(*(float(x) if np.isfinite(x) else None for x in (value, *ends)))
