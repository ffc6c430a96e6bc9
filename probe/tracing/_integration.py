"""Integration: where on the way from an ablated input to the real one gradients are taken.

The integral of the gradient along the way is the target's difference between its ends. Sums over
points come near it, the nearer the more points; how near is told with the scores.

    >>> radau(3).points
    tensor([0.1551, 0.6449, 1.0000], dtype=torch.float64)
"""

from functools import cache
from typing import NamedTuple

import torch


class Path(NamedTuple):
    """Points of the way and what each counts."""

    points: torch.Tensor
    """float64 [step], growing; 1, the input as it is, is the last."""

    weights: torch.Tensor
    """float64 [step], of sum 1."""


HERE = Path(torch.ones(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64))
"""No way: the gradient at the input as it is."""


RULE = "radau"
"""What the points of an integral are, in the keys of files."""


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
