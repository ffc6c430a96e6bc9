"""Slack: how near a decimal must be to a number that it stands for.

>>> within_slack(Fraction(1, 12), Fraction("0.083333"))
True
"""

from fractions import Fraction

SLACK = Fraction(1, 10**6)
"""How far a decimal may lie from what is no decimal, as a part of its size: 3.141593 is pi."""
_SIXTH_PLACE = Fraction(5, 10**7)
_SMALL = Fraction(5, 10**6)


def within_slack(one: Fraction, two: Fraction) -> bool:
    """Whether a decimal is near enough to a number that is none.

    A part in a million, or of small numbers half of the sixth place (0.083333 is a twelfth), but
    no more than five parts in a million.
    """
    size = max(abs(one), abs(two))
    return abs(one - two) <= max(SLACK * size, min(_SIXTH_PLACE, _SMALL * size))
