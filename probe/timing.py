"""Timing: how long a recipe would take on this machine, measured on a few of its own questions.

A small model that is here answers one batch and scores a few of its answers; the rest is
arithmetic. Nothing is downloaded and nothing kept.

    >>> measured_line(read_recipe("tiny-math"))
    'Time on this machine (cpu), from a measured batch: solving 20 s, scoring 8 s.'
"""

import time
from pathlib import Path

from probe.attribution import attribute
from probe.checkpoints import weight_files
from probe.controls import control_sides
from probe.methods import method_named
from probe.models import load_model, resolve_devices
from probe.problems import BENCHMARKS, data_set_here, load_problems
from probe.recipe import Recipe
from probe.sequences import TokenSequence
from probe.solutions import solve

LARGEST_BYTES = 400_000_000
"""Weights that are read and run within seconds; a larger model is not measured."""

QUESTIONS = 64
TOKENS = 64
"""How many questions are asked for it, and how many tokens an answer gets at most."""


def measured_line(recipe: Recipe) -> str | None:
    """The time of a recipe on this machine; None where that cannot be measured in seconds.

    That is so for a server, a model or benchmark that is not here or is large, a prompt that
    takes a chat template, and the method `exact`.
    """
    pair, choice, options = recipe.pairs[0], recipe.benchmarks[0], recipe.attribution
    method = method_named(options.method)
    files = [file for model in recipe.models() for file in weight_files(model)]
    here = all(weight_files(model) for model in recipe.models())
    known = BENCHMARKS.get(choice.name)
    away = known and known.source and not choice.path and not data_set_here(known.source)
    largest = max((file.stat().st_size for file in files), default=0)
    if recipe.compute.remote or not here or away or largest > LARGEST_BYTES or not method.passes:
        return None
    path = Path(choice.path).expanduser() if choice.path else None
    asked = recipe.solutions.questions
    questions = None if asked == "all" else asked
    problems = load_problems(choice.name, path, questions, recipe.solutions.seed, choice.grading)
    device = resolve_devices(recipe.compute.device)[0]
    model = load_model(
        pair.before, str(device), recipe.compute.dtype, threads=recipe.compute.threads
    )
    part = problems[:QUESTIONS]
    longest = min(TOKENS, pair.max_new_tokens)
    # What happens once (compiling, starting the grader) is no part of a question's time.
    first = solve(model, part[:2], pair.prompt, max_new_tokens=4)
    warm = [solution for batch in first for solution in batch]
    attribute(model, [TokenSequence(s.prompt, s.answer) for s in warm if s.answer], options.method)
    start = time.monotonic()
    size = recipe.solutions.batch_size
    batches = solve(model, part, pair.prompt, max_new_tokens=longest, batch_size=size)
    solutions = [solution for batch in batches for solution in batch]
    # Where answers are longer than what was measured, they are taken to be ten times as long.
    stretch = 10.0 if any(len(s.answer) >= TOKENS < pair.max_new_tokens for s in solutions) else 1.0
    solving = (time.monotonic() - start) * stretch / len(part)
    askings = len({asked for each in recipe.pairs for asked in each.asked()})
    solving *= askings * len(problems) * len(recipe.benchmarks)
    scoring, alphas = 0.0, recipe.selection.alpha
    for alpha in alphas:
        sequences = [
            TokenSequence(s.prompt, s.answer[: max(1, round(alpha * len(s.answer)))])
            for s in solutions[:24]
            if s.answer
        ]
        start = time.monotonic()
        attribute(
            model,
            sequences,
            options.method,
            options.granularity,
            options.batch_size,
            ig_steps=options.ig_steps,
            target=options.target,
        )
        scoring += (time.monotonic() - start) / max(1, len(sequences))
    sides = 2 + len(control_sides(options.control))
    count = min(recipe.selection.samples, len(problems)) * len(recipe.benchmarks)
    scoring *= count * sides * len(recipe.pairs)
    parts = [f"solving {_duration(solving)}"]
    if alphas:
        parts.append(f"scoring {_duration(scoring)}")
    return f"Time on this machine ({device}), from a measured batch: {', '.join(parts)}."


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
