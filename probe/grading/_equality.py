r"""Equality: do two final answers mean the same?

Most pairs that are graded are two numbers, or two formulas that differ. So numbers are compared as
fractions, and formulas by their values (`_formulas`), before `math-verify`, which may simplify
and solve, decides what is left. Where no decimal point is written, everything is exact.

    >>> same_number("1,024", r"1.024 \times 10^{3}"), same_number("1/3", "0.333333")
    (True, True)
    >>> same_number("2^{50}", "x"), same_answer("2^{50}-1", "2^{50}")
    (None, False)
    >>> same_answer("4210_5", "4210_{7}"), same_answer("29", "29 km/h")
    (False, True)
"""

import re
from fractions import Fraction
from typing import NamedTuple

from probe.grading._notation import Quantity, first_sentence, known_unit, quantity, tidy
from probe.grading._slack import within_slack as within_slack

LONGEST = 20_000
"""Longest text that is read as mathematics; a longer one is only compared as it stands."""

_LAYOUT = re.compile(r"\\?\$|\\left(?![a-z])|\\right(?![a-z])|\\[,;:!]|(?<!\\)\\ ")
_SPACE = re.compile(r"(?<!\w)\s+|\s+(?!\w)")
_FRACTION = re.compile(r"\\[dt]frac(?![a-z])")
_NUMBER = re.compile(
    r"(?P<sign>[+-]?)(?P<whole>\d{1,3}(?:[, ']\d{3})+|\d{1,2}(?:,\d{2})+,\d{3}|\d*)(?P<rest>\.\d*)?"
    r"(?:\\overline\{(?P<again>\d{1,60})\})?"
    r"(?:(?:[eE]|\\(?:times|cdot)10\^)\{?(?P<power>[+-]?\d{1,4})\}?)?"
    r"|(?P<minus>[+-]?)(?:(?P<mixed>\d+)[ ]?)??"
    r"(?:\\frac\{(?P<above>-?\d+)\}\{(?P<below>-?\d+)\}|(?P<over>\d+)/(?P<under>-?\d+))"
)
_POWER = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)[eE]([+-]?\d+)(?![\w.])")
_DOLLAR = re.compile(r"(?<!\\)\$")
_BASES = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen"),
)
_BASED = re.compile(
    r"\(?(?P<digits>[0-9A-Za-z]+(?:\.[0-9A-Za-z]+)?)\)?"
    r"(?:_\{?\(?(?:base)?(?P<base>\d{1,2}|[a-z]+)\)?\}?|\(?(?:in)?base(?P<named>\d{1,2}|[a-z]+)\)?)"
)
_COMPUTER = re.compile(r"0([bxo])([0-9A-Fa-f]+)")
_TIME = re.compile(
    r"(?P<hour>\d{1,2})(?::(?P<minute>\d{2}))?\s{0,3}(?P<half>[aApP])?\.?(?:[mM]\.?)?"
)


def same_answer(gold: str, answer: str) -> bool:
    """Whether two final answers are the same text, number, quantity, set or formula.

    There is no time limit here. 3.2e4 is read as 3.2 times a power of ten. A unit, currency or
    base that one of them leaves out is no difference; one that both have must be the same.
    """
    if plain(gold) == plain(answer):
        return True
    if max(len(gold), len(answer)) > LONGEST:
        return False
    one, two = tidy(gold), tidy(answer)
    if _same_tidy(one, two):
        return True
    head = None if first_sentence(one) else first_sentence(two)
    return head is not None and _same_tidy(one, tidy(head))


def plain(text: str) -> str:
    """An answer without what only lays it out: dollars, sizes of brackets and fractions, spaces."""
    text = text.replace("{,}", ",").replace("{-}", "-").replace("\N{MINUS SIGN}", "-")
    text = _FRACTION.sub(r"\\frac", _LAYOUT.sub("", text))
    return _SPACE.sub("", text.strip().rstrip(".")).strip()


def same_number(gold: str, answer: str) -> bool | None:
    """Whether two answers are the same number; None where one of them is no plain number.

    A decimal may stand for a fraction that is none, within `within_slack`.
    """
    one, two = _number(plain(gold)), _number(plain(answer))
    if one is None or two is None:
        return None
    if one.value == two.value:
        return True
    if one.value.denominator == 1 or two.value.denominator == 1:
        return False
    return one.decimal != two.decimal and within_slack(one.value, two.value)


class _Number(NamedTuple):
    value: Fraction
    decimal: bool


def _number(text: str) -> _Number | None:
    found = _NUMBER.fullmatch(text)
    if found is None or not any(character.isdigit() for character in text):
        return None
    part = found.groupdict()
    if part["above"] or part["over"]:
        below = int(part["below"] or part["under"])
        if not below:
            return None
        value = Fraction(int(part["above"] or part["over"]), below) + int(part["mixed"] or 0)
        return _Number(-value if part["minus"] == "-" else value, decimal=False)
    rest = (part["rest"] or "").removeprefix(".")
    whole = re.sub(r"[, ']", "", part["whole"] or "") or "0"
    value = Fraction(int(whole + rest), 10 ** len(rest))
    if part["again"]:
        if part["rest"] is None:
            return None
        value += Fraction(int(part["again"]), (10 ** len(part["again"]) - 1) * 10 ** len(rest))
    value *= Fraction(10) ** int(part["power"] or 0)
    decimal = part["rest"] is not None and not part["again"]
    return _Number(-value if part["sign"] == "-" else value, decimal)


def _same_tidy(gold: str, answer: str) -> bool:
    """The same of two answers in plain LaTeX."""
    if plain(gold) == plain(answer):
        return True
    for decide in (_same_base, _same_time):
        if (same := decide(gold, answer)) is not None:
            return same
    one, two = quantity(gold), quantity(answer)
    differ = bool(one.unit and two.unit) and one.unit != two.unit
    if differ and (known_unit(one.unit) or known_unit(two.unit)):
        return False
    if "%" in (one.unit, two.unit) and one.unit != two.unit:
        return _same_percent(one, two)
    return _same_value(one.text, two.text)


def _same_percent(gold: Quantity, answer: Quantity) -> bool:
    """Whether a percentage is the same as a number: 50% is 50 without its sign, and one half."""
    numbers = [_number(plain(side.text)) for side in (gold, answer)]
    if None in numbers:
        hundredth = [rf"({side.text})/100" if side.unit else side.text for side in (gold, answer)]
        return _same_value(gold.text, answer.text) or _same_value(*hundredth)
    bare = same_number(gold.text, answer.text) is True
    # A gold of 0.5 is not half a percent.
    one = _number(plain(gold.text))
    if bare and (gold.unit or one is None or abs(one.value) >= 1):
        return True
    shifted = [f"{side.text}e-2" if side.unit else side.text for side in (gold, answer)]
    moved = [
        number and number.value / (100 if side.unit else 1)
        for number, side in zip(numbers, (gold, answer), strict=True)
    ]
    return moved[0] == moved[1] or same_number(*shifted) is True


def _same_value(gold: str, answer: str) -> bool:
    """Whether two numbers or formulas are the same."""
    if not gold or not answer:
        return False
    if (same := same_number(gold, answer)) is not None:
        return same
    from math_verify import LatexExtractionConfig, parse, verify

    from probe.grading._formulas import as_set, same_formula

    # Its LaTeX route is a grammar; its route for plain expressions ends in an eval inside sympy.
    route = [LatexExtractionConfig()]
    texts = [_POWER.sub(r"\1 \\times 10^{\2}", text) for text in (gold, answer)]
    # Formulas in prose have dollars of their own; between two of ours, what is left is the prose.
    texts = [text if _DOLLAR.search(text) else f"${text}$" for text in texts]
    sides = [parse(text, route, parsing_timeout=None) for text in texts]
    if all(sides) and sides[0][-1] != sides[1][-1]:
        try:
            same = same_formula(sides[0][0], sides[1][0])
        except (MemoryError, RecursionError):
            return False
        except Exception:  # sympy fails in every way on what is no formula: then it is undecided
            same = None
        if same is not None:
            return same
    sets = [as_set(text.strip("$")) for text in texts]
    if all(sets) and any(_RELATION.search(text) for text in texts):
        same = same_formula(sets[0], sets[1])
        if same is not None:
            return same
    return bool(verify(*sides, numeric_precision=200, timeout_seconds=None))


_RELATION = re.compile(r"[<>]|\\(?:leq|geq|neq)")


def _same_base(gold: str, answer: str) -> bool | None:
    """Whether two numbers are the same digits in the same base; None where neither says its base.

    A base that one of them leaves out is that of the other, as the question asks for it.
    """
    one, two = _based(gold), _based(answer)
    if one is None and two is None:
        return None
    if one is None or two is None:
        bare = re.fullmatch(r"\(?([0-9A-Za-z]+)\)?", plain(gold if one is None else answer))
        digits = (one or two or ("", 0))[0]
        return bare is not None and bare[1].casefold().lstrip("0") == digits
    return one == two


def _based(text: str) -> tuple[str, int] | None:
    """The digits and the base of a number that says its base."""
    text = re.sub(r"\\(?:text|mathrm|textrm)\s?\{([^{}]*)\}", r"\1", plain(text)).replace(" ", "")
    text = re.sub(r"\\_", "_", text)
    if computer := _COMPUTER.fullmatch(text):
        base = {"b": 2, "o": 8, "x": 16}[computer[1]]
        return computer[2].casefold().lstrip("0"), base
    found = _BASED.fullmatch(text)
    if not found:
        return None
    name = found["base"] or found["named"]
    if not name.isdigit() and name not in _BASES:
        return None
    base = int(name) if name.isdigit() else _BASES.index(name)
    digits = found["digits"].casefold()
    if not 2 <= base <= 36 or (not digits[0].isdigit() and base <= 10):
        return None
    try:
        int(digits.replace(".", ""), base)
    except ValueError:
        return None
    return digits.lstrip("0"), base


def _same_time(gold: str, answer: str) -> bool | None:
    """Whether two times of day are the same; None where neither is one."""
    sides = [
        _TIME.fullmatch(re.sub(r"\\(?:text|mathrm)\s?\{[\s~]*([^{}]*)\}|\\ ", r" \1", side).strip())
        for side in (gold, answer)
    ]
    if None in sides or not any(side and side["minute"] for side in sides):
        return None
    times = []
    for side in sides:
        assert side
        half = (side["half"] or "").casefold()
        times.append((int(side["hour"]), int(side["minute"] or 0), half))
    if not (times[0][2] or times[1][2]) and not all(side and side["minute"] for side in sides):
        return None
    if all(half for _, _, half in times) or not any(half for _, _, half in times):
        return times[0] == times[1]
    clocks = [
        {(h, m), (h % 12 + 12 * (half == "p"), m)} if half else {(h, m)} for h, m, half in times
    ]
    return bool(clocks[0] & clocks[1])
