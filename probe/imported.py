"""Imported solutions: what a model has already written elsewhere, matched to our problems.

Files of other programs are recognised by their columns, `FORMATS` says which. A row is matched by
its question, or else by the question in its prompt, or by its id; it is graded by us again. The
answer's token ids are what attribution scores, so they are taken from the file where it has them,
and are otherwise derived again from the text, behind the prompt that it answered.

    >>> given = read_given(Path("samples_gsm8k.jsonl"))
    >>> given.format, len(given.answers)
    ('lm-evaluation-harness', 1319)
    >>> by_id = match(given, {"gsm8k": problems}, "gsm8k")
"""

import hashlib
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from probe.errors import ProbeError
from probe.grading import Grader
from probe.problems import ID, Problem
from probe.prompts import encode_prompt
from probe.reading import Row, read_rows
from probe.selection import Solution
from probe.solutions import graded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUESTION = ("question", "problem", "query")
PROMPT = ("prompt", "input")
TEXT = ("text", "output", "response", "completion", "generation", "generated_text", "predict")
TOKENS = ("token_ids", "output_token_ids", "output_ids", "answer")
PROMPT_TOKENS = ("prompt_token_ids", "prompt_ids", "prompt")
"""Names of columns in the wild, each list in order of preference; capitals do not matter."""

GRADED_AT_ONCE = 50


class GivenAnswer(NamedTuple):
    """An answer from a file."""

    where: str
    """Where it stands, as complaints name it."""

    question: str | None
    """The question that it answers, where it says so."""

    id: str | None
    """The question's id, where it says so."""

    prompt: str | None
    """The text that the model was given, where it says so."""

    prompt_tokens: tuple[int, ...] | None
    """The same as tokens."""

    text: str | None
    """The answer as text."""

    tokens: tuple[int, ...] | None
    """The answer as tokens."""


class Given(NamedTuple):
    """A file of answers."""

    path: Path
    """The file or folder."""

    format: str
    """Whose format it is, a name in `FORMATS`."""

    answers: tuple[GivenAnswer, ...]
    """What it holds."""

    @property
    def table(self) -> dict[str, str | int]:
        """What a record says about it."""
        digest = hashlib.sha256(repr(self.answers).encode()).hexdigest()
        tokens = all(answer.tokens is not None for answer in self.answers)
        prompts = all(answer.prompt or answer.prompt_tokens for answer in self.answers)
        return {
            "file": str(self.path),
            "format": self.format,
            "answers": len(self.answers),
            "token_ids": "the file's" if tokens else "derived again from the text",
            "prompts": "the file's" if prompts else "the recipe's",
            "sha256": digest[:16],
        }

    @property
    def account(self) -> str:
        """The same for a reader, as one line."""
        table = self.table
        return (
            f"{table['answers']} answers from {table['file']} ({table['format']}), graded again; "
            f"prompts are {table['prompts']}, token ids are {table['token_ids']}"
        )


class Format(NamedTuple):
    """How to recognise and read the files of one program."""

    needs: tuple[tuple[str, ...], ...]
    """Of each of these, a row has one column."""

    read: Callable[[Row], GivenAnswer]
    """The answer in a row."""


def read_given(path: Path) -> Given:
    """Read a file of answers, or all files of a folder.

    Raises:
        ProbeError: It cannot be read, is of no known format, mixes formats, or holds several
            answers in a row.
    """
    rows = read_rows(path)
    if not rows:
        raise ProbeError(f"{path} holds no solution")
    names = [_format(row) for row in rows]
    for row, name in zip(rows, names, strict=True):
        if name != names[0]:
            raise ProbeError(f"{row.where}: of format {name}, but the rows before of {names[0]}")
    return Given(path, names[0], tuple(FORMATS[names[0]].read(row) for row in rows))


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
    found: dict[str, list[GivenAnswer]] = {}
    for place, answer in enumerate(given.answers):
        if key := _key(answer, place, alike, asked, problems):
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
                before, answer = _tokens(tokenizer, prompt, problem, given)
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
                f"{given.where}: token {max(tokens)} is none of the {len(tokenizer)} of the "
                "model's tokenizer; these are another model's solutions"
            )
    if given.prompt_tokens:
        before = list(given.prompt_tokens)
    elif given.prompt:
        # A prompt that was made by a chat template begins with the special token already.
        special = not (tokenizer.bos_token and given.prompt.startswith(tokenizer.bos_token))
        before = tokenizer(given.prompt, add_special_tokens=special)["input_ids"]
    else:
        before = encode_prompt(tokenizer, prompt, problem.question)
    if given.tokens is not None:
        spelled = str(tokenizer.decode(list(given.tokens), skip_special_tokens=True))
        # The text may lack a stop string that the tokens have.
        if given.text and not _plain(spelled).startswith(_plain(given.text)):
            raise ProbeError(
                f"{given.where}: its token ids spell {_short(spelled)!r} with the model's "
                f"tokenizer, not its text {_short(given.text)!r}"
            )
        return before, list(given.tokens)
    # A word's first token can depend on what is before it, so the answer is read behind its prompt.
    text = str(tokenizer.decode(before)) + (given.text or "")
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    if whole[: len(before)] == before:
        return before, whole[len(before) :]
    return before, tokenizer(given.text or "", add_special_tokens=False)["input_ids"]


def _key(
    answer: GivenAnswer,
    place: int,
    alike: Mapping[str, Sequence[Problem]],
    asked: Sequence[Problem],
    problems: Mapping[str, Sequence[Problem]],
) -> str | None:
    """The question that a row answers, as `alike` names it, or None."""
    if answer.question is not None:
        key = _plain(answer.question)
        return key if key in alike else None
    if answer.prompt is not None:
        prompt = _plain(answer.prompt)
        near = _plain(asked[place].question) if place < len(asked) else ""
        if near and prompt.endswith(near):
            return near
        # Examples come before the question that is asked.
        inside = [key for key in alike if key in prompt]
        return max(inside, key=lambda key: (prompt.rfind(key) + len(key), len(key)), default=None)
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


def _plain(text: str) -> str:
    return " ".join(text.split())


def _short(text: str) -> str:
    text = _plain(text)
    return text if len(text) <= 60 else text[:57] + "..."


def _format(row: Row) -> str:
    names = {column.strip().casefold() for column in row.columns}
    for name, format in FORMATS.items():
        if all(names.intersection(columns) for columns in format.needs):
            return name
    needed = "; ".join(
        f"{' and '.join('|'.join(columns) for columns in format.needs)} ({name})"
        for name, format in FORMATS.items()
    )
    raise ProbeError(
        f"{row.where}: not recognised as solutions; found: {', '.join(row.columns)}; "
        f"needed: {needed}"
    )


def _harness(row: Row) -> GivenAnswer:
    document, requests = row.columns["doc"], row.columns["arguments"]
    question = Row(row.where, document).find(*QUESTION) if isinstance(document, Mapping) else None
    request = requests
    for key in ("gen_args_0", "arg_0"):  # older versions write lists in place of these objects
        if isinstance(request, Mapping):
            request = request.get(key)
        elif isinstance(request, Sequence) and not isinstance(request, str):
            request = request[0] if request else None
    # What was sent to a chat server is no text that the model saw.
    seen = isinstance(request, str) and not request.lstrip().startswith('[{"role"')
    return _answer(
        row,
        question=question,
        prompt=request if seen else None,
        text=_only(row, _only(row, row.columns["resps"])),
    )


def _qwen(row: Row) -> GivenAnswer:
    return _answer(row, question=row.find("question"), text=_only(row, row.columns["code"]))


def _vllm(row: Row) -> GivenAnswer:
    output = _only(row, row.columns["outputs"])
    part = Row(row.where, output if isinstance(output, Mapping) else {"text": output})
    return _answer(
        row,
        question=row.find(*QUESTION),
        prompt=row.find("prompt"),
        prompt_tokens=row.find(*PROMPT_TOKENS),
        text=part.find(*TEXT),
        tokens=part.find(*TOKENS),
    )


def _own(row: Row) -> GivenAnswer:
    return _answer(
        row,
        question=row.find(*QUESTION),
        prompt=row.find(*PROMPT),
        prompt_tokens=row.find(*PROMPT_TOKENS),
        text=row.find(*TEXT),
        tokens=row.find(*TOKENS),
    )


def _answer(
    row: Row,
    *,
    question: object = None,
    prompt: object = None,
    prompt_tokens: object = None,
    text: object = None,
    tokens: object = None,
) -> GivenAnswer:
    """An answer of these parts; what is of another kind than it should be is not there."""
    name = row.find(*ID)
    if text is None and _numbers(tokens) is None:
        # An answer of no length is one, and counts as wrong.
        if not any(row.columns.get(column) == "" for column in TEXT):
            raise ProbeError(
                f"{row.where}: no answer; needed: text in {' or '.join(TEXT)}, or token ids in "
                f"{' or '.join(TOKENS)}"
            )
        text = ""
    return GivenAnswer(
        row.where,
        question if isinstance(question, str) else None,
        None if name is None else str(name),
        prompt if isinstance(prompt, str) else None,
        _numbers(prompt_tokens),
        text if isinstance(text, str) else None,
        _numbers(tokens),
    )


def _numbers(value: object) -> tuple[int, ...] | None:
    if isinstance(value, Sequence) and all(type(number) is int for number in value):
        return tuple(value)
    return None


def _only(row: Row, value: object) -> object:
    """The one item of a list; a value that is no list is that item."""
    if isinstance(value, str | Mapping) or not isinstance(value, Sequence):
        return value
    if len(value) != 1:
        raise ProbeError(
            f"{row.where}: {len(value)} answers to one question; one is needed (greedy, one sample)"
        )
    return value[0]


FORMATS: dict[str, Format] = {
    "lm-evaluation-harness": Format((("doc",), ("arguments",), ("resps",)), _harness),
    "Qwen2.5-Math": Format((("question",), ("code",), ("pred",)), _qwen),
    "vLLM": Format((("prompt", *QUESTION), ("outputs",)), _vllm),
    "question and answer": Format(((*QUESTION, *PROMPT, *ID), (*TEXT, *TOKENS)), _own),
}
"""The formats that are known, the most special first; the one place to add one."""
