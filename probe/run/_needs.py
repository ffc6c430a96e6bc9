"""Needs: what a recipe's models and benchmarks are, and what of them is on this machine.

Nothing is loaded and the network is not asked. Of a model that is not on this machine, the sizes
are those that the recipe gives as its `shape`; what neither says is unknown and shown as `?`.

    >>> plan = make_plan(read_recipe("tiny-math"))
    >>> plan.models[0].here
    True
"""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from rich.table import Table

from probe.checkpoints import adapter_base, find_checkpoint, weight_files
from probe.files import at_home
from probe.fitted import open_table
from probe.problems import BENCHMARKS, data_set_here, load_problems
from probe.recipe import Recipe, Shape

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class ModelNeed:
    """A model of the recipe."""

    reference: str
    """Its folder, hub id or `probe:` name."""

    here: bool
    """Whether its weights are on this machine."""

    given: Shape | None
    """How large the recipe says that it is."""

    @cached_property
    def shape(self) -> Shape | None:
        """How large it is, as its files say where they are here; None where nothing says it."""
        return (_shape(self.reference) if self.here else None) or self.given

    def weight_bytes(self, dtype: str) -> int | None:
        """What its weights take in memory, and about what a download takes in bfloat16."""
        return None if self.shape is None else self.shape.parameters * BYTES[dtype]

    def activation_bytes(self, dtype: str) -> int | None:
        """Roughly what attribution holds per token of a batch."""
        if self.shape is None:
            return None
        from probe.attribution import layer_numbers  # brings what runs models

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


def make_plan(recipe: Recipe) -> Plan:
    """Find out what a recipe needs.

    Raises:
        ProbeError: A folder of the recipe is missing, or a benchmark file is broken.
    """
    shapes: dict[str, Shape | None] = {}
    for pair in recipe.pairs:
        for reference in (pair.before, pair.after):
            shapes[reference] = shapes.get(reference) or pair.shape
    models = tuple(
        ModelNeed(reference, bool(weight_files(reference)), shape)
        for reference, shape in shapes.items()
    )
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


def recipes_view(plans: list[Plan]) -> Table:
    """Lay out what recipes there are."""
    table = need_table("recipe", "what it shows", "to download")
    for plan in plans:
        missing = len(plan.missing_models), len(plan.missing_data)
        sizes = [
            model.weight_bytes("bfloat16")
            for model in plan.models
            if not model.here and model.shape is not None
        ]
        models = f"{missing[0]} models" if missing[0] else ""
        if len(sizes) == missing[0] and sizes:
            models += f", {size_text(sum(size or 0 for size in sizes))}"
        lines = [models, f"{missing[1]} data sets" if missing[1] else ""]
        text = "\n".join(filter(None, lines)) or "nothing: all is here"
        table.add_row(plan.recipe.name, plan.recipe.description, text)
    # Names are for typing, so what is long goes below itself in the middle.
    for column in (table.columns[0], table.columns[-1]):
        column.no_wrap = True
    return table


def _shape(reference: str) -> Shape | None:
    """How large a model is whose weights are here, where its config says it."""
    from probe.models import read_config  # brings transformers

    checkpoint = find_checkpoint(reference)
    base = reference
    if checkpoint and checkpoint.adapter:
        base = adapter_base(checkpoint.adapter)
    files = weight_files(base)
    if not files or any(path.suffix != ".safetensors" for path in files):
        return None
    config = read_config(base)
    return Shape(
        parameters=sum(map(_numbers, files)),
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        d_ffn=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
    )


def _numbers(path: Path) -> int:
    """How many numbers a safetensors file holds, from its header."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        return sum(math.prod(file.get_slice(name).get_shape()) for name in names)


def need_table(*titles: str) -> Table:
    """An empty table, numbers to the right."""
    table = open_table()
    for title in titles:
        right = title.startswith(("parameters", "in ", "per ", "questions"))
        table.add_column(title, justify="right" if right else "left", overflow="fold")
    return table


def size_text(count: int | None) -> str:
    """So many bytes."""
    if count is None:
        return "?"
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
