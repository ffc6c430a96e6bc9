"""Temperature: how much surer or less sure a model would have to be for a given loss.

Dividing logits by a temperature changes how sure a model is and nothing else: not which token it
finds likeliest, nor what goes on inside.

    >>> temperatures = matched_temperatures(model, sequences, losses=[0.5, 0.2])
    >>> edges = probe.attribute(model, sequences, target=Target("loss", temperatures))
"""

from collections.abc import Hashable, Sequence
from math import log
from pathlib import Path

import numpy as np
import torch

from probe.attribution._batching import Batching, BatchSize
from probe.attribution._methods import make_batch
from probe.attribution._sequences import Given, TokenSequence, as_sequences
from probe.errors import ProbeError
from probe.models import Model, as_model
from probe.tracing import MemoryMode, temperature_losses

RANGE = 64.0
"""Temperatures are looked for from 1 / 64 to 64."""

LEAST_SLOPE = 0.1
"""A single loss must follow the temperature at least as its tenth root. Where two tokens nearly tie
it does not: no temperature breaks a tie, while slopes grow with 1 / temperature."""

SMALLEST_LOSS = 1e-6
"""Smaller losses count as this one: float32 hardly tells them apart."""

_POINTS = 257

# Temperatures are looked for up to so many points from 1 first, which takes a quarter of the time:
# from 0.46 to 2.2. A spline through some points more is there what one through all of them is.
_NEAR, _BESIDE = 24, 10


class NoTemperature(ProbeError):
    """No temperature in `RANGE` gives a loss."""


def mean_losses(
    model: Model | str | Path,
    sequences: Given,
    temperatures: Sequence[float],
    batch_size: BatchSize = "auto",
) -> torch.Tensor:
    """The loss of each sequence with logits divided by each of some temperatures.

    One forward pass.

    Args:
        model: A model from `load_model`, or its reference.
        sequences: Prompts with their answers, as `probe.attribute` takes them.
        temperatures: The temperatures.
        batch_size: How many sequences run at once.

    Returns:
        float64 [temperature, sequence], in nats: `EdgeScores.losses`, at temperature 1.

    Raises:
        ProbeError: A temperature that is not positive, or a sequence that cannot be read.
    """
    model = as_model(model)
    texts = as_sequences(model, sequences)
    grid = torch.tensor(list(temperatures), dtype=torch.float64)
    if not ((grid > 0) & grid.isfinite()).all():
        raise ProbeError(f"temperatures are {[*temperatures]}; they must be above 0")
    losses = torch.zeros(len(grid), len(texts), dtype=torch.float64)

    def score(indices: list[int], memory: MemoryMode) -> torch.Tensor:
        return temperature_losses(model, make_batch([texts[i] for i in indices]), grid)

    batching = Batching(model, model.graph("block"), batch_size, recompute=False)
    for indices, found in batching.run([text.length for text in texts], score):
        losses[:, indices] = found
    return losses


def matched_temperature(
    model: Model | str | Path,
    sequences: Given,
    loss: float,
    batch_size: BatchSize = "auto",
) -> float:
    """The temperature at which the mean loss of some sequences is a given one.

    The loss is convex in 1 / temperature: it falls to its minimum, where the model is as sure as
    it should be on these sequences, and rises again. So up to two temperatures give one loss; the
    one that is nearer to 1, as a factor, is meant. It costs one forward pass, and is as near as
    those of `matched_temperatures`.

    Args:
        model: A model from `load_model`, or its reference.
        sequences: Prompts with their answers, as `probe.attribute` takes them.
        loss: The mean over sequences that is wanted, in nats.
        batch_size: How many sequences run at once.

    Returns:
        The temperature, between 1 / 64 and 64.

    Raises:
        NoTemperature: No temperature in this range gives the loss.
        ProbeError: There are no sequences, or one cannot be read.
    """
    model = as_model(model)
    texts = as_sequences(model, sequences)
    if not texts:
        raise ProbeError("there are no sequences, so no temperature can be found")
    losses = mean_losses(model, texts, _grid().exp().tolist(), batch_size).mean(1)
    found = _where(losses, loss, _grid())
    if found is None:
        raise NoTemperature(
            f"no temperature from 1/{RANGE:g} to {RANGE:g} gives {model.reference} a mean loss of "
            f"{loss:.4g} on these sequences; the lowest is {float(losses.min()):.4g}"
        )
    return found


def matched_temperatures(
    model: Model | str | Path,
    sequences: Given,
    losses: Sequence[float],
    batch_size: BatchSize = "auto",
) -> list[float | None]:
    """The temperature at which each of some sequences has a given loss, each one its own.

    A forward pass gives each sequence's loss at 69 temperatures about 1, and another one at all
    257 where the wanted loss is not among these; a cubic spline of its logarithm gives what lies
    between them. Losses then are off by less than 1e-4 of themselves, beside the 1e-7 nats to which
    float32 knows them. Where two temperatures give the loss, the one that is nearer to 1, as a
    factor, is meant.

    Args:
        model: A model from `load_model`, or its reference.
        sequences: Prompts with their answers, as `probe.attribute` takes them.
        losses: What the loss of each is to be, in nats; less than `SMALLEST_LOSS` counts as that.
        batch_size: How many sequences run at once.

    Returns:
        [sequence]: the temperature, between 1 / 64 and 64; None where none gives the loss, or where
        the loss hardly follows it on the way from 1, by less than `LEAST_SLOPE` says.

    Raises:
        ProbeError: Not as many losses as sequences, or a sequence that cannot be read.
    """
    model = as_model(model)
    texts = as_sequences(model, sequences)
    if len(losses) != len(texts):
        raise ProbeError(f"{len(losses)} losses were given for {len(texts)} sequences")
    return LossCurves(model, batch_size).temperatures(texts, losses)


class LossCurves:
    """How the losses of sequences follow the temperature; a sequence that comes again is known."""

    def __init__(self, model: Model, batch_size: BatchSize = "auto") -> None:
        """Say whose losses.

        Args:
            model: The model.
            batch_size: How many sequences run at once.
        """
        self._model, self._batch_size = model, batch_size
        self._near: dict[Hashable, torch.Tensor] = {}
        self._whole: dict[Hashable, torch.Tensor] = {}

    def temperatures(
        self, texts: Sequence[TokenSequence], losses: Sequence[float]
    ) -> list[float | None]:
        """What `matched_temperatures` gives, of as many losses as sequences."""
        wanted = [max(loss, SMALLEST_LOSS) for loss in losses]
        middle = _POINTS // 2
        edge = _NEAR + _BESIDE
        near = _grid()[middle - edge : middle + edge + 1]
        curves = self._read(self._near, texts, near)
        places = [_where(*pair, near) for pair in zip(curves, wanted, strict=True)]
        furthest = float(near[edge + _NEAR]) + 1e-9
        far = [i for i, p in enumerate(places) if p is None or abs(log(p)) > furthest]
        whole = self._read(self._whole, [texts[i] for i in far], _grid())
        for index, curve in zip(far, whole, strict=True):
            places[index] = _where(curve, wanted[index], _grid())
        owns = [float(curve[edge]) for curve in curves]  # at temperature 1
        return [
            place if place and _follows(own, loss, place) else None
            for own, loss, place in zip(owns, wanted, places, strict=True)
        ]

    def _read(
        self,
        known: dict[Hashable, torch.Tensor],
        texts: Sequence[TokenSequence],
        points: torch.Tensor,
    ) -> list[torch.Tensor]:
        """The losses of each sequence at some points of the grid: [temperature]."""
        keys = [(tuple(text.prompt), tuple(text.answer)) for text in texts]
        new = {key: text for key, text in zip(keys, texts, strict=True) if key not in known}
        if new:
            temperatures = points.exp().tolist()
            found = mean_losses(self._model, [*new.values()], temperatures, self._batch_size)
            known.update(zip(new, found.T, strict=True))
        return [known[key] for key in keys]


def _follows(own: float, wanted: float, place: float) -> bool:
    """Whether a loss goes from one to another as the temperature does from 1 to a place."""
    moved = abs(log(wanted / max(own, SMALLEST_LOSS)))
    # Of a loss that is there already, rounding is all that moves.
    return moved >= LEAST_SLOPE * (abs(log(place)) - 1e-6)


def _grid() -> torch.Tensor:
    """Logarithms of the temperatures at which losses are computed."""
    return torch.linspace(-log(RANGE), log(RANGE), _POINTS, dtype=torch.float64)


def _where(losses: torch.Tensor, loss: float, points: torch.Tensor) -> float | None:
    """The temperature nearest to 1 at which losses at points [temperature] of the grid pass one."""
    from scipy.interpolate import CubicSpline

    if loss <= 0:
        return None
    # So far below the smallest loss that may be asked for, rounding is left out of the spline.
    curve = losses.clamp(min=1e-3 * min(loss, SMALLEST_LOSS)).log().numpy()
    roots = CubicSpline(points.numpy(), curve).solve(log(loss), extrapolate=False)
    roots = roots[np.isfinite(roots)]
    return float(np.exp(roots[np.abs(roots).argmin()])) if len(roots) else None
