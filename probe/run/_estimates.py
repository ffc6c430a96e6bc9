"""Estimates: how long a recipe takes on one GPU, by arithmetic alone.

Nobody knows beforehand how long answers get, nor which questions both models solve. So a time is a
span; what was measured for it is in docs/generation.md and docs/performance.md.

    >>> times_text(gpu_times(make_plan(read_recipe("mistral-math"))))
    'solving 7 to 64 min, scoring 3 to 6 min, the report about 8 s'
"""

import math
from typing import NamedTuple

from probe.attribution import ENOUGH_TOKENS, method_named
from probe.metrics import METRICS, TOKEN_METRICS
from probe.recipe import Pair, Recipe
from probe.run._needs import Plan
from probe.stats import CONTROLS, control_sides, flips_for

PROMPT_TOKENS = 200
"""What the estimates take a prompt to be."""

AT_ONCE, LONGEST = 256, 3.0
"""So many answers are written at once, and the longest of them is about so many times the mean."""

TOKEN_SECONDS = {"continuous": 1 / 9885 / 32, "static": 1 / 418 / 32}
STEP_SECONDS = 0.7e-3
"""A layer's share of the time in which a GPU writes a token with each engine (continuous: an H100;
static: an H200), while there are many answers to write, at 7B Mistral shape in bfloat16; and of a
step of the continuous one, however small the model is (an H100, SmolLM2-135M)."""

OPERATIONS_PER_SECOND = 5e14
PASS_SECONDS = 0.08 / 32
"""What scoring reaches on one H200 at that shape with fused kernels, of 4 operations per parameter
and token; and the least time that a batch takes, for each layer."""

LOAD_SECONDS, LOADED_PER_SECOND = 2.0, 1.3e9
"""What it takes to have a model, in each phase: that, and so many bytes a second."""

TEMPERATURE_SHARE = 1 / 3
"""What finding temperatures adds to scoring a side."""

CELLS_SECONDS, EDGE_SECONDS, FLIP_SECONDS = 0.08, 3e-7, 5e-9
"""What the report takes for two sides; for each of their scores beside that; and for each question
of each flip of signs."""


class Span(NamedTuple):
    """A number that is not known better than so."""

    low: float
    """At least about that."""

    high: float
    """At most about that."""

    def times(self, low: float, high: float | None = None) -> "Span":
        """So many times it."""
        return Span(self.low * low, self.high * (low if high is None else high))


SOLVED = Span(0.3, 1.0)
"""The share of questions that both models of a pair are taken to solve."""


class Times(NamedTuple):
    """How long the phases of a recipe take, in seconds."""

    solving: Span
    """Answers are written."""

    scoring: Span | None
    """Edges are scored, those of controls too; None for none, and where that cannot be known."""

    report: float
    """Statistics are computed."""


def answer_span(pair: Pair) -> Span:
    """How long a pair's answers are on average, by the longest that they may be.

    A limit of 64 was set for sums of 30 tokens, one of 4096 for solutions of 200 to 2000.
    """
    longest = pair.max_new_tokens
    return Span(min(longest, 16 + longest / 20), min(longest, 16 + longest / 2))


def scored_tokens(pair: Pair, alpha: float) -> float:
    """How long a scored sequence may be."""
    return PROMPT_TOKENS + alpha * answer_span(pair).high


def sequences_per_batch(recipe: Recipe, tokens: float) -> int:
    """How many sequences of so many tokens run at once on a GPU with memory enough."""
    size = recipe.attribution.batch_size
    return max(1, int(ENOUGH_TOKENS["cuda"] / tokens)) if size == "auto" else size


def gpu_times(plan: Plan) -> Times | None:
    """How long one GPU takes; None where a size or a number of questions is not known."""
    known = all(model.shape for model in plan.models)
    if not known or any(need.questions is None for need in plan.benchmarks):
        return None
    solving = Span(*(_solving(plan, end) for end in (0, 1)))
    passes = method_named(plan.recipe.attribution.method).passes
    if passes is None or not plan.recipe.selection.alpha:
        return Times(solving, None, report_seconds(plan))
    count = passes(plan.recipe.attribution.ig_steps)
    scoring = Span(*(_scoring(plan, count, end) for end in (0, 1)))
    return Times(solving, scoring, report_seconds(plan))


def _load_seconds(plan: Plan, reference: str) -> float:
    """How long it takes to have a model."""
    (size,) = (
        need.weight_bytes(plan.recipe.compute.dtype)
        for need in plan.models
        if need.reference == reference
    )
    return LOAD_SECONDS + (size or 0) / LOADED_PER_SECOND


def _solving(plan: Plan, end: int) -> float:
    """The seconds in which every model answers, where answers are as long as one end of a span."""
    shapes = {model.reference: model.shape for model in plan.models}
    engine = "static" if plan.recipe.solutions.engine == "static" else "continuous"
    count = sum(need.questions or 0 for need in plan.benchmarks)
    asked = {
        (side.model, pair.prompt, pair.max_new_tokens): pair
        for pair in plan.recipe.pairs
        for side in pair.asked()
        if side.given is None
    }
    total = 0.0
    for (model, _, longest), pair in asked.items():
        shape = shapes[model]
        assert shape is not None
        length = answer_span(pair)[end]
        # An answer takes the place of one that ended; at the end few are left.
        steps = count * length / AT_ONCE + min(longest, LONGEST * length)
        seconds = count * length * TOKEN_SECONDS[engine]
        if engine == "continuous":
            seconds = max(seconds, steps * STEP_SECONDS)
        total += _load_seconds(plan, model) + shape.n_layers * seconds
    return total


def _scoring(plan: Plan, passes: int, end: int) -> float:
    """The seconds in which edges are scored, controls too, at one end of what is not known."""
    recipe = plan.recipe
    shapes = {model.reference: model.shape for model in plan.models}
    samples = chosen_questions(plan)[end]
    total = 0.0
    for pair in recipe.pairs:
        for model, sides in side_costs(recipe, pair).items():
            shape = shapes[model]
            assert shape is not None
            for alpha in recipe.selection.alpha:
                tokens = PROMPT_TOKENS + alpha * answer_span(pair)[end]
                work = 4 * shape.parameters * tokens / OPERATIONS_PER_SECOND
                least = shape.n_layers * PASS_SECONDS / sequences_per_batch(recipe, tokens)
                total += sides * samples * passes * max(work, least)
    loads = sum(_load_seconds(plan, model.reference) for model in plan.models)
    return total + scoring_rounds(plan) / len(plan.models) * loads


def chosen_questions(plan: Plan, share: Span = SOLVED) -> Span:
    """How many questions of all benchmarks are scored for a pair, by the share that both solve."""
    most = plan.recipe.selection.samples
    counts = [need.questions or 0 for need in plan.benchmarks]
    low, high = (sum(min(most, part * count) for count in counts) for part in share)
    return Span(low, high)


def side_costs(recipe: Recipe, pair: Pair) -> dict[str, float]:
    """How much each model of a pair is scored at each alpha, in sides on its own answers."""
    costs = {"before": 1.0, "after": 1.0}
    for side in control_sides(recipe.attribution.control):
        costs[side.model] += 1 + (TEMPERATURE_SHARE if side.like else 0)
    return {pair.before: costs["before"], pair.after: costs["after"]}


def scoring_rounds(plan: Plan) -> int:
    """How often a model is loaded while edges are scored."""
    # Sides that are brought to the loss of another wait for all the others.
    rounds = 1 + any(side.like for side in control_sides(plan.recipe.attribution.control))
    return rounds * len(plan.models)


def report_seconds(plan: Plan) -> float:
    """How long the report takes, on one core."""
    recipe = plan.recipe
    compared = 1 + sum(len(CONTROLS[name].compared) for name in recipe.attribution.control)
    count = compared * len(recipe.comparisons())
    layers = max((model.shape.n_layers for model in plan.models if model.shape), default=0)
    edges = (2 * layers + 1) ** 2  # about, with query, key and value apart
    flips = flips_for(count * len(METRICS | TOKEN_METRICS)) if recipe.report.resamples else 0
    each = edges * EDGE_SECONDS + flips * FLIP_SECONDS
    questions = compared * len(recipe.pairs) * len(recipe.selection.alpha)
    return count * CELLS_SECONDS + questions * chosen_questions(plan).high * each


def times_text(times: Times) -> str:
    """What is said of the phases."""
    parts = [f"solving {span_text(times.solving)}"]
    if times.scoring is not None:
        parts += [f"scoring {span_text(times.scoring)}"]
        parts += [f"the report about {duration(times.report)}"]
    return ", ".join(parts)


def span_text(span: Span) -> str:
    """A span as text; one number where its ends are near each other."""
    if span.high < 1.3 * span.low or span.high < 1.5:
        return f"about {duration(math.sqrt(max(0.0, span.low * span.high)))}"
    low, high = duration(span.low), duration(span.high)
    number, unit = low.split()
    return f"{number} to {high}" if unit == high.split()[1] else f"{low} to {high}"


def duration(seconds: float) -> str:
    """A time as text, in seconds, minutes or hours."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
