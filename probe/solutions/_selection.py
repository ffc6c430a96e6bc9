"""Selection: which questions of a pair are compared, and how many answer tokens are scored.

Only questions that both models solve count; of these, those of a usual length and with answers
of similar length on both sides; of these, a random sample (paper, Eq. 10-12). The paper's text
and its published code differ; `convention` chooses:

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
from typing import get_args

from probe.errors import ProbeError
from probe.vocabulary import Convention


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

    Raises:
        ProbeError: The two sides answer different questions, or no question is left.
    """
    if convention not in get_args(Convention):
        raise ProbeError(f"convention {convention!r} is not known; use code or paper")
    if alpha <= 0 or samples < 1:
        raise ProbeError(f"alpha ({alpha}) must be above 0 and samples ({samples}) at least 1")
    other = {solution.id: solution for solution in after}
    if (
        len(other) != len(after)
        or {s.id for s in before} != other.keys()
        or len(before) != len(after)
    ):
        raise ProbeError(
            "the two models' solutions are not of the same questions: every id must stand once on "
            f"each side ({len(before)} solutions before, {len(after)} after)"
        )
    solved = [(s, other[s.id]) for s in before if s.correct and other[s.id].correct]
    if not solved:
        right = [sum(s.correct for s in side) for side in (before, after)]
        raise ProbeError(
            f"no question that both models solve (before {right[0]}, after {right[1]} of "
            f"{len(before)} right): use more questions, an easier benchmark or another prompt"
        )

    lengths = [(len(b.answer), len(a.answer)) for b, a in solved]
    mean_before, mean_after = fmean(b for b, _ in lengths), fmean(a for _, a in lengths)
    if convention == "code":
        reference = min(mean_before, mean_after)
        shortest, longest = float(int(beta * reference)), float(int(gamma * reference))
    else:
        reference = (mean_before + mean_after) / 2
        shortest, longest = beta * reference, gamma * reference

    kept = []
    for (b, a), (length_before, length_after) in zip(solved, lengths, strict=True):
        mean = (length_before + length_after) / 2
        difference = abs(length_before - length_after)
        if convention == "code":
            fits = (
                len(b.prompt) == len(a.prompt)
                and shortest <= mean <= longest
                and difference <= delta * mean
            )
        else:
            both = (length_before, length_after)
            fits = (
                all(shortest <= length <= longest for length in both) and difference < delta * mean
            )
        if fits:
            kept.append(b.id)
    if convention == "code" and all(len(b.prompt) != len(a.prompt) for b, a in solved):
        raise ProbeError(
            f"the two models' prompts differ in length for all of the {len(solved)} questions that "
            "both solve, so none can be compared: give one literal prompt, not chat templates"
        )
    if not kept:
        raise ProbeError(
            f"none of the {len(solved)} questions that both models solve has answers of "
            f"{shortest:g} to {longest:g} tokens that differ by less than {delta:g} of their mean: "
            "use more questions, or wider beta, gamma and delta"
        )
    drawn = random.Random(seed).sample(kept, min(samples, len(kept)))
    return Selection(
        ids=tuple(drawn),
        reference_length=reference,
        cut_length=max(int(alpha * reference), 1),
        minimum_length=shortest,
        maximum_length=longest,
        both_correct=len(solved),
        kept=len(kept),
    )


def cut_off(solutions: Iterable[Solution], max_new_tokens: int) -> int:
    """How many answers are as long as they may be: they did not end."""
    return sum(len(solution.answer) >= max_new_tokens for solution in solutions)
