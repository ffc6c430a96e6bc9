"""Solutions: each model's own answer to each question, generated greedily and graded.

`_generation` writes the answers, one by one or batch by batch; each is graded and handed on
as soon as it is there, so that whoever stores them loses at most what is still being written.

    >>> batches = solve(model, problems, "{question}", max_new_tokens=64)
    >>> solutions = [solution for batch in batches for solution in batch]
"""

import warnings
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import closing
from typing import TypeVar

from probe.errors import ProbeError
from probe.grading import Grader, exact_answer, extract_answer
from probe.models import Model, ModelFiles, cpu_threads, encode_prompt
from probe.problems import Problem
from probe.solutions._generation import generate
from probe.solutions._selection import Solution
from probe.vocabulary import Decoding, Engine

_T = TypeVar("_T")


def solve(
    model: Model,
    problems: Sequence[Problem],
    prompt: str,
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    batch_size: int = 32,
    engine: Engine = "auto",
    decoding: Decoding = "greedy",
    seed: int = 42,
    done: Collection[str] = (),
    say: Callable[[str], object] = warnings.warn,
) -> Generator[list[Solution], None, None]:
    """Generate and grade a solution of each problem.

    Args:
        model: The model to ask.
        problems: The questions.
        prompt: The prompt, with `{question}` in it.
        max_new_tokens: Longest answer, in tokens; less where the context ends before.
        stop: Texts that end an answer; see `_generation`.
        batch_size: How many questions run at once in a static batch.
        engine: What generates; see `_generation`.
        decoding: How tokens are chosen, likewise.
        seed: Where they are drawn.
        done: Ids that need no solution.
        say: Is told in one line what a reader should know about the engine.

    Yields:
        The solutions that are new since the last time.

    Raises:
        ProbeError: A question has no tokens, or more than fit into the model's context.
    """
    prompts = encode_prompts(model, problems, prompt)
    answers = generate(
        model,
        prompts,
        limits(model, prompts, max_new_tokens),
        stop=stop,
        batch_size=batch_size,
        skip=frozenset(place for place, problem in enumerate(problems) if problem.id in done),
        engine=engine,
        decoding=decoding,
        seed=seed,
        say=say,
    )
    # Closed at once where the reader breaks off, as an engine may have a thread and much memory.
    with Grader() as grader, closing(answers):
        for finished in in_threads(answers, model.threads):
            texts = model.tokenizer.batch_decode(
                [answer.tokens for answer in finished], skip_special_tokens=True
            )
            yield [
                graded(grader, problems[place], prompts[place], tokens, text)
                for (place, tokens), text in zip(finished, texts, strict=True)
            ]


def encode_prompts(
    model: Model | ModelFiles, problems: Sequence[Problem], prompt: str
) -> list[list[int]]:
    """The tokens of each problem's prompt.

    Raises:
        ProbeError: A question has no tokens, or more than fit into the model's context.
    """
    prompts = [encode_prompt(model.tokenizer, prompt, problem.question) for problem in problems]
    for problem, tokens in zip(problems, prompts, strict=True):
        if not tokens:
            raise ProbeError(f"question {problem.id}: its prompt has no tokens")
        if max(tokens) >= model.config.vocab_size:
            raise ProbeError(
                f"question {problem.id}: its prompt has token {max(tokens)}, but the model knows "
                f"only {model.config.vocab_size}; tokenizer and weights are of two models"
            )
        if model.context and len(tokens) >= model.context:
            raise ProbeError(
                f"question {problem.id}: its prompt has {len(tokens)} tokens, which leaves no room "
                f"in the model's context of {model.context}"
            )
    return prompts


def limits(
    model: Model | ModelFiles, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[int]:
    """The longest answer to each prompt, in tokens: less where the context ends before."""
    room = [(model.context or len(p) + max_new_tokens) - len(p) for p in prompts]
    return [min(max_new_tokens, left) for left in room]


def in_threads(items: Iterator[_T], threads: int | None) -> Iterator[_T]:
    """Let each item be made with so many CPU threads; None for as many as torch uses."""
    while True:
        with cpu_threads(threads):
            try:
                item = next(items)
            except StopIteration:
                return
        yield item


def graded(
    grader: Grader, problem: Problem, prompt: Sequence[int], answer: Sequence[int], text: str
) -> Solution:
    """Make a solution of an answer, as tokens and as text."""
    final = extract_answer(text)
    if problem.grading == "exact":
        final, right = exact_answer(text, problem.answer)
    else:
        right = grader.grade(problem.answer, final)
    return Solution(problem.id, prompt, answer, right, text, final, problem.answer)
