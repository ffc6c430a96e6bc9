"""Integration: where on the way from an ablated input to the real one gradients are taken.

The integral of the gradient along the way is the target's difference between its ends. Sums over
points come near it, the nearer the more points; how near is told with the scores.

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


HERE = Path(torch.ones(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64))
"""No way: the gradient at the input as it is."""


MANY = 50
"""So many steps can follow the way from zero; fewer stay where the input still has a size."""

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
    s, weights = path
    points = (_STRETCH * s).sinh() / sinh(_STRETCH)
    slopes = _STRETCH * (_STRETCH * s).cosh() / sinh(_STRETCH)
    return Path(points, weights * slopes)


def rule_of(steps: int, zero: bool) -> str:
    """The name of what the points are, for the keys of files.

    Args:
        steps: How many points.
        zero: Whether the way begins at zero.
    """
    return "radau-log" if zero and steps >= MANY else "radau"
