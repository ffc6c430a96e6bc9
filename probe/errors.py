"""The one exception that means "the user can mend this".

The command line prints a `ProbeError` as one line and exits with 2; every other exception is
a bug and keeps its traceback. A message says what is wrong, where, and what to do:

    raise ProbeError(f"{path}:{line}: not JSON; mend or remove the line")
"""

import difflib
import re
from collections.abc import Iterable
from numbers import Integral

LONGEST = 2000
"""How many letters of a complaint are shown; what is foreign in it may be of any length."""

_ENDS = re.compile("[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]+")
_HALVES = re.compile("[\ud800-\udfff]")


class ProbeError(Exception):
    """A mistake in what was asked for: a wrong name, a damaged file, two models that do not fit."""

    def __str__(self) -> str:
        """What is wrong, as one line that any file or terminal can take."""
        text = _HALVES.sub("\ufffd", _ENDS.sub(" ", super().__str__().strip()))
        half = LONGEST // 2
        return text if len(text) <= LONGEST else f"{text[:half]} ... {text[-half:]}"


class UnknownNameError(ProbeError, KeyError):
    """A name that a table does not have."""


def reason(error: BaseException, line: int = 0) -> str:
    """Why an error came about, in one line: one of its message, or its type where that is empty.

    Args:
        error: The error.
        line: Which line of the message; -1 for the last.
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[line].strip()


def not_known(kind: str, name: object, known: Iterable[str]) -> str:
    """The complaint about a name that is none of those known, with the one that was likely meant.

    >>> not_known("method", "eapp", ["eap", "exact"])
    "method 'eapp' is not known; one of: eap, exact; did you mean 'eap'?"

    Args:
        kind: What the name is of.
        name: What was given.
        known: Every name that would do.
    """
    known = tuple(known)
    return f"{kind} {name!r} is not known; one of: {', '.join(known)}{likely_meant(name, known)}"


def likely_meant(name: object, known: Iterable[str]) -> str:
    """The end of a complaint about a name: which of those known it is nearest to, if to any.

    Args:
        name: What was given.
        known: Every name that would do.
    """
    names = {each.lower(): each for each in known}
    close = difflib.get_close_matches(str(name).lower(), names, n=1)
    return f"; did you mean {names[close[0]]!r}?" if close else ""


def install(extra: str = "") -> str:
    """The command that installs this package; it is on no index, where the name may be another's.

    Args:
        extra: Which optional part to install with it, such as `peft`.
    """
    return f'pip install -e ".[{extra}]"' if extra else "pip install -e ."


def check_count(name: str, value: object, otherwise: str = "") -> None:
    """Refuse what is no whole number from 1 on: `2.5`, `0`, `True`, or `"3"`.

    Args:
        name: What it is called.
        value: What was given.
        otherwise: What else it may be, for the message.

    Raises:
        ProbeError: It is none.
    """
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or int(value) < 1:  # type: ignore[call-overload]
        wanted = "at least 1" if whole else "a whole number"
        raise ProbeError(f"{name} is {value!r}; it must be {wanted}{otherwise}")
