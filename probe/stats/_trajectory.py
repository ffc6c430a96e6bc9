"""Trajectories: how steadily a number of each question moves along a training.

>>> question_slopes(np.log([[1.0], [2.0], [4.0]]), [10, 20, 40]).round(6).tolist()
[1.0]
"""

from collections.abc import Sequence

import numpy as np

from probe.metrics import Array
from probe.stats._statistics import without_rounding


def question_slopes(values: Array, steps: Sequence[int]) -> Array:
    """The least-squares slope of each question on the logarithm of the step.

    Args:
        values: Logarithms, [step, question].
        steps: The step of each row; positive, at least two of them apart.

    Returns:
        [question]: 1 where a value grows as the step does, 0 where it stays.
    """
    logs = np.log(np.asarray(steps, dtype=np.float64))
    logs -= logs.mean()
    return without_rounding(logs @ values / (logs @ logs), 1)
