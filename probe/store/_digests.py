"""Digests: whether what is read is what was written, there.

Each table of a run folder, a JSON file or a line of one, holds a digest of all its values and of
the name of its file; spaces do not count. A bit that flips, a value that somebody mends, a file
that takes another one's place: none of them is taken for what it was.

    >>> table = sealed({"correct": True}, "sft.tiny-math.jsonl")
    >>> unsealed(table, "sft.tiny-math.jsonl", needed=True)
    {'correct': True}
"""

import hashlib
import json
from collections.abc import Mapping

DIGEST = "_digest"
"""The key of a digest, which no benchmark or question can be called."""


class Damaged(Exception):
    """A file of the run is not what it should be; the message says in which way."""


def sealed(table: Mapping[str, object], place: str) -> dict[str, object]:
    """A table with the digest of itself and of where it goes to."""
    return {**table, DIGEST: _digest(table, place)}


def unsealed(table: Mapping[str, object], place: str, needed: bool) -> dict[str, object]:
    """A table without its digest.

    Args:
        table: What was read.
        place: Where.
        needed: Whether it must have one; tables of old runs have none.

    Raises:
        Damaged: Its digest is another one, or missing.
    """
    found = {key: value for key, value in table.items() if key != DIGEST}
    if DIGEST not in table and not needed:
        return found
    if table.get(DIGEST) != _digest(found, place):
        raise Damaged("damaged (not as it was written here, by its digest)")
    return found


def _digest(table: Mapping[str, object], place: str) -> str:
    text = json.dumps([place, table])
    return hashlib.sha256(text.encode()).hexdigest()[:32]
