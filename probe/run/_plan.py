"""The plan: what a recipe would do and need, told without doing any of it.

Nothing is loaded and the network is not asked. Of a model that is not on this machine, the sizes
are those that the recipe gives as its `shape`; what neither says is unknown and shown as `?`.
Times are rough and say what they assume.

    >>> plan = make_plan(read_recipe("tiny-math"))
    >>> plan.models[0].here
    True
"""

import math
import resource
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from probe.attribution import ENOUGH_TOKENS, layer_numbers, method_named
from probe.checkpoints import (
    adapter_base,
    find_checkpoint,
    gguf_remark,
    hub_reachable,
    is_gguf,
    unreachable,
    unread_inputs,
    weight_files,
)
from probe.errors import ProbeError
from probe.files import at_home
from probe.fitted import Fitted, open_table
from probe.models import read_config, resolve_devices
from probe.problems import BENCHMARKS, data_set_here, load_problems
from probe.recipe import Pair, Recipe, Shape

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}

PROMPT_TOKENS = 200
ANSWER_SHARE = 0.1
"""What the estimates assume: tokens of a prompt, and of an answer as a share of the longest."""

TOKEN_SECONDS = {"continuous": 1 / 3286 / 32, "static": 1 / 418 / 32}
"""A layer's share of the time in which one H200 writes a token with each engine, while there are
many answers to write: measured at 7B Mistral shape in bfloat16 (docs/generation.md)."""

OPERATIONS_PER_SECOND = 5e14
PASS_SECONDS = 0.08 / 32
"""What scoring reaches on one H200 at that shape with fused kernels, of 4 operations per parameter
and token; and the least time that a batch takes, for each layer (docs/performance.md)."""


MUCH, READ_PER_SECOND = 2_000_000_000, 700_000_000
"""From how many bytes on it is said that weights are read whole, and how many a second one core
digests."""


@dataclass(frozen=True)
class ModelNeed:
    """A model of the recipe."""

    reference: str
    """Its folder, hub id or `probe:` name."""

    here: bool
    """Whether its weights are on this machine."""

    shape: Shape | None
    """How large it is; None where that is not known."""

    def weight_bytes(self, dtype: str) -> int | None:
        """What its weights take in memory, and about what a download takes in bfloat16."""
        return None if self.shape is None else self.shape.parameters * BYTES[dtype]

    def activation_bytes(self, dtype: str) -> int | None:
        """Roughly what attribution holds per token of a batch."""
        if self.shape is None:
            return None
        # As `probe.attribution.bytes_per_token` has it: a layer's input and two sources as well.
        per_layer = layer_numbers(self.shape.d_model, self.shape.d_ffn) + 3 * self.shape.d_model
        return self.shape.n_layers * per_layer * BYTES[dtype]


@dataclass(frozen=True)
class BenchmarkNeed:
    """A benchmark of the recipe."""

    name: str
    """Its name."""

    source: str
    """The file or data set that it comes from."""

    questions: int | None
    """How many would be asked; None where that shows only after the download."""

    here: bool
    """Whether it is on this machine."""


@dataclass(frozen=True)
class Plan:
    """What a recipe needs."""

    recipe: Recipe
    """The recipe."""

    models: tuple[ModelNeed, ...]
    """Each model once."""

    benchmarks: tuple[BenchmarkNeed, ...]
    """Each benchmark."""

    @property
    def missing_models(self) -> list[str]:
        """The models whose weights are not on this machine."""
        return [model.reference for model in self.models if not model.here]

    @property
    def missing_data(self) -> list[str]:
        """The data sets that are not on this machine, as far as that can be known."""
        return [need.source for need in self.benchmarks if not need.here]

    @property
    def solving_seconds(self) -> float | None:
        """About how long one GPU generates; None where a size is not known."""
        engine = "static" if self.recipe.solutions.engine == "static" else "continuous"
        questions = [need.questions for need in self.benchmarks]
        total = 0.0
        for shape, pair in self._askings():
            if shape is None or None in questions:
                return None
            tokens = sum(count or 0 for count in questions) * answer_tokens(pair)
            total += tokens * shape.n_layers * TOKEN_SECONDS[engine]
        return total

    @property
    def scoring_seconds(self) -> float | None:
        """About how long one GPU scores edges; None where a size or the passes are not known."""
        options, selection = self.recipe.attribution, self.recipe.selection
        method = method_named(options.method)
        if method.passes is None:
            return None
        passes = method.passes(options.ig_steps)
        samples = [
            min(selection.samples, need.questions or selection.samples) for need in self.benchmarks
        ]
        shapes = {model.reference: model.shape for model in self.models}
        total = 0.0
        for pair in self.recipe.pairs:
            for shape in (shapes[pair.before], shapes[pair.after]):
                if shape is None:
                    return None
                for alpha in selection.alpha:
                    tokens = scored_tokens(pair, alpha)
                    work = 4 * shape.parameters * tokens / OPERATIONS_PER_SECOND
                    least = shape.n_layers * PASS_SECONDS / sequences_per_batch(self.recipe, tokens)
                    total += sum(samples) * passes * max(work, least)
        return total

    def _askings(self) -> list[tuple[Shape | None, Pair]]:
        """Each model as often as it solves the benchmarks."""
        shapes = {model.reference: model.shape for model in self.models}
        uses = {
            (model, pair.prompt, pair.max_new_tokens): (shapes[model], pair)
            for pair in self.recipe.pairs
            for model in (pair.before, pair.after)
        }
        return list(uses.values())


def answer_tokens(pair: Pair) -> float:
    """How long the estimates take a pair's answers to be."""
    return ANSWER_SHARE * pair.max_new_tokens


def scored_tokens(pair: Pair, alpha: float) -> float:
    """How long they take a scored sequence to be."""
    return PROMPT_TOKENS + alpha * answer_tokens(pair)


def sequences_per_batch(recipe: Recipe, tokens: float) -> int:
    """How many sequences of so many tokens run at once on a GPU with memory enough."""
    size = recipe.attribution.batch_size
    return max(1, int(ENOUGH_TOKENS["cuda"] / tokens)) if size == "auto" else size


def make_plan(recipe: Recipe) -> Plan:
    """Find out what a recipe needs.

    Raises:
        ProbeError: A folder of the recipe is missing, or a benchmark file is broken.
    """
    shapes: dict[str, Shape | None] = {}
    for pair in recipe.pairs:
        for reference in (pair.before, pair.after):
            shapes[reference] = shapes.get(reference) or pair.shape
    models = tuple(_model_need(reference, shape) for reference, shape in shapes.items())
    options = recipe.solutions
    benchmarks = []
    for choice in recipe.benchmarks:
        known = BENCHMARKS.get(choice.name)
        questions = None if options.questions == "all" else options.questions
        if known and known.source and not choice.path:
            if known.size and questions:
                questions = min(known.size, questions)
            questions = questions or known.size
            here = data_set_here(known.source)
            benchmarks.append(BenchmarkNeed(choice.name, known.source, questions, here))
            continue
        path = at_home(choice.path) if choice.path else None
        problems = load_problems(choice.name, path, questions, options.seed, choice.grading)
        source = choice.path or "ships with probe"
        benchmarks.append(BenchmarkNeed(choice.name, source, len(problems), True))
    return Plan(recipe, models, tuple(benchmarks))


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
    models = _table("model", "here", "parameters", f"in {dtype}", "per 1000 tokens")
    for model in plan.models:
        activations = model.activation_bytes(dtype)
        models.add_row(
            model.reference,
            "yes" if model.here else "no",
            f"{model.shape.parameters:,}" if model.shape else "?",
            _size(model.weight_bytes(dtype)),
            _size(activations and 1000 * activations),
        )
    work = _table("benchmark", "from", "here", "questions")
    for need in plan.benchmarks:
        asked = "?" if need.questions is None else str(need.questions)
        work.add_row(need.name, need.source, "yes" if need.here else "no", asked)
    parts: list[RenderableType] = [Fitted(models, 1), Text(""), Fitted(work, 2), Text("")]
    return Group(*parts, Text("\n".join([_work(recipe), *_needs(plan), _downloads(plan)])))


def recipes_view(plans: list[Plan]) -> RenderableType:
    """Lay out what recipes there are."""
    table = _table("recipe", "what it shows", "to download")
    for plan in plans:
        missing = len(plan.missing_models), len(plan.missing_data)
        sizes = [
            model.weight_bytes("bfloat16")
            for model in plan.models
            if not model.here and model.shape is not None
        ]
        models = f"{missing[0]} models" if missing[0] else ""
        if len(sizes) == missing[0] and sizes:
            models += f", {_size(sum(size or 0 for size in sizes))}"
        lines = [models, f"{missing[1]} data sets" if missing[1] else ""]
        text = "\n".join(filter(None, lines)) or "nothing: all is here"
        table.add_row(plan.recipe.name, plan.recipe.description, text)
    # Names are for typing, so what is long goes below itself in the middle.
    for column in (table.columns[0], table.columns[-1]):
        column.no_wrap = True
    return table


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
    memory = f"{_size(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)} of memory here"
    if torch.cuda.is_available():
        memory += f", {_size(torch.cuda.max_memory_allocated())} on the GPU"
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
            f"Memory of the largest batch: about {_size(int(max(needs)))}"
            f"{'; smaller batches do with less' if recipe.selection.alpha else ''}."
        )
    else:
        lines.append("Memory and time: unknown until the models are here.")
    times = [
        f"{what} {duration(seconds)}"
        for what, seconds in (
            ("solving about", plan.solving_seconds),
            ("scoring about", plan.scoring_seconds if recipe.selection.alpha else None),
        )
        if seconds is not None
    ]
    if times and (recipe.compute.remote or not _on_cpu(recipe)):
        lines.append(f"Time on one H100 or H200, roughly: {', '.join(times)}.")
    if len(needs) == 2 * len(recipe.pairs):
        lengths = sorted({round(answer_tokens(pair)) for pair in recipe.pairs})
        lines.append(
            f"This assumes prompts of {PROMPT_TOKENS} tokens and answers of a tenth of the longest "
            f"({', '.join(map(str, lengths))} tokens)."
        )
    return lines


def reading_lines(recipe: Recipe) -> list[str]:
    """What is said before weights are read whole for the first time, where that takes a while."""
    size = sum(unread_inputs(name) for name in recipe.models() if weight_files(name))
    if size < MUCH:
        return []
    return [
        f"All {_size(size)} of weights are read once, so that a change is noticed: "
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


def _model_need(reference: str, shape: Shape | None) -> ModelNeed:
    checkpoint = find_checkpoint(reference)
    here = bool(weight_files(reference))
    base = reference
    if checkpoint and checkpoint.adapter:
        base = adapter_base(checkpoint.adapter)
    files = weight_files(base)
    if files and all(path.suffix == ".safetensors" for path in files):
        config = read_config(base)
        shape = Shape(
            parameters=sum(map(_numbers, files)),
            n_layers=config.num_hidden_layers,
            d_model=config.hidden_size,
            d_ffn=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        )
    return ModelNeed(reference, here, shape)


def _numbers(path: Path) -> int:
    """How many numbers a safetensors file holds, from its header."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        return sum(math.prod(file.get_slice(name).get_shape()) for name in names)


def _table(*titles: str) -> Table:
    table = open_table()
    for title in titles:
        right = title.startswith(("parameters", "in ", "per ", "questions"))
        table.add_column(title, justify="right" if right else "left", overflow="fold")
    return table


def _size(count: int | None) -> str:
    if count is None:
        return "?"
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"


def duration(seconds: float) -> str:
    """A time as text, in seconds, minutes or hours."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
