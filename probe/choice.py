"""Choosing some of several named things, as `edges[3]`, `edges["q7"]` or `edges[[True, False]]`.

>>> chosen_places(["q2", 0], ("q1", "q2"))
[1, 0]
"""

from collections.abc import Sequence
from numbers import Integral

import torch

from probe.errors import ProbeError

Choice = int | str | slice | Sequence[int] | Sequence[str] | Sequence[bool] | torch.Tensor
"""A place, an id, a slice, or a list of places, of ids, or of a bool for each; also as an array."""


def chosen_places(choice: Choice, ids: Sequence[str]) -> list[int]:
    """Which of the sequences with these ids are meant.

    Raises:
        ProbeError: There is no such sequence, or an id is that of several.
    """
    if isinstance(choice, slice):
        return list(range(len(ids)))[choice]
    if hasattr(choice, "tolist"):  # of torch or numpy
        choice = choice.tolist()
    if isinstance(choice, str | Integral):
        return [_place(choice, ids)]
    if not isinstance(choice, Sequence):
        raise ProbeError(f"{choice!r} chooses no sequences; give places, ids or bools")
    if choice and all(isinstance(chosen, bool) for chosen in choice):
        if len(choice) != len(ids):
            raise ProbeError(f"{len(choice)} bools do not fit {len(ids)} sequences")
        return [index for index, chosen in enumerate(choice) if chosen]
    return [_place(name, ids) for name in choice]


def _place(name: object, ids: Sequence[str]) -> int:
    if isinstance(name, str):
        count = ids.count(name)
        if count == 1:
            return ids.index(name)
        many = f"{count} sequences have" if count else "no sequence has"
        raise ProbeError(f"{many} the id {name!r}; give the place of one, 0 to {len(ids) - 1}")
    if not is_number(name):
        raise ProbeError(f"{name!r} is neither a sequence's place nor its id")
    index = int(name)  # type: ignore[call-overload]
    if not -len(ids) <= index < len(ids):
        raise ProbeError(f"there is no sequence {index}; there are {len(ids)}")
    return index % len(ids)


def is_number(value: object) -> bool:
    """Whether it can count things: `True` cannot."""
    return isinstance(value, Integral) and not isinstance(value, bool)
