"""Slopes along a training."""

import numpy as np

from probe.stats._trajectory import question_slopes


def test_slopes_are_those_of_numpys_least_squares():
    generator = np.random.default_rng(0)
    steps, values = [3, 10, 40, 200], generator.normal(size=(4, 7))
    expected = np.polyfit(np.log(steps), values, 1)[0]
    np.testing.assert_allclose(question_slopes(values, steps), expected, rtol=1e-12)


def test_what_stays_has_slope_zero():
    assert question_slopes(np.full((3, 2), 5.0), [1, 2, 8]).tolist() == [0.0, 0.0]


def test_rounding_is_no_drift():
    """The same model again differs by rounding, which has a sign, and so a small p."""
    noise = 1e-16 * np.arange(1, 9).reshape(4, 2)
    assert question_slopes(noise, [1, 2, 4, 8]).tolist() == [0.0, 0.0]
