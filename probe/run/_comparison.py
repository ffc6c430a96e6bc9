"""Comparing two models of one's own, without writing a recipe first.

`compare` makes the recipe out of a few arguments and runs it, so that everything a recipe can do
is at hand, and `save_recipe` writes down what it was.

    >>> report = compare("probe:tiny-math/sft", "probe:tiny-math/grpo")
    >>> report.recipe.name
    'sft-vs-grpo'
"""

import itertools
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.console import Console

from probe.checkpoints import PACKAGE_PREFIX, find_checkpoint
from probe.errors import ProbeError
from probe.escaping import PlainConsole
from probe.files import at_home
from probe.models import read_tokenizer
from probe.problems import BENCHMARKS, FORMATS
from probe.recipe import CHAT, Recipe, place_benchmarks, recipe_from, write_recipe
from probe.report import Report
from probe.run._run import run_recipe
from probe.store import RunFolder
from probe.vocabulary import Grading


def compare(
    before: str,
    after: str,
    benchmarks: str | Sequence[str] = (),
    *,
    alpha: float | Sequence[float] = (),
    prompt: str | None = None,
    grading: Grading | None = None,
    benchmark_paths: str | Sequence[str] = (),
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
        benchmarks: One or several names in `probe.problems.BENCHMARKS`, or files or folders with
            questions of one's own; `gsm8k` if not given, and for models that ship what they were
            trained for.
        alpha: One or several scored lengths, as shares of the reference length; the paper's four
            if none.
        prompt: `chat`, or a literal prompt with `{question}` in it. If not given, `chat`, and just
            the question where a tokenizer has no chat template.
        grading: How answers to all benchmarks are compared: `math` or `exact`; a file of one's own
            needs it.
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
    told = console or PlainConsole(stderr=True)
    recipe = compare_recipe(
        before,
        after,
        benchmarks,
        alpha=alpha,
        prompt=prompt,
        grading=grading,
        benchmark_paths=benchmark_paths,
        overrides=overrides,
        download=True,
        say=lambda line: told.print(line, soft_wrap=True),
    )
    if save_recipe is not None:
        write_recipe(recipe, Path(save_recipe))
    return run_recipe(recipe, output or default_folder(recipe), fresh=fresh, console=console)


def compare_recipe(
    before: str,
    after: str,
    benchmarks: str | Sequence[str] = (),
    *,
    alpha: float | Sequence[float] = (),
    prompt: str | None = None,
    grading: Grading | None = None,
    benchmark_paths: str | Sequence[str] = (),
    overrides: Mapping[str, str | int | float] | None = None,
    download: bool = False,
    say: Callable[[str], object] = warnings.warn,
) -> Recipe:
    """The recipe that `compare` runs; its arguments are the same.

    With `download`, tokenizers that are not here are fetched to see whether they have a chat
    template; otherwise they are taken to have one. `say` is told in one line where there is none.

    Raises:
        ProbeError: A bad value.
    """
    # One of anything is as good as a list of one; a text would be taken for its letters.
    benchmarks, benchmark_paths = (
        (given,) if isinstance(given, str) else given for given in (benchmarks, benchmark_paths)
    )
    alphas = [alpha] if isinstance(alpha, float | int) else list(alpha)
    name = "-vs-".join(map(_short, (before, after)))
    if prompt is None:
        plain = next(
            (model for model in (before, after) if not _has_template(model, download)), None
        )
        prompt = CHAT if plain is None else "{question}"
        if plain:
            say(
                f"{plain}: the tokenizer has no chat template, so the prompt is the question as it "
                "stands; another one is --prompt TEXT, with {question} in it"
            )
    if not benchmarks:
        ships = all(model.startswith(PACKAGE_PREFIX) for model in (before, after))
        benchmarks = ("tiny-math",) if ships else ("gsm8k",)
    pair = {"name": name, "before": before, "after": after, "prompt": prompt}
    table: dict[str, object] = {
        "name": name,
        "description": f"{before} compared with {after}",
        "pairs": [pair],
        "benchmarks": _choices(benchmarks, grading),
        "selection": {"alpha": alphas} if alphas else {},
    }
    recipe = recipe_from(table, f"{before} and {after}", overrides)
    return place_benchmarks(recipe, benchmark_paths)


def _choices(benchmarks: Sequence[str], grading: Grading | None) -> list[dict[str, object]]:
    """Benchmarks as a recipe has them; one that is not known and is a path goes by its stem."""
    choices: list[dict[str, object]] = []
    for benchmark in benchmarks:
        choice: dict[str, object] = {"name": benchmark}
        is_path = "/" in benchmark or Path(benchmark).suffix in FORMATS
        if benchmark not in BENCHMARKS and (is_path or at_home(benchmark).exists()):
            stem = name = _short(Path(benchmark.rstrip("/")).stem)
            number = 2
            while name in [other["name"] for other in choices]:
                name, number = f"{stem}-{number}", number + 1
            choice = {"name": name, "path": benchmark}
        choices.append(choice | ({"grading": grading} if grading else {}))
    return choices


def _has_template(reference: str, download: bool) -> bool:
    """Whether a tokenizer has a chat template; one that cannot be read is taken to."""
    try:
        if not download and find_checkpoint(reference) is None:
            return True
        return bool(read_tokenizer(reference).chat_template)
    except ProbeError:  # the check of the recipe says what is wrong with this model
        return True


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
