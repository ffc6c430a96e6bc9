r"""Notation: one way to write what people and models write in many.

Unicode, Markdown, math delimiters, calculator signs (`sqrt(5)`, `<=`) and text wrappers become
plain LaTeX, and what a number counts (units, currency, percent) is split from it. Both the gold
answer and the model's go through here before they are compared, so a change that is harmless on
both sides is enough.

    >>> tidy("**2√5**"), tidy("x² ≤ ½")
    ('2\\sqrt{5}', 'x^{2} \\leq \\frac{1}{2}')
    >>> quantity("€1,450"), quantity("29 km/h")
    (Quantity(text='1,450', unit='€'), Quantity(text='29', unit='km/h'))
"""

import re
import unicodedata
from typing import NamedTuple

_SIGNS = {
    **dict.fromkeys("\u2212\u2010\u2011\ufe63\uff0d\u207b", "-"),
    **dict.fromkeys("×✕✖⨯", r"\times "),
    **dict.fromkeys("·⋅∙•∗", r"\cdot "),
    **dict.fromkeys("\u2223\uff5c", "|"),
    **dict.fromkeys("≤⩽≦", r"\leq "),
    **dict.fromkeys("≥⩾≧", r"\geq "),
    **dict.fromkeys("°º˚", r"^{\circ}"),
    **dict.fromkeys("\u2061\u2062\u200b\u200c\u200d\u200e\u200f\u2060\ufeff\u00ad\u202a\u202c", ""),
    **dict.fromkeys("′’", "'"),
    **dict.fromkeys("⁄∕", "/"),
    "÷": r"\div ",
    "≠": r"\neq ",
    "±": r"\pm ",
    "∓": r"\mp ",
    "≈": r"\approx ",
    "∞": r"\infty ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∈": r"\in ",
    "∅": r"\emptyset ",
    "⌊": r"\lfloor ",
    "⌋": r"\rfloor ",
    "⌈": r"\lceil ",
    "⌉": r"\rceil ",
    "∠": r"\angle ",
    "ℝ": r"\mathbb{R}",
    "ℤ": r"\mathbb{Z}",
    "ℕ": r"\mathbb{N}",
    "ℚ": r"\mathbb{Q}",
    "ℂ": r"\mathbb{C}",
    "∧": r"\land ",
    "∨": r"\lor ",
    "→": r"\to ",
    "…": r"\ldots ",
    "⋯": r"\cdots ",
    "ℓ": r"\ell ",
    "µ": r"\mu ",
}
_GREEK = {
    chr(code): "\\" + name + " "
    for code in (*range(0x391, 0x3AA), *range(0x3B1, 0x3CA))
    if (name := unicodedata.name(chr(code), "").rpartition(" ")[2])
    and (name := {"LAMDA": "LAMBDA", "OMICRON": "", "SIGMA": "SIGMA"}.get(name, name))
    and (name := name.lower() if code >= 0x3B1 else name.capitalize())
}
_TABLE = str.maketrans(_SIGNS | _GREEK)
_RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱˣʸ]+")
_LOWERED = re.compile("[₀₁₂₃₄₅₆₇₈₉₊₋₍₎ₙ]+")
_PIECES = re.compile("[¼½¾⅐-⅞↉]")
_WIDE = re.compile("[\uff01-\uff5e\U0001d400-\U0001d7ff\u3000]+")
_ROOT = re.compile(r"(√|∛|∜)\s?(?=(\(|\{|\d+(?:\.\d+)?|\\?[A-Za-z]+)?)")
_INDEX = {"√": "", "∛": "[3]", "∜": "[4]"}
_CALLED = re.compile(r"(?<![\\A-Za-z])(sqrt|cbrt)\s?\(")
_BOLD = re.compile(r"(?<![\w)}\]*\\])(\*{1,3})(?=[^\s*])([^*\n]+)(?<=\S)\1(?![\w*])")
_SCORED = re.compile(r"(?<![\w)}\]\\])(_{1,3})(?=[^\s_])([^_\n]+)(?<=\S)\1(?!\w)")
_EDGES = re.compile(r"\A[\s*_`~]+|(?<![\\\d])[*_`~]+\Z|[*`~]{2,}\Z")
_WRAPPED = re.compile(
    r"\\(?:textbf|textit|textrm|textsf|mathbf|mathrm|mathit|mathsf|boldsymbol|bm|bf|text|mbox"
    r"|emph|underline|boxed|fbox|operatorname)\s?\{([^{}]*)\}"
)
_NUMERIC = re.compile(r"[\s\d.,/+\-$%:=]*\d[\s\d.,/+\-$%:=]*")
_STYLE = re.compile(
    r"\\(?:displaystyle|textstyle|large|Large|huge|Huge|small|bf|rm|it|limits|nolimits)(?![A-Za-z])"
    r"|\\(?:text)?color\{\w+\}|\\phantom\{[^{}]*\}"
)
_SHORT_FRACTION = re.compile(r"\\[dtc]?frac\s*(?:\{(\d+)\}|(\d))\s*(?:\{(\d+)\}|(\d))")
_WORDS = (
    (re.compile(r"\\(?:le|leqslant|leqq)(?![A-Za-z])|<=|=<"), r"\\leq "),
    (re.compile(r"\\(?:ge|geqslant|geqq)(?![A-Za-z])|>=|=>"), r"\\geq "),
    (re.compile(r"\\lt(?![A-Za-z])|&lt;"), "<"),
    (re.compile(r"\\gt(?![A-Za-z])|&gt;"), ">"),
    (re.compile(r"\\ne(?![A-Za-z])|!=|<>"), r"\\neq "),
    (re.compile(r"(?<![\\A-Za-z])(?:infinity|infty|inf|oo)(?![A-Za-z])"), r"\\infty "),
    (re.compile(r"(?<![\\A-Za-z])pi(?![A-Za-z])"), r"\\pi "),
    (re.compile(r"\\lbrace(?![A-Za-z])"), r"\\{"),
    (re.compile(r"\\rbrace(?![A-Za-z])"), r"\\}"),
    (re.compile(r"(?<=[\w)}\]])\s?\*\*\s?(?=[\w(\-{])"), "^"),
    (re.compile(r"(?<=\d)\s?[xX]\s?(?=10\s?\^)"), r" \\times "),
    (re.compile(r"\^\s?\(([^()]{1,60})\)"), r"^{\1}"),
    (re.compile(r"\^\s?(-?\d{2,}|-\d)"), r"^{\1}"),
    (
        re.compile(
            r"\\(?:degree|degrees)(?![A-Za-z])|\^\s?\\circ(?![A-Za-z])|\^\s?\{\s?\\circ\s?\}"
        ),
        r"^{\\circ}",
    ),
    (re.compile(r"\\(?:cfrac|tfrac|dfrac)(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\(?:quad|qquad|enspace|thinspace)(?![A-Za-z])"), " "),
    (re.compile(r"\A[A-Za-z]\s?\\in(?![A-Za-z])\s?(?=[(\[\\])"), ""),
    (
        re.compile(
            r"\A(?:about|approximately|roughly|exactly|around|approx\.?|\\approx|\\sim|~|=)\s?(?=\S)",
            re.IGNORECASE,
        ),
        "",
    ),
)
_DOLLAR = re.compile(r"(?<!\\)\$")
_SENTENCE = re.compile(r"(?<=[\w$})\]%])[.?!]\s+(?=[A-Z(\"])")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")


def tidy(text: str) -> str:
    """Write an answer as plain LaTeX, without what only lays it out."""
    text = _WIDE.sub(lambda found: unicodedata.normalize("NFKC", found[0]), text)
    text = _RAISED.sub(lambda found: "^{" + _level(found[0]) + "}", text)
    text = _LOWERED.sub(lambda found: "_{" + _level(found[0]) + "}", text)
    text = _PIECES.sub(lambda found: _piece(found[0]), text)
    text = _roots(text).translate(_TABLE)
    text = re.sub(r"[^\S\n]+", " ", text).strip()
    for emphasis in (_BOLD, _SCORED):
        text = emphasis.sub(r"\2", text)
    text = _EDGES.sub("", text.strip("`").strip())
    for opener, closer in (("\\(", "\\)"), ("\\[", "\\]")):
        if opener in text and closer in text:
            text = text.replace(opener, "$").replace(closer, "$")
    text = _STYLE.sub("", text).strip()
    for _ in range(4):
        inner = _unwrapped(text)
        if inner == text:
            break
        text = inner
    text = _called_roots(text)
    for pattern, written in _WORDS:
        text = pattern.sub(written, text)
    text = _SHORT_FRACTION.sub(
        lambda found: rf"\frac{{{found[1] or found[2]}}}{{{found[3] or found[4]}}}", text
    )
    return re.sub(r" +", " ", text).strip().rstrip(".,;:").strip()


def first_sentence(text: str) -> str | None:
    """A number or formula that a sentence follows; None where the answer is no such thing."""
    found = _SENTENCE.search(text)
    if not found:
        return None
    head = text[: found.start()]
    return head if any(map(str.isdigit, head)) and len(_WORD.findall(head)) <= 2 else None


def _level(signs: str) -> str:
    plain = {"⁻": "-", "₋": "-", "⁺": "+", "₊": "+", "ˣ": "x", "ʸ": "y"}
    return "".join(plain.get(sign) or unicodedata.normalize("NFKC", sign) for sign in signs)


def _piece(sign: str) -> str:
    above, _, below = unicodedata.normalize("NFKC", sign).partition("\u2044")
    return rf"\frac{{{above}}}{{{below}}}"


def _roots(text: str) -> str:
    r"""Write √5, √(x+1) and ∛8 as \sqrt."""
    parts, place = [], 0
    for found in _ROOT.finditer(text):
        if found.start() < place:
            continue
        parts.append(text[place : found.start()])
        inner, place = found[2] or "", found.end()
        if inner in ("(", "{"):
            end = _closing(text, place)
            inner, place = text[place + 1 : end], end + 1
        else:
            place += len(inner)
        parts.append(rf"\sqrt{_INDEX[found[1]]}{{{_roots(inner) if '√' in inner else inner}}}")
    return "".join((*parts, text[place:]))


def _called_roots(text: str) -> str:
    for _ in range(20):
        found = _CALLED.search(text)
        if not found:
            break
        end = _closing(text, found.end() - 1)
        index = "[3]" if found[1] == "cbrt" else ""
        inner = text[found.end() : end]
        text = rf"{text[: found.start()]}\sqrt{index}{{{inner}}}{text[end + 1 :]}"
    return text


def _closing(text: str, start: int) -> int:
    """Where the bracket at a place is closed, or the end of the text."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] in "({") - (text[place] in ")}")
        if depth == 0:
            return place
    return len(text)


def _unwrapped(text: str) -> str:
    """A text without the dollars or the command around all of it, or around its numbers."""
    dollars = len(_DOLLAR.findall(text))
    for edge in ("$$", "$"):
        around = text.startswith(edge) and text.endswith(edge) and len(text) > 2 * len(edge)
        if around and dollars == 2 * len(edge):
            return text.strip("$").strip()
    if whole := _WRAPPED.fullmatch(text):
        return whole[1].strip()
    if text.startswith("{") and text.endswith("}") and _closing(text, 0) == len(text) - 1:
        return text[1:-1].strip()
    return _WRAPPED.sub(lambda found: found[1] if _NUMERIC.fullmatch(found[1]) else found[0], text)


class Quantity(NamedTuple):
    """A number or formula and what it counts."""

    text: str
    """The number or formula."""

    unit: str
    """Its unit, currency or `%` in one spelling, or nothing."""


_UNITS = {
    "$": "dollar dollars usd us$ buck bucks \\$",
    "€": "euro euros eur \\euro",
    "£": "pound-sterling gbp \\pounds",
    "¥": "yen jpy yuan cny rmb",
    "₹": "rupee rupees inr rs rs.",
    "¢": "cent cents",
    "%": "percent percentage percents pct \\%",
    "deg": "degree degrees ^{\\circ}",
    "rad": "radian radians",
    "m": "meter meters metre metres",
    "km": "kilometer kilometers kilometre kilometres kms",
    "cm": "centimeter centimeters centimetre centimetres cms",
    "mm": "millimeter millimeters millimetre millimetres",
    "in": "inch inches",
    "ft": "foot feet",
    "yd": "yard yards",
    "mi": "mile miles",
    "g": "gram grams gm",
    "kg": "kilogram kilograms kilo kilos kgs",
    "mg": "milligram milligrams",
    "lb": "pound pounds lbs",
    "oz": "ounce ounces",
    "L": "liter liters litre litres l",
    "mL": "milliliter milliliters ml",
    "s": "second seconds sec secs",
    "min": "minute minutes mins",
    "h": "hour hours hr hrs",
    "day": "days",
    "week": "weeks",
    "month": "months",
    "year": "years yr yrs",
    "am": "a.m. a.m am",
    "pm": "p.m. p.m pm",
    "N": "newton newtons",
    "J": "joule joules",
    "W": "watt watts",
    "kW": "kilowatt kilowatts",
    "V": "volt volts",
    "A": "ampere amperes amp amps",
    "K": "kelvin kelvins",
    "Hz": "hertz",
    "Pa": "pascal pascals",
    "ohm": "ohms",
    "um": "micrometer micrometers micron microns",
    "mph": "",
    "km/h": "kmh kph kmph",
    "m/s": "",
}
_SPELLED = {name: unit for unit, names in _UNITS.items() for name in (unit, *names.split()) if name}
_GENERIC = ("unit", "units", "square units", "cubic units", "sq units", "units^2")
_LARGE = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_NO_UNITS = {
    *("and", "or", "is", "are", "not", "to", "than", "less", "more", "least", "most", "over", "if"),
    *("minus", "plus", "times", "mod", "factorial", "squared", "cubed", "half", "halves", "third"),
    *("thirds", "quarter", "quarters", "when", "for", "where", "with", "choose", "base", "sin"),
    *("cos", "tan", "log", "ln", "exp", "pi", "infinity", "sqrt", "x", "y", "z", "n", "k", "the"),
    *("a", "an", "of", "by", "divided", "dozen", "about", "other"),
}
_BEFORE = re.compile(
    r"\A([+-]?)\s?(US\\?\$|\\\$|\$|[€£¥₹₩₽¢]|USD|EUR|GBP|Rs\.?)\s?(?=[+-]?[\d.(\\])"
)
_NUMBER = re.compile(
    r"\A([+-]?(?:\d[\d,. ]*(?:\{,\}\d{3})*(?:\s?\\(?:times|cdot)\s?10\^(?:\{-?\d+\}|\d))?"
    r"|\d*\s?\\frac\{-?\d+\}\{\d+\}|\d+\s?/\s?\d+|\d+ \d+/\d+|\.\d+))\s?(.*)\Z",
    re.DOTALL,
)
_PAIRED = re.compile(r"\$([^$]+)\$\s?(.*)", re.DOTALL)
_BEHIND = re.compile(
    r"\A(.*?)\s?((?:\\?%|\^\{\\circ\}|(?:\\(?:text|mathrm|mbox|textrm|rm|,|;|!|:)\s?){1,9}"
    r"(?:\{[~\s]*[^{}]*[A-Za-z%][^{}]*\}(?:\^\{?[23]\}?)?)|\\\$|[€£¥₹₩₽¢])\.?(?:\s?[CF])?)\Z",
    re.DOTALL,
)
_COUNTED = re.compile(
    r"[A-Za-z\\$€£¥%][A-Za-z .\-\\$]*(?:\^?\{?[23]\}?)?(?:\s?/\s?[A-Za-z]+(?:\^?\{?[23]\}?)?)?\.?"
)


def quantity(text: str) -> Quantity:
    """Split what a number or formula counts from it; a text that is neither has no unit."""
    unit = ""
    if len(_DOLLAR.findall(text)) == 2 and (parts := _PAIRED.fullmatch(text)):
        text = f"{parts[1].strip()} {parts[2]}".strip()
    before = _BEFORE.match(text)
    if before and not (before[2] == "$" and _enclose(text)):
        unit, text = _unit(before[2]), before[1] + text[before.end() :]
    elif _DOLLAR.match(text) and len(_DOLLAR.findall(text)) % 2:
        unit, text = "$", text[1:].strip()
    number = _NUMBER.match(text)
    if number and number[2] and (counted := _counted(number[2])) is not None:
        return Quantity(number[1].strip() + counted[0], counted[1] or unit)
    if (behind_it := _BEHIND.match(text)) and behind_it[1] and "\\begin" not in text:
        name = re.sub(r"\\(?:text|mathrm|mbox|textrm|rm|[,;!:])|[{}~]", "", behind_it[2])
        counted = _counted(name.strip())
        if counted and not counted[0]:
            return Quantity(behind_it[1].strip(), counted[1] or unit)
    return Quantity(text.strip(), unit)


def _enclose(text: str) -> bool:
    """Whether a text's dollars enclose formulas: each second one is no price's."""
    dollars = [found.end() for found in _DOLLAR.finditer(text)]
    return len(dollars) % 2 == 0 and not any(text[end : end + 1].isdigit() for end in dollars[1::2])


def _counted(words: str) -> tuple[str, str] | None:
    r"""Read what stands behind a number: a power of ten (`million`) and a unit; None if neither."""
    words = re.sub(r"\\(?:text|mathrm|mbox|textrm|rm)\s?(?=\{)|\\[,;!:]|~", " ", words)
    for sign, name in ((r"^{\circ}", " deg "), (r"\mu ", "u"), (r"\Omega", "ohm")):
        words = words.replace(sign, name)
    words = re.sub(r"(?<!\^)\{([^{}]*)\}", r"\1", words).strip().rstrip(".").strip()
    large = ""
    first, _, rest = words.partition(" ")
    if first.casefold() in _LARGE:
        large, words = rf" \times 10^{{{_LARGE[first.casefold()]}}}", rest.removeprefix("of ")
        if not words:
            return large, ""
    if words.casefold() in _GENERIC:
        return large, ""
    unit = _unit(words)
    if unit and unit in _UNITS:
        return large, unit
    if not _COUNTED.fullmatch(words):
        return None
    tokens = re.findall(r"[A-Za-z]+", words)
    if any(token.casefold() in _NO_UNITS for token in tokens) or len(tokens) > 4:
        return None
    known = all(_SPELLED.get(t) or _SPELLED.get(t.casefold()) for t in tokens if t != "per")
    if known or (len(tokens[0]) > 2 and "\\" not in words):
        return large, unit
    return None


def _unit(words: str) -> str:
    """One spelling of a unit."""
    words = words.strip().rstrip(".").strip() or words.strip()
    if spelled := _SPELLED.get(words, _SPELLED.get(words.casefold())):
        return spelled
    words = re.sub(r"\s?(?:\bper\b|/|\ban?\b)\s?", "/", words)
    words = re.sub(r"[\^{}]", "", words)
    for name, power in (("square", 2), ("sq", 2), ("cubic", 3), ("cu", 3)):
        words = re.sub(rf"\b{name}\.?\s(\w+)", rf"\1 {power}", words, flags=re.IGNORECASE)
    tokens = re.findall(r"[A-Za-z$€£¥%]+|\d|/", words)
    spelled_all = [_SPELLED.get(t, _SPELLED.get(t.casefold(), _singular(t))) for t in tokens]
    unit = "".join(spelled_all)
    return {"mi/h": "mph"}.get(unit, unit)


def _singular(word: str) -> str:
    word = word.casefold()
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


def known_unit(unit: str) -> bool:
    """Whether it is a unit of measure or money, so that another one is another quantity."""
    return unit in _UNITS or any(sign in unit for sign in "/23$")
