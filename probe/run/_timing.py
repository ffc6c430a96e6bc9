"""Timing: how long a recipe would take on this machine, measured on a few of its own questions.

A small model that is here writes a batch of answers and scores a batch of them, about a second of
each; the rest is arithmetic. Nothing is downloaded, and nothing kept.

    >>> time_line(make_plan(read_recipe("tiny-math")))
    'Time on this machine (cpu), from a batch of each: solving about 37 s, scoring about 45 s; ...'
"""

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from statistics import fmean
from typing import NamedTuple, TypeVar

from probe.attribution import TokenSequence, attribute, method_named
from probe.checkpoints import weight_files
from probe.files import at_home
from probe.grading import Grader
from probe.models import Model, load_model, resolve_devices
from probe.problems import load_problems
from probe.recipe import Pair, Recipe
from probe.run._plan import Plan, answer_tokens, duration
from probe.solutions import Answer, encode_prompts, generate, graded, in_threads, limits
from probe.stats import control_sides

_T = TypeVar("_T")

LARGEST_BYTES = 400_000_000
"""A file of weights that is read and run within seconds; a larger model is not measured."""

SECONDS = 1.0
"""How long answers are written and scored for it, each."""

MOST = 128
"""How many answers are written or scored at once for it, at most."""

TOKENS = 64
"""How long an answer may get for it."""


class Timing(NamedTuple):
    """How long a recipe takes on this machine, about."""

    device: str
    """Where its models run."""

    solving: float
    """Seconds in which answers are written."""

    scoring: float | None
    """Seconds in which edges are scored; None for none, and where that cannot be known soon."""


class _Written(NamedTuple):
    """What writing a few answers has shown."""

    seconds: float
    """What an answer takes."""

    right: float
    """Which share of those that ended is right."""

    prompt: float
    """How long a prompt is, in tokens."""

    answer: float
    """How long an answer is; as the plan takes it to be, where one was cut."""

    sequences: list[TokenSequence]
    """The prompts with their answers."""


def time_line(plan: Plan) -> str | None:
    """What a dry run and a run say of the time that a recipe takes; None if it runs elsewhere."""
    found = time_batches(plan)
    if found is None:
        options = plan.recipe.compute
        if options.remote or options.cluster or plan.missing_models:
            return None
        why = "until the questions are here" if plan.missing_data else "as a model is large"
        return f"Time on this machine: not measured, {why}; a run's bars tell after some batches."
    parts = [f"solving about {duration(found.solving)}"]
    if found.scoring is not None:
        parts.append(f"scoring about {duration(found.scoring)}")
    text = f"Time on this machine ({found.device}), from a batch of each: {', '.join(parts)}"
    return f"{text}; more where it does other work as well."


def worth_timing(plan: Plan) -> bool:
    """Whether a run has so much to do that measuring before it is little beside it."""
    asked = {each for pair in plan.recipe.pairs for each in pair.asked() if each.given is None}
    return sum(need.questions or 0 for need in plan.benchmarks) * len(asked) >= 10 * MOST


def time_batches(plan: Plan) -> Timing | None:
    """Write and score a few answers with the first model, and multiply.

    Returns:
        None where that takes more than seconds, or cannot be done: the models run on a server, are
        large, or are not all here, nor is a benchmark.
    """
    recipe = plan.recipe
    files = [file for need in plan.models for file in weight_files(need.reference)]
    if recipe.compute.remote or recipe.compute.cluster or plan.missing_models or plan.missing_data:
        return None
    if max(file.stat().st_size for file in files) > LARGEST_BYTES:
        return None
    pair, alphas = recipe.pairs[0], recipe.selection.alpha
    device, options = str(resolve_devices(recipe.compute.device)[0]), recipe.compute
    model = load_model(pair.before, device, options.dtype, threads=options.threads)
    written = _write(model, recipe, pair)
    parameters = {need.reference: need.shape.parameters for need in plan.models if need.shape}
    larger = {name: count / parameters[pair.before] for name, count in parameters.items()}
    asked = {each for pair in recipe.pairs for each in pair.asked() if each.given is None}
    questions = [need.questions or 0 for need in plan.benchmarks]
    solving = written.seconds * sum(questions) * sum(larger[each.model] for each in asked)
    if not alphas or method_named(recipe.attribution.method).passes is None:
        return Timing(device, solving, None)
    # A question is scored where both models are right, which is likely where one is.
    chosen = sum(min(recipe.selection.samples, written.right * count) for count in questions)
    tokens = sum(written.prompt + max(1, alpha * written.answer) for alpha in alphas)
    models = sum(larger[name] for pair in recipe.pairs for name in (pair.before, pair.after))
    models *= 1 + len(control_sides(recipe.attribution.control)) / 2
    token = _score(model, recipe, written.sequences)
    return Timing(device, solving, token * tokens * chosen * models)


def _write(model: Model, recipe: Recipe, pair: Pair) -> _Written:
    """Let a model answer questions of the first benchmark, more and more at once."""
    choice, options = recipe.benchmarks[0], recipe.solutions
    path = at_home(choice.path) if choice.path else None
    asked = None if options.questions == "all" else options.questions
    problems = load_problems(choice.name, path, asked, options.seed, choice.grading)
    problems = problems[: min(MOST, max(2, options.batch_size))]
    prompts = encode_prompts(model, problems, pair.prompt)
    longest = min(TOKENS, pair.max_new_tokens)

    def write(count: int) -> list[Answer]:
        answers = generate(
            model,
            prompts[:count],
            limits(model, prompts[:count], longest),
            stop=pair.stop,
            batch_size=options.batch_size,
            engine=options.engine,
            decoding=options.decoding,
            seed=options.seed,
            say=lambda _: None,
        )
        with closing(answers):
            return [answer for part in in_threads(answers, model.threads) for answer in part]

    seconds, answers = _longer(write, len(problems), model.device.type)
    with Grader() as grader:
        texts = model.tokenizer.batch_decode(
            [each.tokens for each in answers], skip_special_tokens=True
        )
        solutions = [
            graded(grader, problems[place], prompts[place], tokens, text)
            for (place, tokens), text in zip(answers, texts, strict=True)
        ]
    mean = fmean(len(solution.answer) for solution in solutions)
    cut = [len(solution.answer) == longest < pair.max_new_tokens for solution in solutions]
    ended = [solution.correct for solution, short in zip(solutions, cut, strict=True) if not short]
    answer = max(mean, answer_tokens(pair)) if any(cut) else mean
    return _Written(
        seconds / len(solutions) * answer / mean,
        fmean(ended) if ended else 1.0,
        fmean(len(solution.prompt) for solution in solutions),
        answer,
        [TokenSequence(each.prompt, each.answer) for each in solutions],
    )


def _score(model: Model, recipe: Recipe, sequences: Sequence[TokenSequence]) -> float:
    """Score answers, cut as the recipe cuts them; seconds of a token."""
    options = recipe.attribution
    cut = [
        each._replace(answer=each.answer[: max(1, round(alpha * len(each.answer)))])
        for each in sequences
        for alpha in recipe.selection.alpha
    ][:MOST]

    def score(count: int) -> int:
        edges = attribute(
            model,
            cut[:count],
            options.method,
            options.granularity,
            options.batch_size,
            ablation=options.ablation,
            ig_steps=options.ig_steps,
            target=options.target,
        )
        return sum(each.length for each in cut[: len(edges.losses)])

    seconds, tokens = _longer(score, len(cut), model.device.type)
    return seconds / tokens


def _longer(work: Callable[[int], _T], most: int, device: str) -> tuple[float, _T]:
    """Do four times as much each time, as long as the next time seems to take no longer than that.

    What happens once, as compiling, is in the first time, which counts only where it is the last.

    Returns:
        The seconds of the last time, and what it gave.
    """
    # On a CPU that others use too, what they take is no part of it; threads sum up the CPU's time.
    clocks = [time.monotonic, time.process_time] if device == "cpu" else [time.monotonic]
    count, growth = 2, 1.0
    before: float | None = None
    while True:
        start = [clock() for clock in clocks]
        found = work(count)
        seconds = min(clock() - began for clock, began in zip(clocks, start, strict=True))
        if before is not None:
            growth = max(1.0, seconds / before)
        if count >= most or seconds * growth > SECONDS:
            return seconds, found
        count, before = min(4 * count, most), seconds
