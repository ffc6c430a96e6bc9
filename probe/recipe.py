"""Recipes: what is compared, on what, and how, as data.

A recipe is a TOML file; its sections are the dataclasses below, which are also its documentation.
Recipes that ship with the package have names; `read_recipe` takes such a name or the path of a
file, and overrides like `{"selection.samples": "50", "pairs.0.before": "my-folder"}`. A recipe
may include others: then it has their pairs, benchmarks and published values too.

    >>> read_recipe("tiny-math").pairs[0].method
    'GRPO'
"""

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, cast, get_type_hints

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
)
from pydantic.dataclasses import dataclass

from probe.errors import ProbeError
from probe.generation import Engine
from probe.grading import Grading
from probe.graph import Ablation, Granularity
from probe.kernels import Kernels
from probe.metrics import BINS
from probe.models import DType
from probe.remote import JOBS, TIMEOUT
from probe.selection import Convention
from probe.shipped import recipe_files as recipe_files

_STRICT = ConfigDict(extra="forbid")


def _whole(value: object) -> object:
    """Let no true, "3" or 3.0 pass for a whole number."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError("a whole number was expected")
    return value


CHAT = "chat"
"""The prompt that stands for the tokenizer's chat template."""


def _prompt(value: str) -> str:
    if value != CHAT and "{question}" not in value:
        raise ValueError("a prompt needs {question} in it, or is just 'chat'")
    return value


Count = Annotated[int, BeforeValidator(_whole), Field(ge=1)]
Seed = Annotated[int, BeforeValidator(_whole), Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]


class Asked(NamedTuple):
    """A model as a pair asks it: all that its solutions depend on."""

    model: str
    """Its reference."""

    prompt: str
    """The literal prompt."""

    max_new_tokens: int
    """Longest answer, in tokens."""

    stop: tuple[str, ...]
    """Texts that end an answer."""

    given: str | None
    """A file with solutions that it has written already."""


@dataclass(frozen=True, config=_STRICT)
class SolutionFiles:
    """Solutions that were generated elsewhere; see `probe.imported` for what is understood."""

    before: str | None = None
    """A file or folder with those of the model before; None to generate them here."""

    after: str | None = None
    """Likewise of the model after."""


@dataclass(frozen=True, config=_STRICT)
class Shape:
    """How large the two models of a pair are, so that a plan needs neither of them."""

    parameters: Count
    """How many numbers one model has."""

    n_layers: Count
    """Decoder layers."""

    d_model: Count
    """Width of the residual stream."""

    d_ffn: Count
    """Width inside an FFN."""


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

    prompt: Annotated[str, AfterValidator(_prompt)] = "{question}"
    """The literal prompt; `{question}` in it stands for the question. `chat`: the tokenizer's chat
    template, around the question and a request to box the answer; `chat: TEXT` around this text."""

    max_new_tokens: Count = 1024
    """Longest answer, in tokens."""

    shape: Shape | None = None
    """How large its models are; only a plan reads it, and only where they are not here."""

    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Texts that end an answer, as an end-of-sequence token does; see `probe.generation`."""

    solutions: SolutionFiles = Field(default_factory=SolutionFiles)
    """Files with solutions that were generated elsewhere."""

    def asked(self) -> tuple[Asked, Asked]:
        """How it asks its two models."""
        how = (self.prompt, self.max_new_tokens, self.stop)
        return (
            Asked(self.before, *how, self.solutions.before),
            Asked(self.after, *how, self.solutions.after),
        )


@dataclass(frozen=True, config=_STRICT)
class BenchmarkChoice:
    """A benchmark to solve."""

    name: Name
    """A name in `probe.problems.BENCHMARKS`; any name for a file of one's own."""

    path: str | None = None
    """A local file or folder with its problems, instead of the benchmark's own source."""

    grading: Grading | None = None
    """`math` or `exact`: how answers are compared, as mathematics where not given. A file of one's
    own must say it."""


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

    remote: str = ""
    """`ndif` or `http://host:port`: the NDIF server that runs the models; nothing to run them
    here. See `probe.remote`."""

    jobs: Count = JOBS
    """How many batches may be under way on that server at once."""

    timeout: Count = TIMEOUT
    """Seconds without a sign of life from that server after which a batch is sent once more, and
    for which other faults are tried again."""

    @property
    def device_here(self) -> str:
        """The device, or the CPU where the models run on a server."""
        return "cpu" if self.remote else self.device


@dataclass(frozen=True, config=_STRICT)
class SolutionOptions:
    """How the problems are solved."""

    questions: Count | Literal["all"] = "all"
    """How many questions of each benchmark; a random part if fewer than all."""

    seed: Seed = 42
    """Seed of that part."""

    engine: Engine = "auto"
    """`continuous` or `static` batches; `auto` is continuous on a GPU; see `probe.generation`."""

    batch_size: Count = 32
    """How many questions run at once in a static batch."""


@dataclass(frozen=True, config=_STRICT)
class SelectionOptions:
    """Which questions are compared; the constants are those of the published runs."""

    alpha: tuple[Positive, ...] = (0.03, 0.1, 0.3, 0.5)
    """Scored lengths, as shares of the reference length; none of them: only accuracy is wanted."""

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

    control: Literal["none", "cross-text"] = "none"
    """`cross-text` also scores each model on the other's answers, at twice the cost; see
    `probe.control`."""


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

    extra: tuple[str, ...] = ("overlap", "concentration")
    """Further tables: names in `probe.extras.EXTRAS`, which says what costs another pass."""

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
class PublishedChange:
    """A relative change that was printed elsewhere, without the values or over several cells."""

    metric: str
    """A name in `probe.metrics.METRICS`."""

    change: float
    """(after - before) / |before|, a fraction."""

    pair: str | None = None
    """The pair's name; None: over all pairs."""

    alpha: Positive | None = None
    """Scored length as a share of the reference length; None: over all of them."""

    experiments: Count | None = None
    """Over how many cells it is an average."""

    rate: float | None = None
    """The share of these cells in which the metric rose."""


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

    published_changes: tuple[PublishedChange, ...] = ()
    """Likewise, where only the change was printed."""

    include: tuple[str, ...] = ()
    """Other recipes, by name or by path from this file, whose pairs, benchmarks and published
    values come first. `read_recipe` puts them in place: a recipe that was read includes nothing."""

    def models(self) -> tuple[str, ...]:
        """Every model once, in the order of the pairs."""
        return tuple(dict.fromkeys(m for pair in self.pairs for m in (pair.before, pair.after)))


INCLUDED = ("pairs", "benchmarks", "published", "published_changes")
"""What an including recipe has of the included ones; all other keys are its own."""


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
    return recipe_from(_included(table, path), str(path), overrides)


def recipe_from(
    table: object,
    where: str,
    overrides: Mapping[str, str | int | float] | None = None,
) -> Recipe:
    """Make a recipe from plain data, such as a parsed file or a run folder's record.

    Args:
        table: The data, a dictionary; overrides change it.
        where: What complaints name.
        overrides: Values by dotted key, as in `read_recipe`.

    Raises:
        ProbeError: An unknown key, a bad value, or two pairs or benchmarks of one name.
    """
    for key, value in (overrides or {}).items():
        read = _read_value(value) if isinstance(value, str) else value
        _override(cast(dict[str, object], table), key, read, where)
    try:
        recipe = TypeAdapter(Recipe).validate_python(table)
    except ValidationError as error:
        raise ProbeError(f"{where}: {_complaint(error)}") from error
    if recipe.include:
        raise ProbeError(f"{where}: include works in a recipe's file only")
    for kind, items in (("pairs", recipe.pairs), ("benchmarks", recipe.benchmarks)):
        names = [item.name for item in items]
        for name in names:
            if names.count(name) > 1:
                raise ProbeError(f"{where}: {kind}: the name {name!r} stands twice; rename one")
    return recipe


def recipe_table(recipe: Recipe) -> dict[str, object]:
    """A recipe as plain data; `recipe_from` takes it back."""
    return cast(dict[str, object], TypeAdapter(Recipe).dump_python(recipe, mode="json"))


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Write a recipe as a TOML file that `read_recipe` reads; keys at their defaults are left out.

    Raises:
        ProbeError: The file cannot be written.
    """
    import tomli_w

    table = TypeAdapter(Recipe).dump_python(recipe, mode="json", exclude_defaults=True)
    try:
        path.write_text(tomli_w.dumps(table), encoding="utf-8")
    except OSError as error:
        raise ProbeError(f"cannot write the recipe {path}: {error.strerror}") from error


def place_benchmarks(recipe: Recipe, places: Sequence[str]) -> Recipe:
    """Let benchmarks of a recipe come from local files or folders.

    Args:
        recipe: The recipe.
        places: `NAME=PATH` of each, or just `PATH` where the recipe has one benchmark.

    Raises:
        ProbeError: The recipe has no such benchmark, or it is not clear which one is meant.
    """
    names = [choice.name for choice in recipe.benchmarks]
    paths: dict[str, str] = {}
    for place in places:
        name, equals, path = place.partition("=")
        if name not in names:
            if equals and "/" not in name:
                raise ProbeError(
                    f"--benchmark-path {place}: the recipe has no benchmark {name!r}; "
                    f"it has: {', '.join(names)}"
                )
            if len(names) > 1:
                raise ProbeError(
                    f"--benchmark-path {place}: for which of {', '.join(names)}? Write NAME=PATH"
                )
            name, path = names[0], place
        paths[name] = path
    choices = tuple(
        replace(choice, path=paths.get(choice.name, choice.path)) for choice in recipe.benchmarks
    )
    return replace(recipe, benchmarks=choices)


def _included(
    table: dict[str, object], path: Path, outer: tuple[Path, ...] = ()
) -> dict[str, object]:
    """The table of a file, with the lists of the recipes that it includes before its own."""
    names = table.pop("include", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ProbeError(f"{path}: include is {names!r}: a list of recipes was expected")
    if path.resolve() in outer:
        raise ProbeError(f"{path}: this recipe includes itself")
    lists: dict[str, list[object]] = {}
    for name in names:
        inside = name if name in recipe_files() else path.parent / name
        place, other = _read_table(inside)
        other = _included(other, place, (*outer, path.resolve()))
        for key in INCLUDED:
            for entry in _entries(other, key):
                if entry not in lists.setdefault(key, []):
                    lists[key].append(entry)
    for key, entries in lists.items():
        table[key] = entries + [entry for entry in _entries(table, key) if entry not in entries]
    return table


def _entries(table: dict[str, object], key: str) -> list[object]:
    entries = table.get(key, [])
    return entries if isinstance(entries, list) else [entries]


def _read_table(recipe: str | Path) -> tuple[Path, dict[str, object]]:
    known = recipe_files()
    path = known.get(str(recipe), Path(recipe))
    if path.suffix != ".toml":
        close = difflib.get_close_matches(str(recipe), known, n=3, cutoff=0.6)
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


def _override(table: dict[str, object], key: str, value: object, path: str) -> None:
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


def _item(items: list[object], index: str, key: str, path: str) -> object:
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
                "published_changes": PublishedChange,
                "shape": Shape,
            }.get(part) or get_type_hints(kind)[part]
    return [field.name for field in fields(kind)]
