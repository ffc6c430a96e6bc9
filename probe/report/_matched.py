"""Matched questions: which ones a control that matches losses can say something of.

>>> matched_questions(folder, "sft-grpo.tiny-math.alpha-0.5", "sharpness", ids)
[True, True, False]
"""

from collections.abc import Sequence

from probe.stats import CONTROLS
from probe.store import Missing, RunFolder


def matched_questions(
    folder: RunFolder, comparison: str, control: str, ids: Sequence[str]
) -> list[bool] | None:
    """Whether each question has a temperature on every side of a control that gives it one.

    Returns:
        [question]; None of a control without temperatures.

    Raises:
        Missing: They are not known, or one was taken for all questions, as older versions did.
    """
    sides = [side.name for side in CONTROLS[control].sides if side.like]
    if not sides:
        return None
    found = [temperatures_of(folder, comparison, side) for side in sides]
    return [all(table.get(name) is not None for table in found) for name in ids]


def temperatures_of(folder: RunFolder, comparison: str, side: str) -> dict[str, float | None]:
    """The temperature of each question on a control's side; None: there is none for it.

    Raises:
        Missing: They are not known, or one was taken for all questions, as older versions did.
    """
    found = folder.read_temperatures(comparison, side)
    if found is None:
        raise Missing(f"{side} has no temperature for each question; run the recipe again")
    return found
