"""Imported solutions: what a model has already written elsewhere, matched to our problems.

`_answer_files` reads the files of other programs. A row is matched by its question, or else by
the question in its prompt, or by its id; it is graded by us again. The answer's token ids are what
attribution scores, so they are taken from the file where it has them, and are otherwise derived
again from the text, behind the prompt that it answered.

    >>> given = read_given(Path("samples_gsm8k.jsonl"))
    >>> by_id = match(given, {"gsm8k": problems}, "gsm8k")
"""

import re
from collections.abc import Collection, Generator, Mapping, Sequence
from typing import TYPE_CHECKING

from probe.errors import ProbeError
from probe.grading import Grader
from probe.models import encode_prompt, tokens_of
from probe.problems import Problem
from probe.solutions._answer_files import Given, GivenAnswer
from probe.solutions._selection import Solution
from probe.solutions._solutions import graded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GRADED_AT_ONCE = 50


def match(
    given: Given, problems: Mapping[str, Sequence[Problem]], benchmark: str
) -> dict[str, GivenAnswer]:
    """Find the answer to each problem of one benchmark.

    Rows of other questions are left out: the file may hold more than is asked.

    Args:
        given: The answers.
        problems: The problems of every benchmark of the recipe.
        benchmark: Which of them is wanted.

    Returns:
        The answer to each problem, by its id.

    Raises:
        ProbeError: A problem has no answer, or two different ones.
    """
    asked = problems[benchmark]
    alike: dict[str, list[Problem]] = {}
    for problem in asked:
        alike.setdefault(_plain(problem.question), []).append(problem)
    inner = {key: frozenset(key.split(" ")[1:-1]) for key in alike}
    found: dict[str, list[GivenAnswer]] = {}
    for place, answer in enumerate(given.answers):
        if key := _key(answer, place, alike, inner, asked, problems):
            found.setdefault(key, []).append(answer)
    matched: dict[str, GivenAnswer] = {}
    for key, answers in found.items():
        # Where a benchmark asks a question twice, the answers stand in the order of the problems;
        # a program that judges in several ways writes the same answer once for each.
        distinct = list({answer[1:]: answer for answer in answers}.values())
        group = alike[key]
        if len(distinct) not in (1, len(group)):
            raise ProbeError(
                f"{distinct[1].where}: question {group[0].id} of {benchmark} has another answer at "
                f"{distinct[0].where}; one answer to each question is needed"
            )
        for place, problem in enumerate(group):
            matched[problem.id] = distinct[place % len(distinct)]
    missing = [problem for problem in asked if problem.id not in matched]
    if missing:
        raise ProbeError(
            f"{given.path} has no answer to {len(missing)} of {len(asked)} questions of "
            f"{benchmark}; the first is {missing[0].id}: {_short(missing[0].question)!r}"
        )
    return matched


def imported(
    tokenizer: "PreTrainedTokenizerBase",
    problems: Sequence[Problem],
    prompt: str,
    answers: Mapping[str, GivenAnswer],
    done: Collection[str] = (),
) -> Generator[list[Solution], None, None]:
    """Make graded solutions of answers.

    Args:
        tokenizer: The model's.
        problems: The questions.
        prompt: The recipe's prompt, for answers whose file does not say theirs.
        answers: The answer to each, by `match`.
        done: Ids that need no solution.

    Yields:
        Some more solutions.

    Raises:
        ProbeError: Token ids that do not belong to this tokenizer, or do not spell their text.
    """
    left = [problem for problem in problems if problem.id not in done]
    with Grader() as grader:
        for start in range(0, len(left), GRADED_AT_ONCE):
            solutions = []
            for problem in left[start : start + GRADED_AT_ONCE]:
                given = answers[problem.id]
                try:
                    before, answer = _tokens(tokenizer, prompt, problem, given)
                except ProbeError as error:
                    raise ProbeError(f"{given.where}: {error}") from error
                text = given.text
                if text is None:
                    text = str(tokenizer.decode(answer, skip_special_tokens=True))
                solutions.append(graded(grader, problem, before, answer, text))
            yield solutions


def _tokens(
    tokenizer: "PreTrainedTokenizerBase", prompt: str, problem: Problem, given: GivenAnswer
) -> tuple[list[int], list[int]]:
    """The tokens of the prompt and of the answer."""
    for tokens in (given.prompt_tokens or (), given.tokens or ()):
        if tokens and not 0 <= min(tokens) <= max(tokens) < len(tokenizer):
            raise ProbeError(
                f"token {max(tokens)} is none of the {len(tokenizer)} of the "
                "model's tokenizer; these are another model's solutions"
            )
    if given.prompt_tokens:
        before = list(given.prompt_tokens)
    elif given.prompt:
        # A prompt that was made by a chat template begins with the special token already.
        special = not (tokenizer.bos_token and given.prompt.startswith(tokenizer.bos_token))
        before = tokens_of(tokenizer, given.prompt, special)
    else:
        before = encode_prompt(tokenizer, prompt, problem.question)
    if given.tokens is not None:
        written = str(tokenizer.decode(list(given.tokens), skip_special_tokens=True))
        # The text may lack a stop string that the tokens have.
        if given.text and not _plain(written).startswith(_plain(given.text)):
            raise ProbeError(
                f"its token ids spell {_short(written)!r} with the model's "
                f"tokenizer, not its text {_short(given.text)!r}"
            )
        return before, list(given.tokens)
    return before, spelled(tokenizer, before, given.text or "")


def spelled(tokenizer: "PreTrainedTokenizerBase", before: list[int], text: str) -> list[int]:
    """Tokens of an answer's text, behind its prompt: a word's first one can depend on that.

    Args:
        tokenizer: The model's.
        before: The tokens of the prompt.
        text: The answer.

    Raises:
        ProbeError: The tokenizer cannot take it.
    """
    whole = tokens_of(tokenizer, str(tokenizer.decode(before)) + text)
    if whole[: len(before)] == before:
        return whole[len(before) :]
    return tokens_of(tokenizer, text)


def _key(
    answer: GivenAnswer,
    place: int,
    alike: Mapping[str, Sequence[Problem]],
    inner: Mapping[str, frozenset[str]],
    asked: Sequence[Problem],
    problems: Mapping[str, Sequence[Problem]],
) -> str | None:
    """The question that a row answers, as `alike` names it, or None."""
    if answer.question is not None:
        key = _plain(answer.question)
        return key if key in alike else None
    if (text := answer.prompt or answer.asked) is not None:
        prompt = _plain(text)
        near = _plain(asked[place].question) if place < len(asked) else ""
        if near and _ends(prompt, near) == len(prompt):
            return near
        # Examples come before the question that is asked.
        words = frozenset(prompt.split(" "))
        # A question that is in it has its words there, which is quick to see for thousands of them.
        near_by = [key for key in alike if inner[key] <= words]
        inside = {key: end for key in near_by if (end := _ends(prompt, key))}
        return max(inside, key=lambda key: (inside[key], len(key)), default=None)
    if answer.id is None:
        return None
    holders = [name for name, part in problems.items() if any(p.id == answer.id for p in part)]
    if len(holders) > 1:
        raise ProbeError(
            f"{answer.where}: the id {answer.id!r} is in {' and in '.join(holders)}; "
            "add a column with the question"
        )
    found = [problem for problem in asked if problem.id == answer.id]
    return _plain(found[0].question) if found else None


def _ends(prompt: str, question: str) -> int:
    """Where a question last ends in a prompt, not as the rest of a longer word; or 0."""
    place = prompt.rfind(question)
    while place > 0 and re.match(r"\w\w", prompt[place - 1 : place + 1]):
        place = prompt.rfind(question, 0, place)
    return place + len(question) if place >= 0 else 0


def _plain(text: str) -> str:
    return " ".join(text.split())


def _short(text: str) -> str:
    text = _plain(text)
    return text if len(text) <= 60 else text[:57] + "..."
