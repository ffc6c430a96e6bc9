"""The plan: what a recipe would do and need, told without doing any of it.

`_needs` finds out what there is, and `_estimates` how long it takes; here it is said.

    >>> print(plan_lines(make_plan(read_recipe("tiny-math")))[0])
"""

import math
import resource
from collections.abc import Mapping, Sequence

import torch
from rich.console import Group, RenderableType
from rich.text import Text

from probe.checkpoints import (
    gguf_remark,
    hub_reachable,
    is_gguf,
    unreachable,
    unread_inputs,
    weight_files,
)
from probe.errors import ProbeError
from probe.fitted import Fitted
from probe.models import resolve_devices
from probe.recipe import Recipe
from probe.run._estimates import (
    PROMPT_TOKENS,
    answer_span,
    duration,
    gpu_times,
    scored_tokens,
    sequences_per_batch,
    times_text,
)
from probe.run._needs import Plan, make_plan, need_table, size_text

MUCH, READ_PER_SECOND = 2_000_000_000, 700_000_000
"""From how many bytes on it is said that weights are read whole, and how many a second one core
digests."""


def check_reach(recipe: Recipe) -> None:
    """Check that what is not on this machine can be downloaded.

    Raises:
        ProbeError: It cannot; the message says what is missing and how to do without the hub.
    """
    plan = make_plan(recipe)
    models = () if recipe.compute.remote else plan.missing_models
    if not (models or plan.missing_data) or hub_reachable():
        return
    parts, options = [], []
    if models:
        parts.append(f"the models {', '.join(models)} (hf download ID)")
        options += [
            f"--set pairs.{number}.{side}=FOLDER"
            for number, pair in enumerate(recipe.pairs)
            for side, model in (("before", pair.before), ("after", pair.after))
            if model in models
        ]
    if plan.missing_data:
        names = ", ".join(plan.missing_data)
        parts.append(f"the data sets {names} (hf download --repo-type dataset ID)")
        options += [
            f"--benchmark-path {need.name}=FILE" for need in plan.benchmarks if not need.here
        ]
    raise ProbeError(
        f"{unreachable()}, and this machine lacks {' and '.join(parts)}: download them where there "
        f"is network, and say where they are by {' '.join(options)}"
    )


def plan_view(plan: Plan) -> RenderableType:
    """Lay out a plan for the terminal."""
    recipe, dtype = plan.recipe, plan.recipe.compute.dtype
    models = need_table("model", "here", "parameters", f"in {dtype}", "per 1000 tokens")
    for model in plan.models:
        activations = model.activation_bytes(dtype)
        models.add_row(
            model.reference,
            "yes" if model.here else "no",
            f"{model.shape.parameters:,}" if model.shape else "?",
            size_text(model.weight_bytes(dtype)),
            size_text(activations and 1000 * activations),
        )
    work = need_table("benchmark", "from", "here", "questions")
    for need in plan.benchmarks:
        asked = "?" if need.questions is None else str(need.questions)
        work.add_row(need.name, need.source, "yes" if need.here else "no", asked)
    parts: list[RenderableType] = [Fitted(models, 1), Text(""), Fitted(work, 2), Text("")]
    return Group(*parts, Text("\n".join([_work(recipe), *_needs(plan), _downloads(plan)])))


def plan_lines(plan: Plan) -> list[str]:
    """What a run says before it starts: its work, and what that needs on a GPU."""
    return [_work(plan.recipe), *_needs(plan)]


def lengths_line(lengths: Sequence[int], recipe: Recipe) -> str:
    """What a run says before it scores edges, once the lengths of its sequences are known."""
    rows = sequences_per_batch(recipe, max(lengths))
    batches = math.ceil(len(lengths) / rows)
    return (
        f"attribution: {len(lengths)} sequences, {sum(lengths):,} tokens, at most {max(lengths)} "
        f"each; about {batches} batches"
    )


def took_line(seconds: Mapping[str, float]) -> str:
    """What a run says after it, from the seconds of its phases."""
    phases = [f"{phase} {duration(took)}" for phase, took in seconds.items()]
    memory = (
        f"{size_text(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)} of memory here"
    )
    if torch.cuda.is_available():
        memory += f", {size_text(torch.cuda.max_memory_allocated())} on the GPU"
    return f"took: {', '.join(phases)}; at most {memory}"


def _work(recipe: Recipe) -> str:
    options, alphas = recipe.attribution, recipe.selection.alpha
    text = "Each model solves every question once"
    if not alphas:
        return f"{text}; no edges are scored."
    pairs = ", ".join(pair.name for pair in recipe.pairs)
    return (
        f"{text}; then {options.method} ({options.granularity}) on all "
        f"questions that qualify, at most {recipe.selection.samples}, per benchmark, pair "
        f"({pairs}), side and alpha "
        f"({', '.join(f'{alpha:g}' for alpha in alphas)}), in {recipe.compute.dtype} on "
        f"{'a cluster' if recipe.compute.cluster else recipe.compute.device}."
    )


def _needs(plan: Plan) -> list[str]:
    """Memory and time, where sizes are known, and what they assume."""
    recipe = plan.recipe
    lines = reading_lines(recipe)
    lines += [f"{gguf_remark(name)}." for name in recipe.models() if is_gguf(name)]
    shapes = {model.reference: model for model in plan.models}
    needs = []
    for pair in recipe.pairs:
        for model in (shapes[pair.before], shapes[pair.after]):
            weights = model.weight_bytes(recipe.compute.dtype)
            token = model.activation_bytes(recipe.compute.dtype)
            if weights and token:
                tokens = scored_tokens(pair, max(recipe.selection.alpha, default=0))
                batch = tokens * sequences_per_batch(recipe, tokens)
                needs.append(weights + (token * batch if recipe.selection.alpha else 0))
    if len(needs) == 2 * len(recipe.pairs):
        lines.append(
            f"Memory of the largest batch: about {size_text(int(max(needs)))}"
            f"{'; smaller batches do with less' if recipe.selection.alpha else ''}."
        )
    else:
        lines.append("Memory and time: unknown until the models are here.")
    times = gpu_times(plan)
    if times and (recipe.compute.remote or not _on_cpu(recipe)):
        lines.append(f"Time on one H100 or H200, roughly: {times_text(times)}.")
    if len(needs) == 2 * len(recipe.pairs):
        spans = {pair.max_new_tokens: answer_span(pair) for pair in recipe.pairs}
        lengths = (f"{span.low:.0f} to {span.high:.0f}" for _, span in sorted(spans.items()))
        lines.append(
            f"This assumes prompts of {PROMPT_TOKENS} tokens, and answers of "
            f"{' or '.join(lengths)} on average, by the longest that they may be."
        )
    return lines


def reading_lines(recipe: Recipe) -> list[str]:
    """What is said before weights are read whole for the first time, where that takes a while."""
    size = sum(unread_inputs(name) for name in recipe.models() if weight_files(name))
    if size < MUCH:
        return []
    return [
        f"All {size_text(size)} of weights are read once, so that a change is noticed: "
        + (
            "by all nodes."
            if recipe.compute.cluster
            else f"about {duration(size / READ_PER_SECOND)}."
        )
    ]


def _on_cpu(recipe: Recipe) -> bool:
    """Whether a recipe whose models are all here runs on the CPU, where no GPU's time is of use."""
    here = all(weight_files(model) for model in recipe.models())
    return (
        here
        and not recipe.compute.cluster
        and resolve_devices(recipe.compute.device)[0].type == "cpu"
    )


def _downloads(plan: Plan) -> str:
    missing = [*plan.missing_models, *plan.missing_data]
    return f"Downloads: {', '.join(missing) or 'nothing'}."
