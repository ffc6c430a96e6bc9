"""Solutions: each model's own answer to each question, generated greedily and graded.

Prompts of similar length run together, filled up on the left; a solution leaves as soon as its
batch is done, so that whoever stores them loses at most the running one.

    >>> batches = solve(model, problems, "{question}", max_new_tokens=64, batch_size=50)
    >>> solutions = [solution for batch in batches for solution in batch]
"""

from collections.abc import Collection, Iterator, Sequence

import torch

from probe.errors import ProbeError
from probe.grading import Grader, extract_answer
from probe.models import Model
from probe.problems import Problem
from probe.recipe import CHAT
from probe.selection import Solution

CHAT_MESSAGE = "{question}\nPlease reason step by step, and put your final answer within \\boxed{}."
"""What the prompt `chat` asks."""


def encode_prompt(model: Model, prompt: str, question: str) -> list[int]:
    """Tokens of a prompt; `{question}` in it stands for the question.

    Raises:
        ProbeError: The prompt is a chat, and the tokenizer has no template for one.
    """
    tokenizer, chat, message = model.tokenizer, *chat_message(prompt)
    # Not str.format: prompts hold other braces, as in \boxed{}.
    text = message.replace("{question}", question)
    if chat:
        if not tokenizer.chat_template:
            raise ProbeError(no_template(model.reference))
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
    batch_size: int,
    done: Collection[str] = (),
) -> Iterator[list[Solution]]:
    """Generate and grade a solution of each problem, batch by batch.

    The batches depend on the problems alone: what is left out because it is done already does
    not move the others into another batch, where rounding could change a token.

    Args:
        model: The model to ask.
        problems: The questions.
        prompt: The prompt, with `{question}` in it.
        max_new_tokens: Longest answer, in tokens.
        batch_size: How many questions run at once.
        done: Ids that need no solution; a batch of such ids alone is skipped.

    Yields:
        The solutions of one batch that were not done.

    Raises:
        ProbeError: A question has no tokens, or more than fit into the model's context.
    """
    prompts = [encode_prompt(model, prompt, problem.question) for problem in problems]
    for problem, tokens in zip(problems, prompts, strict=True):
        if not tokens:
            raise ProbeError(f"question {problem.id}: its prompt has no tokens")
        if model.context and len(tokens) >= model.context:
            raise ProbeError(
                f"question {problem.id}: its prompt has {len(tokens)} tokens, which leaves no room "
                f"in the model's context of {model.context}"
            )
    order = sorted(range(len(problems)), key=lambda place: len(prompts[place]))
    with Grader() as grader:
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            if all(problems[place].id in done for place in places):
                continue
            answers = generate(model, [prompts[place] for place in places], max_new_tokens)
            texts = model.tokenizer.batch_decode(answers, skip_special_tokens=True)
            batch = []
            for place, answer, text in zip(places, answers, texts, strict=True):
                problem = problems[place]
                if problem.id not in done:
                    final = extract_answer(text)
                    right = grader.grade(problem.answer, final)
                    batch.append(
                        Solution(
                            problem.id, prompts[place], answer, right, text, final, problem.answer
                        )
                    )
            yield batch


def generate(
    model: Model, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[list[int]]:
    """Generate greedily after each prompt, as one batch.

    The model's own sampling settings (temperature, repetition penalty) are left out: the
    published runs decode greedily and nothing else.

    Returns:
        The new tokens of each prompt, an end-of-sequence token included where there is one.
    """
    from transformers import GenerationConfig

    module = model.network._module
    ends = module.generation_config.eos_token_id
    if ends is None:
        ends = model.tokenizer.eos_token_id
    ends = [end for end in (ends if isinstance(ends, list) else [ends]) if end is not None]
    filling = model.tokenizer.pad_token_id
    if filling is None:
        filling = ends[0] if ends else 0

    width = max(len(prompt) for prompt in prompts)
    if model.context:
        max_new_tokens = min(max_new_tokens, model.context - width)
    input_ids = torch.full((len(prompts), width), filling)
    attention_mask = torch.zeros(len(prompts), width, dtype=torch.int64)
    for place, prompt in enumerate(prompts):
        input_ids[place, width - len(prompt) :] = torch.tensor(list(prompt))
        attention_mask[place, width - len(prompt) :] = 1
    with torch.inference_mode():
        generated = module.generate(
            input_ids=input_ids.to(model.device),
            attention_mask=attention_mask.to(model.device),
            generation_config=GenerationConfig(
                do_sample=False,
                max_new_tokens=max_new_tokens,
                eos_token_id=ends or None,
                pad_token_id=filling,
            ),
        )
    answers = []
    for row in generated[:, width:].tolist():
        stop = next((place + 1 for place, token in enumerate(row) if token in ends), len(row))
        answers.append(row[:stop])
    return answers
