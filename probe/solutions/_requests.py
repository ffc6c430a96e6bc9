"""What an engine that writes many answers at once is asked for."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from transformers import GenerationConfig

Stopped = Callable[[Sequence[int]], bool]
"""Whether the last of an answer's tokens ends it."""


class Request(NamedTuple):
    """What to answer."""

    prompt: list[int]
    """Its tokens."""

    limit: int
    """The longest answer, in tokens."""


class Rules(NamedTuple):
    """By which answers end, and how tokens are chosen."""

    ends: list[int]
    """Tokens that end an answer."""

    stopped: Stopped | None
    """What else ends one; None for nothing."""

    config: "Callable[[int], GenerationConfig]"
    """Greedy decoding with answers of at most so many tokens."""
