"""Comparing two models of one's own, without writing a recipe first.

`compare` makes the recipe out of a few arguments and runs it, so that everything a recipe can do
is at hand, and `save_recipe` writes down what it was.

    >>> report = compare("probe:tiny-math/sft", "probe:tiny-math/grpo", ["tiny-math"],
    ...                  prompt="{question}")
    >>> report.recipe.name
    'sft-vs-grpo'
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from probe.checkpoints import PACKAGE_PREFIX
from probe.recipe import CHAT, Recipe, place_benchmarks, recipe_from, write_recipe
from probe.report import Report
from probe.run import run_recipe
from probe.run_folder import RunFolder


def compare(
    before: str,
    after: str,
    benchmarks: Sequence[str] = ("gsm8k",),
    *,
    alpha: Sequence[float] = (),
    prompt: str = CHAT,
    benchmark_paths: Sequence[str] = (),
    overrides: Mapping[str, str | int | float] | None = None,
    output: str | Path | None = None,
    save_recipe: str | Path | None = None,
    fresh: bool = False,
    console: Console | None = None,
) -> Report:
    """Compare the circuits of two models, or go on with it.

    Args:
        before: The model before: a folder, a hub id or a `probe:` name.
        after: The model after, likewise; a PEFT adapter stands for its base with it.
        benchmarks: Names in `probe.problems.BENCHMARKS`.
        alpha: Scored lengths, as shares of the reference length; the paper's four if none.
        prompt: `chat`, or a literal prompt with `{question}` in it.
        benchmark_paths: Local files or folders, `NAME=PATH`; just `PATH` for a single benchmark.
        overrides: Any key of a recipe, as in `{"solutions.questions": 200}`.
        output: The run folder; `runs/BEFORE-vs-AFTER` if not given, with a number where that holds
            a run of other models of these names.
        save_recipe: A TOML file to write the recipe to, before it runs.
        fresh: Start over where the folder holds an earlier run.
        console: Where progress goes; standard error if not given.

    Raises:
        ProbeError: Anything that the user can mend.
    """
    recipe = compare_recipe(
        before,
        after,
        benchmarks,
        alpha=alpha,
        prompt=prompt,
        benchmark_paths=benchmark_paths,
        overrides=overrides,
    )
    if save_recipe is not None:
        write_recipe(recipe, Path(save_recipe))
    return run_recipe(recipe, output or default_folder(recipe), fresh=fresh, console=console)


def compare_recipe(
    before: str,
    after: str,
    benchmarks: Sequence[str] = ("gsm8k",),
    *,
    alpha: Sequence[float] = (),
    prompt: str = CHAT,
    benchmark_paths: Sequence[str] = (),
    overrides: Mapping[str, str | int | float] | None = None,
) -> Recipe:
    """The recipe that `compare` runs; its arguments are the same.

    Raises:
        ProbeError: A bad value.
    """
    name = "-vs-".join(map(_short, (before, after)))
    pair = {"name": name, "before": before, "after": after, "prompt": prompt}
    table: dict[str, object] = {
        "name": name,
        "description": f"{before} compared with {after}",
        "pairs": [pair],
        "benchmarks": [{"name": benchmark} for benchmark in benchmarks],
        "selection": {"alpha": list(alpha)} if alpha else {},
    }
    recipe = recipe_from(table, f"{before} and {after}", overrides)
    return place_benchmarks(recipe, benchmark_paths)


def default_folder(recipe: Recipe) -> Path:
    """Where a comparison goes: the first of NAME, NAME-2, ... that holds no run of other models."""
    for number in itertools.count(1):
        path = Path("runs") / (recipe.name if number == 1 else f"{recipe.name}-{number}")
        folder = RunFolder(path)
        if not folder.record.exists():
            break
        there = recipe_from(folder.read_record().get("recipe"), str(folder.record))
        if there.models() == recipe.models():
            break
    return path


def _short(reference: str) -> str:
    """The last part of a reference, in characters that a file name may have."""
    last = reference.removeprefix(PACKAGE_PREFIX).rstrip("/").rpartition("/")[2]
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", last).strip("-._") or "model"
