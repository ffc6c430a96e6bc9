"""Selection: which questions of a pair are compared, and how many answer tokens are scored.

Only questions that both models solve count; of these, those of a usual length and with answers
of similar length on both sides; of these, a random sample (paper, Eq. 10-12). The checkpoints of a
training have one set: the questions that the base and all of them solve. The paper's text and its
published code differ; `convention` chooses:

| | `code` (the published runs) | `paper` (the text) |
|---|---|---|
| reference length | min(mean T_before, mean T_after) | mean of (T_before + T_after) / 2 |
| length filter | int bounds on the pair's mean length | real bounds on both lengths |
| balance | <= delta | < delta |
| prompts of different token count | dropped | kept |

    >>> selection = select(before, after, alpha=0.1)
    >>> selection.cut_length
    14
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal, get_args

from probe.errors import ProbeError
from probe.vocabulary import Convention

ChosenBy = Literal["pair", "training", "first"]
"""Whose answers decide which questions are compared."""


@dataclass(frozen=True)
class Solution:
    """One model's answer to one question."""

    id: str
    """The question's id within its benchmark."""

    prompt: Sequence[int]
    """The tokens that the model was given."""

    answer: Sequence[int]
    """The tokens that it generated, an end-of-sequence token included."""

    correct: bool
    """Whether the answer was judged right."""

    text: str = ""
    """The answer as text."""

    extracted: str | None = None
    """The final answer that was found in the text."""

    gold: str = ""
    """The benchmark's answer."""


@dataclass(frozen=True)
class Selection:
    """The questions to attribute."""

    ids: tuple[str, ...]
    """Their ids, in the order in which they were drawn."""

    reference_length: float
    """The mean answer length that the other lengths derive from, in tokens."""

    cut_length: int
    """How many answer tokens are scored: alpha * reference length, at least 1."""

    minimum_length: float
    """The shortest answer that was kept, beta * reference length."""

    maximum_length: float
    """The longest, gamma * reference length."""

    both_correct: int
    """How many questions both models solve."""

    kept: int
    """How many of these passed the filters, before the sample was drawn."""

    chosen_by: ChosenBy = "pair"
    """Whose answers decided: those of this pair, of all checkpoints of its training, or of the
    first checkpoint that was scored, as far as this one solves its questions."""


def select(
    before: Sequence[Solution],
    after: Sequence[Solution],
    alpha: float = 0.1,
    beta: float = 0.5,
    gamma: float = 1.5,
    delta: float = 0.5,
    samples: int = 100,
    seed: int = 42,
    convention: Convention = "code",
    *,
    others: Sequence[Sequence[Solution]] = (),
    within: Selection | None = None,
) -> Selection:
    """Choose the questions of a pair (paper, Eq. 10-12).

    Args:
        before: Solutions of the model before.
        after: Solutions of the model after, to the same questions.
        alpha: Scored length as a share of the reference length.
        beta: Shortest answer as a share of it.
        gamma: Longest answer as a share of it.
        delta: Largest difference of a pair's lengths as a share of their mean.
        samples: At most this many questions are drawn.
        seed: Seed of the draw (Python's `random.Random`, as in the published runs).
        convention: `code` or `paper`.
        others: Solutions of more models after: only what is right for each of them, beside the
            model before, is kept, and lengths are those of all.
        within: What an earlier pair was compared on: its questions, as far as this pair's answers
            allow, and its lengths; nothing is drawn.

    Raises:
        ProbeError: The sides answer different questions, or no question is left.
    """
    if convention not in get_args(Convention):
        raise ProbeError(f"convention {convention!r} is not known; use code or paper")
    if alpha <= 0 or samples < 1:
        raise ProbeError(f"alpha ({alpha}) must be above 0 and samples ({samples}) at least 1")
    sides = (before, after, *others)
    solved = _solved(sides)
    means = [fmean(len(each[side].answer) for each in solved) for side in range(len(sides))]
    if within:
        reference = within.reference_length
        shortest, longest = within.minimum_length, within.maximum_length
    elif convention == "code":
        reference = min(means)
        shortest, longest = float(int(beta * reference)), float(int(gamma * reference))
    else:
        reference = (means[0] + fmean(means[1:])) / 2
        shortest, longest = beta * reference, gamma * reference
    bounds = shortest, longest, delta
    kept = [
        one.id
        for one, *rest in solved
        if all(_fits(one, other, bounds, convention) for other in rest)
    ]
    _check_left(solved, kept, bounds, convention)
    drawn = random.Random(seed).sample(kept, min(samples, len(kept)))
    if within:
        drawn = [name for name in within.ids if name in set(kept)]
        if not drawn:
            raise ProbeError(
                f"none of the {len(within.ids)} questions that an earlier checkpoint was compared "
                "on is left"
            )
    return Selection(
        ids=tuple(drawn),
        reference_length=reference,
        cut_length=max(int(alpha * reference), 1),
        minimum_length=shortest,
        maximum_length=longest,
        both_correct=len(solved),
        kept=len(kept),
        chosen_by="first" if within else "training" if others else "pair",
    )


def _solved(sides: Sequence[Sequence[Solution]]) -> list[tuple[Solution, ...]]:
    """The solutions of each question that all sides have right, in the order of the first side.

    Raises:
        ProbeError: They answer different questions, or there is none.
    """
    tables = [{solution.id: solution for solution in side} for side in sides]
    first, *rest = sides
    for table, side in zip(tables[1:], rest, strict=True):
        if (
            len(table) != len(side)
            or {s.id for s in first} != table.keys()
            or len(first) != len(side)
        ):
            raise ProbeError(
                "the two models' solutions are not of the same questions: every id must stand once "
                f"on each side ({len(first)} solutions before, {len(side)} after)"
            )
    found = [tuple(table[s.id] for table in tables) for s in first]
    solved = [each for each in found if all(solution.correct for solution in each)]
    if solved:
        return solved
    right = [sum(s.correct for s in side) for side in sides]
    if len(sides) > 2:
        raise ProbeError(
            f"no question that all {len(sides)} models solve (before {right[0]}, after "
            f"{', '.join(map(str, right[1:]))} of {len(first)} right)"
        )
    raise ProbeError(
        f"no question that both models solve (before {right[0]}, after {right[1]} of "
        f"{len(first)} right): use more questions, an easier benchmark or another prompt"
    )


def _fits(
    one: Solution, other: Solution, bounds: tuple[float, float, float], convention: Convention
) -> bool:
    """Whether the answers of two models are of usual and similar lengths."""
    shortest, longest, delta = bounds
    lengths = len(one.answer), len(other.answer)
    mean, difference = sum(lengths) / 2, abs(lengths[0] - lengths[1])
    if convention == "code":
        return (
            len(one.prompt) == len(other.prompt)
            and shortest <= mean <= longest
            and difference <= delta * mean
        )
    return all(shortest <= length <= longest for length in lengths) and difference < delta * mean


def _check_left(
    solved: Sequence[tuple[Solution, ...]],
    kept: Sequence[str],
    bounds: tuple[float, float, float],
    convention: Convention,
) -> None:
    """Say why no question is left, where none is.

    Raises:
        ProbeError: None is.
    """
    if kept:
        return
    shortest, longest, delta = bounds
    of = "both models" if len(solved[0]) == 2 else f"all {len(solved[0])} models"
    unlike = [len({len(solution.prompt) for solution in each}) > 1 for each in solved]
    if convention == "code" and all(unlike):
        raise ProbeError(
            f"the two models' prompts differ in length for all of the {len(solved)} questions that "
            f"{of.removesuffix(' models')} solve, so none can be compared: give one literal "
            "prompt, not chat templates"
        )
    raise ProbeError(
        f"none of the {len(solved)} questions that {of} solve has answers of "
        f"{shortest:g} to {longest:g} tokens that differ by less than {delta:g} of their mean: "
        "use more questions, or wider beta, gamma and delta"
    )


def cut_off(solutions: Iterable[Solution], max_new_tokens: int) -> int:
    """How many answers are as long as they may be: they did not end."""
    return sum(len(solution.answer) >= max_new_tokens for solution in solutions)
