"""Integration: where on the way from an ablated input to the real one gradients are taken.

The integral of the gradient along the way is the target's difference between its ends. Sums over
points come near it, the nearer the more points; how near is told with the scores. Few points count
as Gauss-Radau quadrature says, which is best where the target is smooth. In trained models it is
rough all along the way, and there evenly spaced points are, once there are enough to follow it.

    >>> radau(3).points
    tensor([0.1551, 0.6449, 1.0000], dtype=torch.float64)
"""

from functools import cache
from math import sinh
from typing import NamedTuple

import torch


class Path(NamedTuple):
    """Points of the way and what each counts."""

    points: torch.Tensor
    """float64 [step], growing; 1, the input as it is, is the last."""

    weights: torch.Tensor
    """float64 [step], of sum 1 but for rounding and the rule's own error."""

    from_mean: bool = False
    """Whether the way begins at the mean of each sequence's own embeddings."""


HERE = Path(torch.ones(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64))
"""No way: the gradient at the input as it is."""


ENOUGH = 20
"""From so many steps on, a way between two inputs that have a size is followed evenly."""

AUTO_STEPS = 60
"""On such a way, so many miss one to two percent in the models that ship."""

MANY = 50
"""So many steps can follow the way from zero; fewer stay where the input still has a size."""

_FIRST = (1 / 12, -1 / 8, 1 / 24)
_LAST = (3 / 8 - 1, 7 / 6 - 1, 23 / 24 - 1)

_STRETCH = 30.0


@cache
def radau(steps: int) -> Path:
    """Gauss-Radau quadrature on [0, 1] with the end 1 among its points.

    It is exact for polynomials up to degree 2 steps - 2, and one step is the input as it is.

    Args:
        steps: How many points.
    """
    if steps == 1:
        return HERE
    import numpy as np
    from scipy.special import roots_jacobi

    inner, weights = roots_jacobi(steps - 1, 1.0, 0.0)  # for the weight 1 - x on [-1, 1]
    weights = weights / (1 - inner)
    points = np.append((inner + 1) / 2, 1.0)
    weights = np.append(weights, 2.0 / steps**2) / 2
    return Path(torch.tensor(points), torch.tensor(weights))


@cache
def even(steps: int) -> Path:
    """Evenly spaced points from half a distance after the start up to the end, 1.

    Beyond the sum of all, the three at each side count more or less, so that it is exact for
    polynomials up to degree 2 (the end-point corrections of Gregory, and of the midpoint rule).
    Up to `ENOUGH` steps these are the points of `radau`.

    Args:
        steps: How many points.
    """
    if steps < ENOUGH:
        return radau(steps)
    points = (torch.arange(steps, dtype=torch.float64) + 0.5) / (steps - 0.5)
    weights = torch.ones(steps, dtype=torch.float64)
    weights[:3] += torch.tensor(_FIRST, dtype=torch.float64)
    weights[-3:] += torch.tensor(_LAST[::-1], dtype=torch.float64)
    return Path(points, weights / (steps - 0.5))


@cache
def from_zero(steps: int) -> Path:
    """Points for a way that begins at zero, close together where norms lose the scale.

    A norm gives an input of any size one size, so on the way to zero nothing fades until its
    epsilon is reached, and behind several norms that is at 1e-10 of the input and less: much of the
    integral lies where evenly spread points never are. With t = sinh(30 s) / sinh(30) the points
    lie evenly in log t, down to 1e-12. Few of them would all be near zero, so up to `MANY` steps
    these are the points of `radau`.

    Args:
        steps: How many points.
    """
    path = radau(steps)
    if steps < MANY:
        return path
    s, weights = path.points, path.weights
    points = (_STRETCH * s).sinh() / sinh(_STRETCH)
    slopes = _STRETCH * (_STRETCH * s).cosh() / sinh(_STRETCH)
    return Path(points, weights * slopes)


def rule_of(steps: int, zero: bool) -> str:
    """The name of what the points are, for the keys of files.

    Args:
        steps: How many points.
        zero: Whether the way begins at zero.
    """
    if zero:
        return "radau-log" if steps >= MANY else "radau"
    return "even" if steps >= ENOUGH else "radau"
