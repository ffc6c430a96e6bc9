"""Recipes: what is compared, on what, and how, as data.

A recipe is a TOML file; its sections are the dataclasses below, which are also its documentation.
Recipes that ship with the package have names; `read_recipe` takes such a name or the path of a
file, and overrides like `{"selection.samples": "50", "pairs.0.before": "my-folder"}`.

    >>> read_recipe("tiny-math").pairs[0].method
    'GRPO'
"""

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Literal, cast, get_type_hints

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from probe.errors import ProbeError
from probe.graph import Ablation, Granularity
from probe.kernels import Kernels
from probe.metrics import BINS
from probe.models import DType
from probe.selection import Convention

_STRICT = ConfigDict(extra="forbid")


def _whole(value: object) -> object:
    """Let no true, "3" or 3.0 pass for a whole number."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError("a whole number was expected")
    return value


Count = Annotated[int, BeforeValidator(_whole), Field(ge=1)]
Seed = Annotated[int, BeforeValidator(_whole), Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]


@dataclass(frozen=True, config=_STRICT)
class Pair:
    """Two checkpoints of one architecture."""

    name: Name
    """Its name in tables and file names."""

    before: str
    """The model before: a folder, a hub id, or `probe:...` for one that ships with the package."""

    after: str
    """The model after."""

    method: str = ""
    """How the one became the other: GRPO, PPO, DPO, ..."""

    prompt: Annotated[str, Field(pattern=r"\{question\}")] = "{question}"
    """The literal prompt; `{question}` in it stands for the question."""

    max_new_tokens: Count = 1024
    """Longest answer, in tokens."""


@dataclass(frozen=True, config=_STRICT)
class BenchmarkChoice:
    """A benchmark to solve."""

    name: str
    """A name in `probe.problems.BENCHMARKS`."""

    path: str | None = None
    """A local file or folder with its problems, instead of the benchmark's own source."""


@dataclass(frozen=True, config=_STRICT)
class Compute:
    """Where and how precisely the models run."""

    device: str = "auto"
    """`auto`, `cpu`, `cuda`, or several by commas: then models take turns on them."""

    dtype: DType = "bfloat16"
    """Precision of weights and activations; scores are accumulated in float32 in any case."""

    kernels: Kernels = "auto"
    """Fused kernels (`liger`), those of transformers (`eager`), or fused ones where they run."""

    threads: Count | None = None
    """Threads of a run on CPU; torch's own choice if not given. Small models want 1."""


@dataclass(frozen=True, config=_STRICT)
class SolutionOptions:
    """How the problems are solved."""

    questions: Count | Literal["all"] = "all"
    """How many questions of each benchmark; a random part if fewer than all."""

    seed: Seed = 42
    """Seed of that part."""

    batch_size: Count = 32
    """How many questions run at once."""


@dataclass(frozen=True, config=_STRICT)
class SelectionOptions:
    """Which questions are compared; the constants are those of the published runs."""

    alpha: Annotated[tuple[Positive, ...], Field(min_length=1)] = (0.03, 0.1, 0.3, 0.5)
    """Scored lengths, as shares of the reference length."""

    beta: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.5
    """Shortest answer, as a share of the reference length."""

    gamma: Positive = 1.5
    """Longest answer, likewise."""

    delta: Positive = 0.5
    """Largest difference of the two lengths, as a share of their mean."""

    samples: Count = 100
    """At most this many questions."""

    seed: Seed = 42
    """Seed of their draw."""

    convention: Convention = "code"
    """The published code's rules or the paper's; see `probe.selection`."""


@dataclass(frozen=True, config=_STRICT)
class AttributionOptions:
    """How edges are scored."""

    method: str = "eap"
    """A name in `probe.attribution.METHODS`."""

    granularity: Granularity = "qkv"
    """`qkv`, `block` or `head`; see `probe.graph`."""

    ablation: Ablation = "zero"
    """What is left of a removed output: nothing, or its `mean` over a side's sequences."""

    ig_steps: Count = 5
    """Points of the integral of `eap-ig`."""

    batch_size: Count | Literal["auto"] = "auto"
    """How many sequences (for `exact`: edges) run at once; `auto` for as many as make it faster and
    fit into memory."""


@dataclass(frozen=True, config=_STRICT)
class FaithfulnessOptions:
    """Whether and how methods are compared with the exact effects of edges."""

    edges: Annotated[int, BeforeValidator(_whole), Field(ge=0)] = 0
    """How many edges of each model are computed exactly; 0 to leave this out."""

    methods: Annotated[tuple[str, ...], Field(min_length=1)] = ("eap", "eap-ig", "relp")
    """What is compared; the edges are drawn by the strength that the first one gives them."""

    sequences: Count = 8
    """How many sequences of each model the edges are from."""

    seed: Seed = 42
    """Seed of the draw."""

    batch_size: Count = 32
    """How many edges run at once."""


@dataclass(frozen=True, config=_STRICT)
class ReportOptions:
    """How metrics are computed and shown."""

    bins: Count = BINS
    """Bins of the histogram behind the entropies."""

    resamples: Annotated[int, BeforeValidator(_whole), Field(ge=0)] = 1000
    """How many times the questions are drawn for an interval; 0 leaves all statistics out."""

    entries: Literal["dense", "real"] = "dense"
    """What tables show: metrics over the dense matrix (the paper's) or over real edges only.
    The JSON holds both."""


@dataclass(frozen=True, config=_STRICT)
class Published:
    """A value that was printed elsewhere, to be shown beside ours."""

    pair: str
    """The pair's name."""

    benchmark: str
    """The benchmark's name."""

    metric: str
    """A name in `probe.metrics.METRICS`, or `accuracy` (a fraction; it has no alpha)."""

    before: float
    """Of the model before."""

    after: float
    """Of the model after."""

    alpha: Positive | None = None
    """Scored length as a share of the reference length; None for `accuracy`."""


@dataclass(frozen=True, config=_STRICT)
class Recipe:
    """A whole experiment."""

    name: Name
    """Its name, and that of its run folder."""

    pairs: Annotated[tuple[Pair, ...], Field(min_length=1)]
    """The pairs to compare."""

    benchmarks: Annotated[tuple[BenchmarkChoice, ...], Field(min_length=1)]
    """The benchmarks to compare them on."""

    description: str = ""
    """One sentence on what it shows."""

    compute: Compute = Field(default_factory=Compute)
    """Device and precision."""

    solutions: SolutionOptions = Field(default_factory=SolutionOptions)
    """Solving."""

    selection: SelectionOptions = Field(default_factory=SelectionOptions)
    """Selecting."""

    attribution: AttributionOptions = Field(default_factory=AttributionOptions)
    """Scoring."""

    faithfulness: FaithfulnessOptions = Field(default_factory=FaithfulnessOptions)
    """Comparing with exact effects."""

    report: ReportOptions = Field(default_factory=ReportOptions)
    """Reporting."""

    published: tuple[Published, ...] = ()
    """What was printed elsewhere for the same cells; only what is known, never a guess."""

    def models(self) -> tuple[str, ...]:
        """Every model once, in the order of the pairs."""
        return tuple(dict.fromkeys(m for pair in self.pairs for m in (pair.before, pair.after)))


def recipe_files() -> dict[str, Path]:
    """The recipes that ship with the package, by name."""
    here = Path(__file__).parent
    # In a wheel they lie inside the package; in a checkout, beside it.
    folder = here / "recipes" if (here / "recipes").is_dir() else here.parent / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def read_recipe(
    recipe: str | Path, overrides: Mapping[str, str | int | float] | None = None
) -> Recipe:
    """Read a recipe by its name or path, with overrides.

    Args:
        recipe: A name from `recipe_files`, or the path of a TOML file.
        overrides: Values by dotted key, `pairs.0.before`; texts are read as TOML where they are
            TOML, and as plain text otherwise.

    Raises:
        ProbeError: No such recipe, not TOML, an unknown key or a bad value; the message names the
            file, the key, what was expected and the nearest known key.
    """
    path, table = _read_table(recipe)
    for key, value in (overrides or {}).items():
        _override(table, key, _read_value(value) if isinstance(value, str) else value, path)
    return recipe_from(table, str(path))


def recipe_from(table: object, where: str) -> Recipe:
    """Make a recipe from plain data, such as a parsed file or a run folder's record.

    Raises:
        ProbeError: An unknown key, a bad value, or two pairs or benchmarks of one name.
    """
    try:
        recipe = TypeAdapter(Recipe).validate_python(table)
    except ValidationError as error:
        raise ProbeError(f"{where}: {_complaint(error)}") from error
    for kind, items in (("pairs", recipe.pairs), ("benchmarks", recipe.benchmarks)):
        names = [item.name for item in items]
        for name in names:
            if names.count(name) > 1:
                raise ProbeError(f"{where}: {kind}: the name {name!r} stands twice; rename one")
    return recipe


def recipe_table(recipe: Recipe) -> dict[str, object]:
    """A recipe as plain data; `recipe_from` takes it back."""
    return cast(dict[str, object], TypeAdapter(Recipe).dump_python(recipe, mode="json"))


def _read_table(recipe: str | Path) -> tuple[Path, dict[str, object]]:
    known = recipe_files()
    path = known.get(str(recipe), Path(recipe))
    if path.suffix != ".toml":
        close = difflib.get_close_matches(str(recipe), known, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(close)}?" if close else f"there are: {', '.join(known)}"
        raise ProbeError(f"no recipe {str(recipe)!r}; {hint} (a file must end in .toml)")
    try:
        return path, tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ProbeError(f"cannot read the recipe {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ProbeError(f"{path}: not TOML: {error}") from error


def _read_value(text: str) -> object:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _override(table: dict[str, object], key: str, value: object, path: Path) -> None:
    *parents, last = key.split(".")
    place: object = table
    for number, part in enumerate(parents):
        if isinstance(place, list):
            place = _item(place, part, key, path)
        elif isinstance(place, dict):
            place = place.setdefault(part, {})
        else:
            raise ProbeError(f"{path}: --set {key}: {'.'.join(parents[:number])} has no keys")
    if isinstance(place, list):
        _item(place, last, key, path)
        place[int(last)] = value
    elif isinstance(place, dict):
        place[last] = value
    else:
        raise ProbeError(f"{path}: --set {key}: {'.'.join(parents)} has no keys")


def _item(items: list[object], index: str, key: str, path: Path) -> object:
    if not index.isdecimal() or int(index) >= len(items):
        raise ProbeError(
            f"{path}: --set {key}: {index!r} is not one of its {len(items)} entries, from 0 on"
        )
    return items[int(index)]


def _complaint(error: ValidationError) -> str:
    """One line for the first thing that is wrong; an unknown key first, as it may cause others."""
    problems = error.errors(include_url=False)
    first = min(
        problems, key=lambda p: p["type"] not in ("unexpected_keyword_argument", "extra_forbidden")
    )
    # pydantic adds the alternatives of a union to the path; a reader knows only the file's keys.
    path = [part for part in first["loc"] if isinstance(part, int) or str(part).isidentifier()]
    path = [part for part in path if part not in ("int", "str", "float", "literal")]
    key = ".".join(str(part) for part in path)
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = _known_keys(path[:-1])
        close = difflib.get_close_matches(str(path[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
        return f"unknown key {key!r}; {hint}"
    if first["type"] in ("missing", "missing_argument"):
        return f"the key {key!r} is missing"
    if key.endswith(".prompt") and first["type"] == "string_pattern_mismatch":
        return f"{key}: a prompt needs {{question}} in it"
    expected = "; or ".join(
        dict.fromkeys(
            p["msg"].removeprefix("Value error, ")
            for p in problems
            if p["loc"][: len(path)] == first["loc"][: len(path)]
        )
    )
    return f"{key} is {first['input']!r}: {expected[0].lower()}{expected[1:]}"


def _known_keys(path: list[int | str]) -> list[str]:
    kind: type = Recipe
    for part in path:
        if isinstance(part, str):
            kind = {
                "pairs": Pair,
                "benchmarks": BenchmarkChoice,
                "published": Published,
            }.get(part) or get_type_hints(kind)[part]
    return [field.name for field in fields(kind)]
