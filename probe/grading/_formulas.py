r"""Formulas: whether two of sympy's expressions are the same, exactly.

Numbers that are fractions are compared as such. Others are evaluated to as many digits as it takes
to tell them apart: 20 where they differ there, and where they do not, their difference to 1,000.
Formulas with variables are compared at several points, which are fractions, to 200. So nothing is
lost to rounding: 2^50 - 1 is not 2^50, and e^-1000 is not 0. A decimal point makes an expression a
decimal, which may stand for what it is near (`probe.grading.within_slack`).
"""

import random
import re
from fractions import Fraction
from itertools import permutations
from typing import TYPE_CHECKING

from probe.grading._slack import within_slack

if TYPE_CHECKING:
    from sympy import Basic, Expr, Set

DIGITS = 30
"""How many digits show at once that two values differ."""

MOST_DIGITS = 1000
"""To how many digits a difference is computed before it counts as none."""

AT_POINTS = 200
"""The same at a point of a formula with variables."""

POINTS = (1, 1, -1)
"""The signs of the points at which formulas with variables are compared."""

_OR = re.compile(
    r"\\(?:text|mathrm)\{\s*or\s*\}|\bor\b|\\lor(?![a-z])|\\cup(?![a-z])|\\vee(?![a-z])"
)
_AND = re.compile(r"\\(?:text|mathrm)\{\s*and\s*\}|\band\b|\\(?:land|wedge)(?![a-z])|,")
_MOST_ORDERED = 8


def same_formula(gold: "Basic", answer: "Basic") -> bool | None:
    """Whether two formulas have the same values; None where values do not decide.

    Equations are the same where the differences of their sides are, up to a factor; inequalities,
    up to one that is positive. Members of a list are compared in order, those of a set in any.
    """
    from sympy import Eq, Expr, FiniteSet, Interval, MatrixBase, Tuple, Union
    from sympy.core.relational import Relational

    if isinstance(gold, Interval) and isinstance(answer, Interval):
        if (gold.left_open, gold.right_open) != (answer.left_open, answer.right_open):
            return False
        return _all(same_formula(gold.start, answer.start), same_formula(gold.end, answer.end))
    if isinstance(gold, Tuple) and isinstance(answer, Tuple):
        if len(gold) != len(answer):
            return False
        return _all(*(same_formula(g, a) for g, a in zip(gold, answer, strict=True)))
    if isinstance(gold, MatrixBase) and isinstance(answer, MatrixBase):
        if gold.shape != answer.shape:
            return None
        return _all(*(same_formula(g, a) for g, a in zip(gold, answer, strict=True)))
    if isinstance(gold, FiniteSet) and isinstance(answer, FiniteSet):
        return _same_members(gold.args, answer.args)
    if isinstance(gold, Union) and isinstance(answer, Union):
        return _same_members(gold.args, answer.args) or None
    if isinstance(gold, Eq) and isinstance(answer, Eq):
        # math-verify solves both, and takes no solution for the same solutions.
        if gold.lhs == answer.lhs:
            same = same_formula(gold.rhs, answer.rhs)
            return _verified(gold.rhs, answer.rhs) if same is None else same
        if not gold.free_symbols | answer.free_symbols:
            return same_formula(gold.rhs, answer.rhs) is True and None
    if isinstance(gold, Eq) and gold.lhs.is_Symbol and isinstance(answer, Expr):
        return same_formula(gold.rhs, answer)  # 5 is an answer to what x = 5 answers
    if isinstance(answer, Eq) and answer.lhs.is_Symbol and isinstance(gold, Expr):
        return same_formula(gold, answer.rhs)
    if isinstance(gold, Relational) and isinstance(answer, Relational):
        return _same_relation(gold, answer)
    if not isinstance(gold, Expr) or not isinstance(answer, Expr):
        return None
    return _same_expression(gold, answer)


def as_set(text: str) -> "Set | None":
    """The real numbers that an interval or inequality in one variable means; None if it is none.

    `x < 1 or x > 3` is a union, `x > 1 and x < 3` an intersection.
    """
    from math_verify import LatexExtractionConfig, parse
    from sympy import Intersection, Interval, Set, Union

    pieces = []
    for piece in _OR.split(text):
        parts: list[Set] = []
        whole = piece if re.search(r"[(\[\\]", piece) and not re.search("[<>]|eq", piece) else None
        for part in [whole] if whole else _AND.split(piece):
            if not part.strip():
                continue
            parsed = parse(f"${part.strip()}$", [LatexExtractionConfig()], parsing_timeout=None)
            part_set = _solution_set(parsed[0]) if parsed else None
            if part_set is None:
                return None
            parts.append(part_set)
        if not parts:
            return None
        pieces.append(Intersection(*parts))
    found = Union(*pieces)
    kinds = (Interval, Union)
    return found if isinstance(found, kinds) else None


def _solution_set(parsed: object) -> "Set | None":
    from sympy import Intersection, Set
    from sympy.core.relational import Relational

    if isinstance(parsed, Set):
        return parsed
    parts = getattr(parsed, "_unsorted_args", None) or [parsed]
    if not all(isinstance(part, Relational) for part in parts):
        return None
    symbols = {str(symbol) for part in parts for symbol in part.free_symbols}
    if len(symbols) != 1:
        return None
    try:
        return Intersection(*(part.as_set() for part in parts))
    except Exception:  # sympy solves few inequalities, and says so in many ways
        return None


def _same_relation(gold: "Basic", answer: "Basic") -> bool | None:
    from sympy import Eq, Ne

    if {str(s) for s in gold.free_symbols} != {str(s) for s in answer.free_symbols}:
        return False
    one, two = gold.lhs - gold.rhs, answer.lhs - answer.rhs
    kinds = [type(side).__name__ for side in (gold, answer)]
    # a < b is b > a
    turned = {"GreaterThan": "LessThan", "StrictGreaterThan": "StrictLessThan"}
    for place, kind in enumerate(kinds):
        if kind in turned:
            kinds[place] = turned[kind]
            one, two = (-one, two) if place == 0 else (one, -two)
    if kinds[0] != kinds[1] or not one.free_symbols:
        return None
    at = _point(0, sorted(str(symbol) for symbol in one.free_symbols))
    values = [side.subs({s: at[str(s)] for s in side.free_symbols}) for side in (one, two)]
    if not all(value.is_number and value.is_finite and value.is_zero is False for value in values):
        return None
    ratio = values[0] / values[1]
    if not isinstance(gold, Eq | Ne) and not ratio.is_positive:
        return None
    return _same_expression(one, two * ratio) or None


def _same_members(gold: tuple["Basic", ...], answer: tuple["Basic", ...]) -> bool | None:
    """Whether two sets have the same members."""
    grid = [[same_formula(one, two) for two in answer] for one in gold]
    columns = list(zip(*grid, strict=True))
    if any(all(same is False for same in row) for row in (*grid, *columns)):
        return False
    if any(None in row for row in grid):
        return None
    if len(gold) != len(answer):
        return all(any(row) for row in (*grid, *columns))
    if len(gold) > _MOST_ORDERED:
        return all(any(row) for row in (*grid, *columns))
    orders = permutations(range(len(answer)))
    return any(all(row[place] for row, place in zip(grid, order, strict=True)) for order in orders)


def _same_expression(gold: "Expr", answer: "Expr") -> bool | None:
    """Whether two expressions have the same values; None where they have none."""
    from sympy import (
        Derivative,
        Float,
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

    closed = []
    for side in (gold, answer):
        # A word is a symbol, and so is each letter of it elsewhere: math-verify knows how.
        if isinstance(side, Symbol) or side.has(AppliedUndef, UnevaluatedExpr):
            return None
        if side.has(MatrixBase, MatrixExpr):
            return None
        if side.has(Derivative, Integral, Limit, Product, Sum):
            side = side.doit()
            if side.has(Derivative, Integral, Limit, Product, Sum):
                return None
        closed.append(side)
    decimal = [side.has(Float) for side in closed]
    names = sorted({str(s) for side in closed for s in side.free_symbols})
    decided = False
    for place, sign in enumerate(POINTS if names else POINTS[:1]):
        at = _point(place, names, sign)
        values = [side.subs({s: at[str(s)] for s in side.free_symbols}) for side in closed]
        if sign < 0 and not all(value.is_real for value in values):
            continue  # roots and logarithms: identities are meant for where they are real
        same = _same_constant(values[0], values[1], decimal, AT_POINTS if names else MOST_DIGITS)
        if same is None:
            return None
        if not same:
            return False
        decided = True
    return decided or None


def _point(place: int, names: list[str], sign: int = 1) -> dict[str, "Basic"]:
    from sympy import Rational

    draw = random.Random(place)
    return {name: sign * Rational(draw.randint(31, 269), 97) for name in names}


def _same_constant(one: "Expr", two: "Expr", decimal: list[bool], most: int) -> bool | None:
    """Whether two expressions without variables have the same value; None where one has none."""
    from sympy import nan, zoo

    if any(value.has(nan, zoo) for value in (one, two)):
        return None
    one, two = (_evaluated(value) for value in (one, two))
    if one.is_infinite or two.is_infinite:
        return bool(one == two)
    if one.is_Rational and two.is_Rational and not any(decimal):
        return bool(one == two)
    near = [value.evalf(DIGITS) for value in (one, two)]
    if not all(value.is_number and value.is_finite for value in near):
        return None
    distance, size = abs(near[0] - near[1]), max(abs(near[0]), abs(near[1]))
    if any(decimal):
        whole = [
            value.is_Integer for value, point in zip((one, two), decimal, strict=True) if not point
        ]
        if decimal[0] == decimal[1] or any(whole):
            return bool(distance <= size * 10 ** -(DIGITS // 2))
        return within_slack(_fraction(size), _fraction(size) - _fraction(distance))
    if distance > size * _tiny(DIGITS - 10):
        return False
    if size == 0:
        return True
    # What cancels to the last digit keeps no precision.
    parts = (one - two).evalf(DIGITS, maxn=most).as_real_imag()
    return all(part == 0 or getattr(part, "_prec", 0) <= 1 for part in parts)


def _evaluated(value: "Expr") -> "Expr":
    """What was left as it was written, carried out: factorials, powers."""
    return value.doit() if not value.is_Rational else value


def _tiny(digits: int) -> "Expr":
    from sympy import Rational

    return Rational(1, 10**digits)


def _fraction(value: "Expr") -> Fraction:
    from sympy import Rational

    exact = Rational(value)
    return Fraction(int(exact.p), int(exact.q))


def _verified(gold: "Basic", answer: "Basic") -> bool:
    """What math-verify says, without its rounding to 15 digits."""
    from math_verify import verify

    return bool(verify(gold, answer, numeric_precision=200, timeout_seconds=None))


def _all(*parts: bool | None) -> bool | None:
    """Three-valued and: one that is false decides."""
    if any(part is False for part in parts):
        return False
    return None if None in parts else True
