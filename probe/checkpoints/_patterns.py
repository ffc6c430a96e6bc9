r"""Patterns: whether the regular expressions of an adapter's config come to an end.

peft matches those with the name of each module, and one that goes back over itself, like
`(\w+\.?)+x`, would take longer than anybody waits. So it is tried before, in a process of its own.

    >>> in_time([r"(\w+\.?)+x"], ["model.layers.0.self_attn.q_proj"])
    False
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import cast

from probe.limits import NoAnswerError, Worker, serve

SECONDS = 10.0
"""How long all patterns of one config may take with all names."""

_MEMORY = 2**30
_REPEATS = re.compile(r"[*+{]")  # what has none of them is over at once
_WAYS = ("%s", r"(^|.*\.)%s($|\..*)", r"(.*\.)?(%s)$", r"(?:^|.*?\.)%s\.(?P<idx>\d+)\.", r".*\.%s$")
"""How peft completes them."""


def patterns_in(table: object) -> Iterator[str]:
    """All texts of a config that may be patterns, keys and values."""
    if isinstance(table, str):
        if _REPEATS.search(table):
            yield table
    elif isinstance(table, Mapping):
        for key, value in table.items():
            yield from patterns_in(key)
            yield from patterns_in(value)
    elif isinstance(table, Iterable):
        for value in table:
            yield from patterns_in(value)


def in_time(patterns: Iterable[str], names: Iterable[str]) -> bool:
    """Whether matching patterns with names takes no more than `SECONDS`."""
    asked = list(patterns), list(names)
    if not asked[0]:
        return True
    worker = Worker(__name__, SECONDS)
    try:
        worker.ask(asked)
    except NoAnswerError:
        return False
    finally:
        worker.end()
    return True


def _matched(question: object) -> None:
    patterns, names = cast(tuple[list[str], list[str]], question)
    for pattern in patterns:
        for way in _WAYS:
            with suppress(re.error, OverflowError, RecursionError):  # peft says it of those it uses
                found = re.compile(way.replace("%s", pattern))
                for name in names:
                    found.fullmatch(name)
                    found.search(name)


if __name__ == "__main__":
    serve(_matched, _MEMORY)
