"""Answers that a model writes greedily while its edges are changed.

Every token that is written sees the change, and so does every one before it. An answer is found by
guessing it: the model reads a guess, and what it would have written in each place is compared with
it. Up to the first difference the guess is right, and so is the token that belongs there; the rest
is guessed again. So an answer that the change leaves as it is takes one pass, and none takes more
passes than it has tokens. What comes out is the greedy answer, whatever the guess was.

>>> answers_under(model, [sequence], [[("m3", "logits")]], do="remove")[0][0]
[5, 16, 4, 17]
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from probe.attribution import Batching, Given, TokenSequence, make_batch
from probe.causes._edge_sets import Sets
from probe.causes._plans import Changes, Do, Leaves, Plan, prepare
from probe.errors import check_count
from probe.models import Model, as_model, end_tokens
from probe.tracing import MemoryMode
from probe.vocabulary import Granularity

GUESSED = 8
"""So many further tokens are guessed where an answer does not end."""

Judge = Callable[[int, list[int]], bool]
"""Whether an answer to a sequence's prompt is right, by the sequence's place and the tokens."""


def answers_under(
    model: Model | str | Path,
    sequences: Given,
    sets: Sets,
    do: Do = "remove",
    *,
    granularity: Granularity = "qkv",
    ablation: Leaves = "zero",
    factor: float | None = None,
    other: Model | str | Path | None = None,
    max_new_tokens: int = 64,
    seed: int = 0,
) -> list[list[list[int]]]:
    """The answers that a model writes greedily with edges changed; see `intervene`.

    Returns:
        The tokens of each set's answer to each sequence's prompt, the end token included.
    """
    model = as_model(model)
    check_count("max_new_tokens", max_new_tokens)
    plan = Plan.of(do, factor, ablation, None if other is None else as_model(other))
    changes, changed, texts = prepare(model, plan, sequences, sets, granularity, seed, "auto")
    return answers_of(changes, changed, texts, max_new_tokens)


def answers_of(
    changes: Changes,
    changed: torch.Tensor,
    texts: Sequence[TokenSequence],
    max_new_tokens: int,
) -> list[list[list[int]]]:
    """The answers of each set to each text; see `answers_under`."""
    model = changes.model
    ends = end_tokens(model.settings, model.tokenizer)
    found = []
    for place, text in enumerate(texts):
        limit = max_new_tokens
        if model.context:
            limit = min(limit, model.context - len(text.prompt))
        writing = _Writing(changes, place, text, limit, ends)
        found.append(writing.write(changed))
    return [[of_text[number] for of_text in found] for number in range(len(changed))]


class _Writing:
    """The answers of all sets to one prompt."""

    def __init__(
        self,
        changes: Changes,
        place: int,
        text: TokenSequence,
        limit: int,
        ends: Sequence[int],
    ) -> None:
        """Begin with a sequence's own answer as a guess."""
        self.changes, self.place, self.text = changes, place, text
        self.limit, self.ends = limit, ends

    def write(self, changed: torch.Tensor) -> list[list[int]]:
        """Write the answer of each set, bool [set, source, target]."""
        guess = [*self.text.answer][: self.limit]
        answers = [list(guess) for _ in changed]
        right = [0] * len(answers)  # so many tokens of each are known to be right
        batching = Batching(self.changes.model, self.changes.graph, "auto", recompute=False)
        todo = list(range(len(answers)))
        while todo:
            self._step(batching, changed, answers, right, todo)
            todo = [row for row in todo if not self._finished(answers[row], right[row])]
        return [ended(one[:known], self.ends) for one, known in zip(answers, right, strict=True)]

    def _step(
        self,
        batching: Batching,
        changed: torch.Tensor,
        answers: list[list[int]],
        right: list[int],
        todo: list[int],
    ) -> None:
        """Read the guesses of some rows, and make them better."""

        def run(indices: list[int], memory: MemoryMode) -> list[list[int]]:
            rows = [todo[index] for index in indices]
            return self._choices(changed[rows], [answers[row] for row in rows])

        lengths = [len(self.text.prompt) + len(answers[row]) for row in todo]
        for indices, choices in batching.run(lengths, run):
            for index, chosen in zip(indices, choices, strict=True):
                row = todo[index]
                right[row] = agreed(answers[row], chosen, right[row])
                if right[row] == len(answers[row]):
                    room = self.limit - len(answers[row])
                    answers[row] += [answers[row][-1]] * min(room, GUESSED)

    def _finished(self, answer: list[int], known: int) -> bool:
        return known == self.limit or any(token in self.ends for token in answer[:known])

    def _choices(self, changed: torch.Tensor, answers: list[list[int]]) -> list[list[int]]:
        """What the model would write in each place of some answers."""
        texts = [TokenSequence(self.text.prompt, answer) for answer in answers]
        if len(texts) == 1:  # one sequence would stand for all rows, the first of them unchanged
            texts, changed = texts * 2, torch.cat([changed, changed])
        batch = make_batch(texts)
        found = self.changes.run(batch, changed, self.changes.values(self.place, batch))
        rows = zip(found.choices.tolist(), answers, strict=False)
        return [row[: len(answer)] for row, answer in rows]


def agreed(answer: list[int], chosen: list[int], known: int) -> int:
    """Mend the first token of an answer that was guessed wrong; how many are right then.

    Args:
        answer: The guess, which is changed.
        chosen: What the model would write in each place, behind the tokens of the guess.
        known: How many tokens are right for certain.
    """
    while known < len(answer) and answer[known] == chosen[known]:
        known += 1
    if known == len(answer):
        return known
    # What the model would write behind a wrong guess is a better guess than none.
    answer[known:] = chosen[known:]
    return known + 1


def ended(answer: list[int], ends: Sequence[int]) -> list[int]:
    """An answer up to its first end token."""
    for place, token in enumerate(answer):
        if token in ends:
            return answer[: place + 1]
    return answer
