"""Recipes: what is compared, on what, and how, as data.

A recipe is a TOML file; its sections are the dataclasses here and in `_sections`, which are
also its documentation. Recipes that ship with the package have names; `read_recipe` takes such a
name or the path of a file, and overrides like `{"selection.samples": "50", "pairs.0.before":
"my-folder"}`. A recipe may include others: then it has their pairs, benchmarks and published values
too.

    >>> read_recipe("tiny-math").pairs[0].method
    'GRPO'
"""

import difflib
import itertools
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Literal, cast, get_type_hints
from urllib.parse import urlsplit

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from probe.errors import ProbeError, likely_meant, reason
from probe.files import write_where_asked
from probe.recipe._overrides import override
from probe.recipe._sections import CHAT as CHAT
from probe.recipe._sections import STRICT, Count, Name, Positive
from probe.recipe._sections import Asked as Asked
from probe.recipe._sections import AttributionOptions as AttributionOptions
from probe.recipe._sections import BenchmarkChoice as BenchmarkChoice
from probe.recipe._sections import Comparison as Comparison
from probe.recipe._sections import Compute as Compute
from probe.recipe._sections import FaithfulnessOptions as FaithfulnessOptions
from probe.recipe._sections import Pair as Pair
from probe.recipe._sections import ReportOptions as ReportOptions
from probe.recipe._sections import SelectionOptions as SelectionOptions
from probe.recipe._sections import Shape as Shape
from probe.recipe._sections import SolutionFiles as SolutionFiles
from probe.recipe._sections import SolutionOptions as SolutionOptions
from probe.recipe._sections import Trajectory as Trajectory
from probe.recipe._sections import is_address as is_address
from probe.recipe._shipped import recipe_files as recipe_files
from probe.recipe._trajectories import pairs_of
from probe.vocabulary import HOSTED, KEY_VARIABLE


@dataclass(frozen=True, config=STRICT)
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


@dataclass(frozen=True, config=STRICT)
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


@dataclass(frozen=True, config=STRICT)
class Recipe:
    """A whole experiment."""

    name: Name
    """Its name, and that of its run folder."""

    pairs: tuple[Pair, ...]
    """The pairs to compare; at least one, where there are no trajectories."""

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

    trajectories: tuple[Trajectory, ...] = ()
    """Trainings, each checkpoint of which is one more pair. Reading puts these in place: a recipe
    that was read has pairs only."""

    include: tuple[str, ...] = ()
    """Other recipes, by name or by path from this file, whose pairs, benchmarks and published
    values come first. `read_recipe` puts them in place: a recipe that was read includes nothing."""

    def models(self) -> tuple[str, ...]:
        """Every model once, in the order of the pairs."""
        return tuple(dict.fromkeys(m for pair in self.pairs for m in (pair.before, pair.after)))

    def comparisons(self, by: Literal["pair", "benchmark"] = "pair") -> tuple[Comparison, ...]:
        """Every pair on every benchmark at every alpha.

        Args:
            by: What changes slowest; alpha changes fastest.
        """
        names, alphas = [choice.name for choice in self.benchmarks], self.selection.alpha
        if by == "pair":
            return tuple(Comparison(*c) for c in itertools.product(self.pairs, names, alphas))
        return tuple(
            Comparison(p, b, a) for b, p, a in itertools.product(names, self.pairs, alphas)
        )


INCLUDED = ("pairs", "trajectories", "benchmarks", "published", "published_changes")
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
            file, the key, what was expected and the nearest known key. Or the file names a server
            or a cluster that the overrides do not.
    """
    path, table = _read_table(recipe)
    found = recipe_from(_included(table, path), str(path), overrides)
    if "compute.remote" not in (overrides or {}):
        check_named_server(found, str(path))
    _check_answering(found, str(path), overrides or {})
    _check_cluster(found, str(path), overrides or {})
    return found


def _check_answering(
    recipe: Recipe, where: str, overrides: Mapping[str, str | int | float]
) -> None:
    """Refuse a server of solutions that only a file names, as `check_named_server` does.

    Raises:
        ProbeError: It names a host that the overrides do not.
    """
    asked_for = [str(value) for key, value in overrides.items() if "solutions." in key]
    trusted = {urlsplit(value).netloc for value in asked_for if is_address(value)}
    for number, pair in enumerate(recipe.pairs):
        for side, asked in zip(("before", "after"), pair.asked(), strict=True):
            if asked.server and urlsplit(asked.server).netloc not in trusted:
                raise ProbeError(
                    f"{where}: pair {pair.name!r} would send the questions to {asked.server!r}; if "
                    f"you trust that server, ask for it: --answers {asked.server}, or --set "
                    f"pairs.{number}.solutions.{side}={asked.server}"
                )


def _check_cluster(recipe: Recipe, where: str, overrides: Mapping[str, str | int | float]) -> None:
    """Refuse a cluster that only a file names: it runs code here, and reads files.

    Raises:
        ProbeError: It names a host that the overrides do not.
    """
    cluster = recipe.compute.cluster
    if ":" in cluster and "compute.cluster" not in overrides:
        raise ProbeError(
            f"{where}: compute.cluster would let {cluster!r} run this and read its files; if you "
            f"trust that cluster, ask for it: --cluster {cluster}"
        )


def check_named_server(recipe: Recipe, where: str) -> None:
    """Refuse a server that only a file names: work and key go to whom the user trusts.

    Args:
        recipe: A recipe from a file, without a server that was asked for beside it.
        where: The file.

    Raises:
        ProbeError: It names a server other than the hosted one.
    """
    server = recipe.compute.remote
    if server and server != HOSTED:
        raise ProbeError(
            f"{where}: compute.remote would send the questions, and the key in {KEY_VARIABLE}, to "
            f"{server!r}; if you trust that server, ask for it: --remote {server}"
        )


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
        override(cast(dict[str, object], table), key, value, where)
    if isinstance(table, dict) and "trajectories" in table:
        table = {"pairs": []} | table
    try:
        recipe = TypeAdapter(Recipe).validate_python(table)
    except ValidationError as error:
        raise ProbeError(f"{where}: {_complaint(error)}") from error
    if recipe.include:
        raise ProbeError(f"{where}: include works in a recipe's file only")
    recipe = _with_checkpoints(recipe, where)
    for kind, items in (("pairs", recipe.pairs), ("benchmarks", recipe.benchmarks)):
        names = [item.name for item in items]
        for name in names:
            if names.count(name) > 1:
                raise ProbeError(f"{where}: {kind}: the name {name!r} stands twice; rename one")
    _check_files(recipe, where)
    return _with_server(recipe, where)


def _with_server(recipe: Recipe, where: str) -> Recipe:
    """The recipe with the server of all solutions wherever a pair says nothing else."""
    server = recipe.solutions.server
    if not server:
        return recipe
    if not is_address(server):
        raise ProbeError(
            f"{where}: solutions.server is {server!r}; give an address, http://host:8000/v1"
        )
    pairs = tuple(
        replace(
            pair,
            solutions=SolutionFiles(
                pair.solutions.before or server, pair.solutions.after or server
            ),
        )
        for pair in recipe.pairs
    )
    return replace(recipe, pairs=pairs)


def _with_checkpoints(recipe: Recipe, where: str) -> Recipe:
    """Put the pairs of the trajectories behind a recipe's own."""
    try:
        more = tuple(pair for each in recipe.trajectories for pair in pairs_of(each))
    except ProbeError as error:
        raise ProbeError(f"{where}: {error}") from error
    if not recipe.pairs and not more:
        raise ProbeError(f"{where}: pairs is []: at least one pair or trajectory was expected")
    return replace(recipe, pairs=recipe.pairs + more, trajectories=())


def _check_files(recipe: Recipe, where: str) -> None:
    """Refuse a recipe of which two comparisons would have the same files."""
    whose: dict[str, str] = {}
    for pair, choice in itertools.product(recipe.pairs, recipe.benchmarks):
        owner = f"pair {pair.name!r} on benchmark {choice.name!r}"
        name = f"{pair.name}.{choice.name}"
        if name in whose:
            raise ProbeError(
                f"{where}: {whose[name]} and {owner} would share the files {name}; rename one"
            )
        whose[name] = owner
    printed: dict[str, float] = {}
    for alpha in recipe.selection.alpha:
        text = f"{alpha:g}"
        if text in printed:
            raise ProbeError(
                f"{where}: selection.alpha: {printed[text]} and {alpha} would share the files "
                f"alpha-{text}; keep one"
            )
        printed[text] = alpha


def recipe_table(recipe: Recipe) -> dict[str, object]:
    """A recipe as plain data; `recipe_from` takes it back."""
    return cast(dict[str, object], TypeAdapter(Recipe).dump_python(recipe, mode="json"))


def recipe_text(recipe: Recipe) -> str:
    """A recipe as TOML, as `read_recipe` reads it; keys at their defaults are left out."""
    import tomli_w

    return tomli_w.dumps(
        TypeAdapter(Recipe).dump_python(recipe, mode="json", exclude_defaults=True)
    )


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Write a recipe as a TOML file.

    Raises:
        ProbeError: The file cannot be written.
    """
    try:
        write_where_asked(path, recipe_text(recipe))
    except OSError as error:
        raise ProbeError(f"cannot write the recipe {path}: {error.strerror}") from error


def place_benchmarks(recipe: Recipe, files: Sequence[str]) -> Recipe:
    """Let benchmarks of a recipe come from local files or folders.

    Args:
        recipe: The recipe.
        files: `NAME=PATH` of each, or just `PATH` where the recipe has one benchmark.

    Raises:
        ProbeError: The recipe has no such benchmark, or it is not clear which one is meant.
    """
    names = [choice.name for choice in recipe.benchmarks]
    paths: dict[str, str] = {}
    for given in files:
        name, equals, path = given.partition("=")
        if name not in names:
            if equals and "/" not in name:
                raise ProbeError(
                    f"--benchmark-path {given}: the recipe has no benchmark {name!r}; "
                    f"it has: {', '.join(names)}"
                )
            if len(names) > 1:
                raise ProbeError(
                    f"--benchmark-path {given}: for which of {', '.join(names)}? Write NAME=PATH"
                )
            name, path = names[0], given
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
        found, other = _read_table(inside)
        other = _included(other, found, (*outer, path.resolve()))
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
    except (ValueError, RecursionError) as error:  # no TOML, or what Python cannot hold
        raise ProbeError(f"{path}: not TOML that can be read: {reason(error)}") from error


def _complaint(error: ValidationError) -> str:
    """One line for the first thing that is wrong; an unknown key first, as it may cause others."""
    problems = error.errors(include_url=False)
    first = min(
        problems, key=lambda p: p["type"] not in ("unexpected_keyword_argument", "extra_forbidden")
    )
    # pydantic adds the alternatives of a union to the path; a reader knows only the file's keys.
    # An unknown key is the last part, and may have any name.
    whole = first["loc"]
    unknown = first["type"] in ("unexpected_keyword_argument", "extra_forbidden")
    above, last = (whole[:-1], whole[-1:]) if unknown else (whole, ())
    path = [part for part in above if isinstance(part, int) or str(part).isidentifier()]
    path = [part for part in path if part not in ("int", "str", "float", "literal")]
    path += last
    key = ".".join(str(p) if str(p).isalnum() or str(p).isidentifier() else _shown(p) for p in path)
    if unknown:
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
    names = re.findall("'([^']*)'", expected) if first["type"] == "literal_error" else ()
    hint = likely_meant(first["input"], names)
    return f"{key} is {_shown(first['input'])}: {expected[0].lower()}{expected[1:]}{hint}"


def _shown(value: object) -> str:
    """A value as a message shows it: on one line, and not longer than that."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:100]}...{text[-20:]}"


def _known_keys(path: list[int | str]) -> list[str]:
    kind: type = Recipe
    for part in path:
        if isinstance(part, str):
            kind = {
                "pairs": Pair,
                "trajectories": Trajectory,
                "benchmarks": BenchmarkChoice,
                "published": Published,
                "published_changes": PublishedChange,
                "shape": Shape,
            }.get(part) or get_type_hints(kind)[part]
    return [field.name for field in fields(kind)]
