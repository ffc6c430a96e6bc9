"""The plan: what a recipe would do and need, told without doing any of it.

Nothing is loaded and the network is not asked; what is not on this machine is said to be missing.

    >>> plan = make_plan(read_recipe("tiny-math"))
    >>> plan.models[0].here
    True
"""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from probe.models import local_folder, read_config, weight_files
from probe.problems import BENCHMARKS, load_problems
from probe.recipe import Recipe

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class ModelNeed:
    """A model of the recipe."""

    reference: str
    """Its folder, hub id or `probe:` name."""

    here: bool
    """Whether its weights are on this machine."""

    parameters: int | None
    """How many it has; None if it is not here."""

    activation_bytes: int | None
    """Roughly what attribution holds per token of a batch; None if the model is not here."""


@dataclass(frozen=True)
class BenchmarkNeed:
    """A benchmark of the recipe."""

    name: str
    """Its name."""

    source: str
    """The file or data set that it comes from."""

    questions: int | None
    """How many would be asked; None where that shows only after the download."""


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
    def downloads(self) -> list[str]:
        """What is not on this machine, as far as that can be known."""
        models = [model.reference for model in self.models if not model.here]
        return models + [need.source for need in self.benchmarks if need.questions is None]


def make_plan(recipe: Recipe) -> Plan:
    """Find out what a recipe needs.

    Raises:
        ProbeError: A folder of the recipe is missing, or a benchmark file is broken.
    """
    models = tuple(_model_need(reference, recipe) for reference in recipe.models())
    options = recipe.solutions
    benchmarks = []
    for choice in recipe.benchmarks:
        known = BENCHMARKS.get(choice.name)
        if known and known.source and not choice.path:
            benchmarks.append(BenchmarkNeed(choice.name, known.source, None))
            continue
        questions = None if options.questions == "all" else options.questions
        path = Path(choice.path).expanduser() if choice.path else None
        problems = load_problems(choice.name, path, questions, options.seed, choice.grading)
        source = choice.path or "ships with probe"
        benchmarks.append(BenchmarkNeed(choice.name, source, len(problems)))
    return Plan(recipe, models, tuple(benchmarks))


def plan_view(plan: Plan) -> RenderableType:
    """Lay out a plan for the terminal."""
    recipe = plan.recipe
    models = Table(title="Models", title_justify="left")
    for title in ("model", "here", "parameters", "weights", "per 1000 tokens of a batch"):
        models.add_column(title)
    for model in plan.models:
        weights = model.parameters and model.parameters * BYTES[recipe.compute.dtype]
        models.add_row(
            model.reference,
            "yes" if model.here else "no: download",
            "?" if model.parameters is None else f"{model.parameters:,}",
            _size(weights),
            _size(model.activation_bytes and 1000 * model.activation_bytes),
        )
    work = Table(title="Work", title_justify="left")
    for title in ("benchmark", "from", "questions", "pairs", "alpha"):
        work.add_column(title)
    for need in plan.benchmarks:
        work.add_row(
            need.name,
            need.source if need.questions is not None else f"hub: {need.source}",
            "?" if need.questions is None else str(need.questions),
            ", ".join(pair.name for pair in recipe.pairs),
            ", ".join(f"{alpha:g}" for alpha in recipe.selection.alpha),
        )
    downloads = ", ".join(plan.downloads) or "nothing"
    options = recipe.attribution
    return Group(
        models,
        work,
        Text(
            f"Each model solves every question once; then {options.method} ({options.granularity}) "
            f"on at most {recipe.selection.samples} questions per pair, benchmark, alpha and side, "
            f"in {recipe.compute.dtype} on {recipe.compute.device}.\nDownloads: {downloads}."
        ),
    )


def recipes_view(plans: list[Plan]) -> RenderableType:
    """Lay out what recipes there are."""
    table = Table()
    for title in ("recipe", "pairs", "method", "benchmarks", "downloads"):
        table.add_column(title)
    for plan in plans:
        pairs = plan.recipe.pairs
        table.add_row(
            plan.recipe.name,
            "\n".join(pair.name for pair in pairs),
            "\n".join(pair.method for pair in pairs),
            "\n".join(need.name for need in plan.benchmarks),
            "\n".join(plan.downloads) or "nothing: all is here",
        )
    return table


def _model_need(reference: str, recipe: Recipe) -> ModelNeed:
    from safetensors import safe_open

    local_folder(reference)
    files = weight_files(reference)
    if not files:
        return ModelNeed(reference, False, None, None)
    parameters = 0
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                size = 1
                for extent in file.get_slice(name).get_shape():
                    size *= extent
                parameters += size
    config = read_config(reference)
    # A fit to one measurement (7B Mistral shape, bfloat16: 8.5 MB a token), sources included.
    d_ffn = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    per_layer = 18 * config.hidden_size + 4 * d_ffn
    activations = config.num_hidden_layers * per_layer * BYTES[recipe.compute.dtype]
    return ModelNeed(reference, True, parameters, activations)


def _size(count: int | None) -> str:
    if count is None:
        return "?"
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.3g} {unit}"
        count /= 1000  # type: ignore[assignment]
    raise AssertionError
