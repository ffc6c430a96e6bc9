"""Timing: how long a recipe would take on this machine, measured on a few of its own questions.

A small model that is here writes a batch of answers and scores a batch of them, about a second of
each; the rest is arithmetic. Nothing is downloaded, and nothing kept.

    >>> time_line(make_plan(read_recipe("tiny-math")))
    'Time on this machine (cpu), from a batch of each: solving about 37 s, scoring about 45 s; ...'
"""

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from statistics import fmean
from typing import NamedTuple, TypeVar

from probe.attribution import TokenSequence, attribute, method_named
from probe.checkpoints import weight_files
from probe.files import at_home
from probe.grading import Grader
from probe.models import Model, load_model, resolve_devices
from probe.problems import Problem, load_problems
from probe.recipe import Pair, Recipe
from probe.run._estimates import (
    AT_ONCE,
    LONGEST,
    SOLVED,
    Span,
    Times,
    answer_span,
    chosen_questions,
    report_seconds,
    scoring_rounds,
    side_costs,
    times_text,
)
from probe.run._needs import Plan
from probe.solutions import PIECE, Answer, encode_prompts, generate, graded, in_threads, limits

_T = TypeVar("_T")

LARGEST_BYTES = 1_000_000_000
"""A file of weights that is read and run within seconds; a larger model is not measured."""

SECONDS = 1.0
"""How long answers are written and scored for it at once, as far as that can be foreseen."""

MOST = 128
"""How many answers are written or scored at once for it, at most."""

FIRST, LONG_SECONDS = 8, 3.0
"""How long an answer may get for it at first; and how long writing may then take, where four times
as many tokens show when answers end."""

SOLVED_BY_BOTH = 0.7
"""At least such a share of what one model solves is taken to be solved by the other, too."""


class _Batch(NamedTuple):
    """What writing some answers at once has taken."""

    rows: int
    """How many."""

    first: float
    """Seconds until each had its first token."""

    step: float
    """Seconds for each token more of all."""


class _Cost(NamedTuple):
    """A time by the number of answers that are written at once, as a straight line."""

    fixed: float
    """Seconds for any number."""

    each: float
    """Seconds more for each."""


class _Written(NamedTuple):
    """What writing a few answers has shown."""

    first: _Cost
    """What a batch takes until each answer has its first token."""

    step: _Cost
    """What it takes for one token more of each."""

    answer: Span
    """How long an answer is, on average."""

    longest: Span
    """How long the longest of a batch is."""

    right: Span
    """Which share of the questions both models of a pair solve."""

    prompt: float
    """How long a prompt is, in tokens."""

    sequences: list[TokenSequence]
    """The prompts with their answers."""

    def seconds(self, count: int, at_once: int, end: int) -> float:
        """How long so many answers take, at one end of what is not known of their lengths."""
        batches = max(1.0, count / at_once)
        once = batches * (self.first.fixed + self.step.fixed * self.longest[end])
        # An answer costs until the end of the piece in which it ends.
        tokens = min(self.longest[end], self.answer[end] + PIECE / 2)
        return once + count * (self.first.each + self.step.each * tokens)


def time_line(plan: Plan) -> str | None:
    """What a dry run and a run say of the time that a recipe takes; None if it runs elsewhere."""
    found = time_batches(plan)
    if found is None:
        options = plan.recipe.compute
        if options.remote or options.cluster or plan.missing_models:
            return None
        why = "until the questions are here" if plan.missing_data else "as a model is large"
        return f"Time on this machine: not measured, {why}; a run's bars tell after some batches."
    device = resolve_devices(plan.recipe.compute.device)[0]
    text = f"Time on this machine ({device}), from a batch of each: {times_text(found)}"
    return f"{text}; more where it does other work as well."


def worth_timing(plan: Plan) -> bool:
    """Whether a run has so much to do that measuring before it is little beside it."""
    asked = {each for pair in plan.recipe.pairs for each in pair.asked() if each.given is None}
    return sum(need.questions or 0 for need in plan.benchmarks) * len(asked) >= 10 * MOST


def time_batches(plan: Plan) -> Times | None:
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
    pair, options = recipe.pairs[0], recipe.compute
    device = resolve_devices(options.device)[0]
    load = partial(load_model, pair.before, str(device), options.dtype, threads=options.threads)
    first, model = _timed(load, device.type)  # imports what it needs, too
    loading, model = _timed(load, device.type)
    written = _write(model, recipe, pair)
    parameters = {need.reference: need.shape.parameters for need in plan.models if need.shape}
    larger = {name: count / parameters[pair.before] for name, count in parameters.items()}
    asked = {each for pair in recipe.pairs for each in pair.asked() if each.given is None}
    models = sum(larger[each.model] for each in asked)
    static = recipe.solutions.engine == "static" or (
        recipe.solutions.engine == "auto" and device.type == "cpu"
    )
    at_once = recipe.solutions.batch_size if static else AT_ONCE
    counts = [need.questions or 0 for need in plan.benchmarks]
    solving = Span(
        *(
            first
            + models * (loading + sum(written.seconds(count, at_once, end) for count in counts))
            for end in (0, 1)
        )
    )
    report = report_seconds(plan)
    if not recipe.selection.alpha or method_named(recipe.attribution.method).passes is None:
        return Times(solving, None, report)
    token = _score(model, recipe, written.sequences)
    sides = sum(
        larger[name] * cost
        for pair in recipe.pairs
        for name, cost in side_costs(recipe, pair).items()
    )
    chosen = chosen_questions(plan, written.right)
    scoring = []
    for end in (0, 1):
        lengths = (max(1, alpha * written.answer[end]) for alpha in recipe.selection.alpha)
        tokens = sum(written.prompt + length for length in lengths)
        scoring.append(token * tokens * chosen[end] * sides + scoring_rounds(plan) * loading)
    return Times(solving, Span(*scoring), report)


def _write(model: Model, recipe: Recipe, pair: Pair) -> _Written:
    """Let a model answer questions of the first benchmark, more and more at once, and longer."""
    choice, options = recipe.benchmarks[0], recipe.solutions
    path = at_home(choice.path) if choice.path else None
    asked = None if options.questions == "all" else options.questions
    problems = load_problems(choice.name, path, asked, options.seed, choice.grading)
    problems = problems[: min(MOST, max(2, options.batch_size))]
    prompts = encode_prompts(model, problems, pair.prompt)

    def write(count: int, longest: int) -> tuple[float, list[Answer]]:
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
            return _timed(
                lambda: [each for part in in_threads(answers, model.threads) for each in part],
                model.device.type,
            )

    batches, answers, limit = _batches(write, len(problems), min(FIRST, pair.max_new_tokens))
    seconds = batches[-1].first + limit * batches[-1].step
    while _cut(answers, limit) and limit < pair.max_new_tokens and 4 * seconds < LONG_SECONDS:
        limit = min(4 * limit, pair.max_new_tokens)
        seconds, answers = write(len(answers), limit)
    ended = _cut(answers, limit) == 0 or limit == pair.max_new_tokens
    answer, longest = _lengths([len(each.tokens) for each in answers], limit, ended, pair)
    return _Written(
        _line([(each.rows, each.first) for each in batches]),
        _line([(each.rows, each.step) for each in batches]),
        answer,
        longest,
        _right(model, problems, prompts, answers, limit if not ended else None),
        fmean(map(len, prompts)),
        [TokenSequence(prompts[each.place], each.tokens) for each in answers],
    )


def _batches(
    write: Callable[[int, int], tuple[float, list[Answer]]], most: int, limit: int
) -> tuple[list[_Batch], list[Answer], int]:
    """Write the beginnings of four times as many answers each time, at least twice.

    Returns:
        What each took, the last answers, and how long these may be.
    """
    write(1, 2)  # what happens once, as compiling
    count, batches = min(2, most), list[_Batch]()
    while True:
        first, _ = write(count, 1)
        whole, answers = write(count, limit)
        steps = max(len(each.tokens) for each in answers) - 1
        batches.append(_Batch(count, first, max(0.0, whole - first) / max(1, steps)))
        if count >= most or (len(batches) > 1 and 4 * (first + whole) > SECONDS):
            return batches, answers, limit
        count = min(4 * count, most)


def _line(points: Sequence[tuple[int, float]]) -> _Cost:
    """The straight line through the last two of some times, which falls nowhere."""
    (fewer, before), (rows, seconds) = points[-2:] if len(points) > 1 else ((0, 0.0), points[0])
    each = min(max(0.0, (seconds - before) / max(1, rows - fewer)), seconds / rows)
    return _Cost(seconds - each * rows, each)


def _cut(answers: Sequence[Answer], limit: int) -> int:
    """How many answers are as long as they may be."""
    return sum(len(each.tokens) >= limit for each in answers)


def _lengths(lengths: Sequence[int], limit: int, ended: bool, pair: Pair) -> tuple[Span, Span]:
    """How long answers are on average, and the longest of a batch, by some that may be cut.

    Of a few that were cut, nobody knows whether they ever end. Where most were, the plan's own
    assumption says more than they do.
    """
    mean, most = fmean(lengths), pair.max_new_tokens
    if ended:
        return Span(mean, mean), Span(max(lengths), max(lengths))
    cut = sum(length >= limit for length in lengths) / len(lengths)
    if cut <= 0.5:
        return Span(mean, mean + cut * (most - limit)), Span(limit, most)
    usual = answer_span(pair)
    answer = Span(max(mean, usual.low), max(mean, usual.high))
    return answer, Span(min(most, LONGEST * answer.low), most)


def _right(
    model: Model,
    problems: Sequence[Problem],
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Answer],
    limit: int | None,
) -> Span:
    """Which share of questions both models solve, by the answers of one that were not cut."""
    whole = [each for each in answers if limit is None or len(each.tokens) < limit]
    if len(whole) < len(answers) / 2:
        return SOLVED
    texts = model.tokenizer.batch_decode([each.tokens for each in whole], skip_special_tokens=True)
    with Grader() as grader:
        right = fmean(
            graded(grader, problems[place], list(prompts[place]), tokens, text).correct
            for (place, tokens), text in zip(whole, texts, strict=True)
        )
    return Span(SOLVED_BY_BOTH * right, right)


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
    count, growth = 2, 1.0
    before: float | None = None
    while True:
        seconds, found = _timed(partial(work, count), device)
        if before is not None:
            growth = max(1.0, seconds / before)
        if count >= most or seconds * growth > SECONDS:
            return seconds, found
        count, before = min(4 * count, most), seconds


def _timed(work: Callable[[], _T], device: str) -> tuple[float, _T]:
    """How many seconds something takes, and what it gives."""
    # On a CPU that others use too, what they take is no part of it; threads sum up the CPU's time.
    clocks = [time.monotonic, time.process_time] if device == "cpu" else [time.monotonic]
    start = [clock() for clock in clocks]
    found = work()
    return min(clock() - began for clock, began in zip(clocks, start, strict=True)), found
