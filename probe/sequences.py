"""Sequences: the texts whose edges are scored, as token ids.

>>> TokenSequence(prompt=[5, 16, 4], answer=[5, 16, 4, 17]).length
6
"""

from collections.abc import Sequence
from typing import NamedTuple


class TokenSequence(NamedTuple):
    """One text to attribute, as token ids."""

    prompt: Sequence[int]
    """What the model is given; at least one token."""

    answer: Sequence[int]
    """What is scored; at least one token."""

    id: str = ""
    """A name for messages; its place in the list where empty."""

    @property
    def length(self) -> int:
        """How many tokens the model is fed: the last one of the answer is only scored."""
        return len(self.prompt) + len(self.answer) - 1
