r"""Equality: quick decisions on two final answers, before a computer algebra system is asked.

Most pairs that are graded are two numbers, or two formulas that differ. Simplifying a difference
that is not zero can take minutes, while its value at one point shows it at once; and comparing
after rounding to six decimals takes 2.9e-19 for 1.3e-27. So numbers are compared as fractions, and
formulas by their values at a few points. What this leaves open is for `math-verify`.

    >>> same_number("1,024", r"1.024 \times 10^{3}"), same_number("1/3", "0.333333")
    (True, True)
    >>> same_number("2.88e-19", "1.325e-27"), same_number("x", "1")
    (False, None)
"""

import math
import random
import re
from fractions import Fraction
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sympy import Basic, Expr

_LAYOUT = re.compile(r"\\?\$|\\left(?![a-z])|\\right(?![a-z])|\\[,;:!]|(?<!\\)\\ ")
_SPACE = re.compile(r"(?<!\w)\s+|\s+(?!\w)")
_FRACTION = re.compile(r"\\[dt]frac(?![a-z])")
_NUMBER = re.compile(
    r"(?P<sign>[+-]?)(?P<whole>\d{1,3}(?:,\d{3})+|\d*)(?P<rest>\.\d*)?"
    r"(?:(?:[eE]|\\(?:times|cdot)10\^)\{?(?P<power>[+-]?\d{1,4})\}?)?"
    r"|(?P<minus>[+-]?)(?:\\frac\{(?P<above>-?\d+)\}\{(?P<below>\d+)\}|(?P<over>\d+)/(?P<under>\d+))"
)

DECIMALS = 1e-6
"""How far two answers may lie apart where one of them is a decimal: 0.333333 is a third. Of small
numbers, this many times 5 of their size."""

_EXACT = 1e-12
_DIGITS = 30
_POINTS = 3


def plain(text: str) -> str:
    """An answer without what only lays it out: dollars, sizes of brackets and fractions, spaces."""
    text = text.replace("{,}", ",").replace("{-}", "-").replace("\N{MINUS SIGN}", "-")
    text = _FRACTION.sub(r"\\frac", _LAYOUT.sub("", text))
    return _SPACE.sub("", text.strip().rstrip(".")).strip()


def same_number(gold: str, answer: str) -> bool | None:
    """Whether two answers are the same number; None where one of them is no plain number.

    A decimal may be a fraction that is rounded to six places.
    """
    one, two = _number(plain(gold)), _number(plain(answer))
    if one is None or two is None:
        return None
    if one == two:
        return True
    fraction = any("/" in text or "frac" in text for text in (gold, answer))
    decimal = any("." in text for text in (gold, answer))
    return fraction and decimal and abs(one - two) <= DECIMALS * min(1.0, 5 * float(abs(one)))


def same_formula(gold: "Basic", answer: "Basic") -> bool | None:
    """Whether two formulas have the same values; None where values do not decide.

    Equations are the same where the differences of their sides are, up to a factor. Members of a
    list are compared in order, those of a set in any.
    """
    from math_verify import verify
    from sympy import Eq, Expr, FiniteSet, Interval, Tuple
    from sympy.core.relational import Relational

    if isinstance(gold, Interval) and isinstance(answer, Interval):
        if (gold.left_open, gold.right_open) != (answer.left_open, answer.right_open):
            return False
        return _all(same_formula(gold.start, answer.start), same_formula(gold.end, answer.end))
    if isinstance(gold, Tuple) and isinstance(answer, Tuple):
        if len(gold) != len(answer):
            return False
        return _all(*(same_formula(g, a) for g, a in zip(gold, answer, strict=True)))
    if isinstance(gold, FiniteSet) and isinstance(answer, FiniteSet):
        for item in gold:
            found = [same_formula(item, other) for other in answer]
            if all(same is False for same in found):
                return False
        return None
    if isinstance(gold, Eq) and isinstance(answer, Eq):
        # math-verify solves both, and takes no solution for the same solutions.
        if gold.lhs == answer.lhs:
            same = same_formula(gold.rhs, answer.rhs)
            return verify(gold.rhs, answer.rhs, timeout_seconds=None) if same is None else same
        if not gold.free_symbols | answer.free_symbols:
            return same_formula(gold.rhs, answer.rhs) is True and None
    if isinstance(gold, Eq) and gold.lhs.is_Symbol and isinstance(answer, Expr):
        return same_formula(gold.rhs, answer)  # 5 is an answer to what x = 5 answers
    if isinstance(answer, Eq) and answer.lhs.is_Symbol and isinstance(gold, Expr):
        return same_formula(gold, answer.rhs)
    if isinstance(gold, Relational) and isinstance(answer, Relational):
        if gold.free_symbols != answer.free_symbols:
            return False
        if not (isinstance(gold, Eq) and isinstance(answer, Eq)):
            return None
        pairs = _values(gold.lhs - gold.rhs, answer.lhs - answer.rhs)
        if not pairs or not all(one and two for one, two in pairs):
            return None
        ratio = pairs[0][0] / pairs[0][1]
        return all(_near(one, two * ratio, _EXACT) for one, two in pairs) or None
    if not isinstance(gold, Expr) or not isinstance(answer, Expr):
        return None
    pairs = _values(gold, answer)
    if not pairs:
        return None
    from sympy import Float

    slack = DECIMALS if gold.has(Float) or answer.has(Float) else _EXACT
    return all(_near(one, two, slack) for one, two in pairs)


def _number(text: str) -> Fraction | None:
    found = _NUMBER.fullmatch(text)
    if found is None or not any(character.isdigit() for character in text):
        return None
    part = found.groupdict()
    if part["above"] or part["over"]:
        below = int(part["below"] or part["under"])
        value = Fraction(int(part["above"] or part["over"]), below) if below else None
        return -value if value and part["minus"] == "-" else value
    digits = (part["whole"].replace(",", "") or "0") + (part["rest"] or "")
    value = Fraction(digits.rstrip(".")) * Fraction(10) ** int(part["power"] or 0)
    return -value if part["sign"] == "-" else value


def _all(*parts: bool | None) -> bool | None:
    """Three-valued and: one that is false decides."""
    if any(part is False for part in parts):
        return False
    return None if None in parts else True


def _near(one: complex, two: complex, slack: float) -> bool:
    largest = max(abs(one), abs(two))
    return abs(one - two) <= max(slack * min(1.0, 5 * largest), _EXACT * largest)


def _values(gold: "Expr", answer: "Expr") -> list[tuple[complex, complex]] | None:
    """The values of two formulas at the same points, or None where they have none."""
    from sympy import (
        Derivative,
        Integral,
        Limit,
        MatrixBase,
        MatrixExpr,
        Product,
        Sum,
        Symbol,
        UnevaluatedExpr,
    )
    from sympy.core.function import AppliedUndef

    open_ended = (Derivative, Integral, Limit, Product, Sum, AppliedUndef, UnevaluatedExpr)
    matrices = (MatrixBase, MatrixExpr)
    for side in (gold, answer):
        # A word is a symbol, and so is each letter of it elsewhere: math-verify knows how.
        if isinstance(side, Symbol) or side.has(*open_ended, *matrices):
            return None
    names = sorted(map(str, gold.free_symbols | answer.free_symbols))
    pairs = []
    for point in range(_POINTS if names else 1):
        draw = random.Random(point)
        at = {name: draw.uniform(0.3, 2.7) for name in names}
        pair = []
        for side in (gold, answer):
            value = side.evalf(_DIGITS, subs={s: at[str(s)] for s in side.free_symbols})
            if not value.is_number:
                return None
            number = complex(value)
            if not (math.isfinite(number.real) and math.isfinite(number.imag)):
                return None
            pair.append(number)
        pairs.append((pair[0], pair[1]))
    return pairs
