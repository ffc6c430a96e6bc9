"""Solutions: each model's own answer to each question, generated greedily and graded.

`probe.generation` writes the answers, one by one or batch by batch; each is graded and handed on
as soon as it is there, so that whoever stores them loses at most what is still being written.

    >>> batches = solve(model, problems, "{question}", max_new_tokens=64)
    >>> solutions = [solution for batch in batches for solution in batch]
"""

import warnings
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING

from probe.errors import ProbeError
from probe.generation import generate
from probe.grading import Grader, exact_answer, extract_answer
from probe.models import Model
from probe.problems import Problem
from probe.recipe import CHAT
from probe.selection import Solution
from probe.vocabulary import Engine

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHAT_MESSAGE = "{question}\nPlease reason step by step, and put your final answer within \\boxed{}."
"""What the prompt `chat` asks."""


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", prompt: str, question: str) -> list[int]:
    """Tokens of a prompt; `{question}` in it stands for the question.

    Raises:
        ProbeError: The prompt is a chat, and the tokenizer has no template for one.
    """
    chat, message = chat_message(prompt)
    # Not str.format: prompts hold other braces, as in \boxed{}.
    text = message.replace("{question}", question)
    if chat:
        if not tokenizer.chat_template:
            raise ProbeError(no_template(tokenizer.name_or_path))
        turn = [{"role": "user", "content": text}]
        text = str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
    # A template writes special tokens itself.
    tokens: list[int] = tokenizer(text, add_special_tokens=not chat)["input_ids"]
    return tokens


def chat_message(prompt: str) -> tuple[bool, str]:
    """Whether a recipe's prompt goes through the chat template, and its text in that case."""
    if prompt == CHAT:
        return True, CHAT_MESSAGE
    if prompt.startswith(f"{CHAT}:"):
        return True, prompt.removeprefix(f"{CHAT}:").strip()
    return False, prompt


def no_template(reference: str) -> str:
    """The complaint about a model that cannot be asked by `chat`."""
    return (
        f"{reference}: the tokenizer has no chat template; give the prompt as text, "
        "with {question} in it"
    )


def solve(
    model: Model,
    problems: Sequence[Problem],
    prompt: str,
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    batch_size: int = 32,
    engine: Engine = "auto",
    done: Collection[str] = (),
    say: Callable[[str], object] = warnings.warn,
) -> Generator[list[Solution], None, None]:
    """Generate and grade a solution of each problem.

    Args:
        model: The model to ask.
        problems: The questions.
        prompt: The prompt, with `{question}` in it.
        max_new_tokens: Longest answer, in tokens; less where the context ends before.
        stop: Texts that end an answer; see `probe.generation`.
        batch_size: How many questions run at once in a static batch.
        engine: What generates; see `probe.generation`.
        done: Ids that need no solution.
        say: Is told in one line what a reader should know about the engine.

    Yields:
        The solutions that are new since the last time.

    Raises:
        ProbeError: A question has no tokens, or more than fit into the model's context.
    """
    prompts = [encode_prompt(model.tokenizer, prompt, problem.question) for problem in problems]
    for problem, tokens in zip(problems, prompts, strict=True):
        if not tokens:
            raise ProbeError(f"question {problem.id}: its prompt has no tokens")
        if model.context and len(tokens) >= model.context:
            raise ProbeError(
                f"question {problem.id}: its prompt has {len(tokens)} tokens, which leaves no room "
                f"in the model's context of {model.context}"
            )
    room = [(model.context or len(p) + max_new_tokens) - len(p) for p in prompts]
    answers = generate(
        model,
        prompts,
        [min(max_new_tokens, left) for left in room],
        stop=stop,
        batch_size=batch_size,
        skip=frozenset(place for place, problem in enumerate(problems) if problem.id in done),
        engine=engine,
        say=say,
    )
    # Closed at once where the reader breaks off, as an engine may have a thread and much memory.
    with Grader() as grader, closing(answers):
        for finished in answers:
            texts = model.tokenizer.batch_decode(
                [answer.tokens for answer in finished], skip_special_tokens=True
            )
            yield [
                graded(grader, problems[place], prompts[place], tokens, text)
                for (place, tokens), text in zip(finished, texts, strict=True)
            ]


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
