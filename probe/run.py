"""A run: the phases of a recipe, one after the other, into a run folder.

problems -> solutions -> selection -> attribution (-> faithfulness) -> metrics and report.
Everything that can be wrong with a recipe is checked before the folder is touched; every phase
finds in the folder what is done already and goes on from there, and ends in the same files.

    >>> report = probe.run_recipe("tiny-math", output="runs/tiny-math")
    >>> report.cells[0].metric
    'activation_intensity'
"""

import gc
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from probe.attribution import METHODS, EdgeScores, Sequence, attribute
from probe.checkpoints import fetch_checkpoint, fingerprint, weight_files
from probe.errors import ProbeError
from probe.kernels import Kernels
from probe.models import (
    Model,
    check_pair,
    cpu_threads,
    load_model,
    read_tokenizer,
    resolve_devices,
)
from probe.plan import check_reach
from probe.problems import Problem, load_problems
from probe.recipe import Recipe, read_recipe
from probe.record import now, open_record, timed
from probe.report import Report, build_report
from probe.run_folder import Damaged, RunFolder, cell_name, edges_key, model_names
from probe.selection import Selection, Solution, select
from probe.solutions import chat_message, no_template, solve


class Side(NamedTuple):
    """One model of one cell, to be attributed."""

    model: str
    """Its reference."""

    cell: str
    """The cell's name."""

    side: str
    """`before` or `after`."""

    sequences: list[Sequence]
    """What is scored: each prompt with its cut answer."""


def run_recipe(
    recipe: str | Path | Recipe,
    output: str | Path | None = None,
    *,
    overrides: Mapping[str, str | int | float] | None = None,
    fresh: bool = False,
    console: Console | None = None,
) -> Report:
    """Run a recipe, or go on with it.

    Args:
        recipe: A recipe's name, a TOML file, or a recipe.
        output: The run folder; `runs/NAME` if not given.
        overrides: Values by dotted key, as in `{"selection.samples": 50}`; not for a `Recipe`.
        fresh: Start over where the folder holds an earlier run.
        console: Where progress goes; standard error if not given.

    Raises:
        ProbeError: Anything that the user can mend; nothing is lost by it.
    """
    if not isinstance(recipe, Recipe):
        recipe = read_recipe(recipe, overrides)
    console = console or Console(stderr=True, highlight=False)
    problems = check_recipe(recipe)
    for reference in recipe.models():
        if not weight_files(reference):
            console.print(f"downloading {reference}")
            fetch_checkpoint(reference)
    folder = RunFolder(Path(output) if output else Path("runs") / recipe.name)
    record = open_record(folder, recipe, fresh)
    devices = resolve_devices(recipe.compute.device)

    with progress_bar(console) as progress, cpu_threads(recipe.compute.threads):
        with timed(folder, record, "solutions"):
            solutions = _solve_all(recipe, problems, folder, devices, progress)
        with timed(folder, record, "selection"):
            sides = _select_all(recipe, solutions, folder, progress)
        with timed(folder, record, "attribution"):
            record["residual_error"] = _attribute_all(recipe, sides, folder, devices, progress)
        if recipe.faithfulness.edges:
            from probe.faithfulness import measure_models  # needs this module in turn

            with timed(folder, record, "faithfulness"):
                measure_models(recipe, sides, folder, devices, progress)
        with timed(folder, record, "report"):
            task = progress.add_task("metrics", total=1)
            report = build_report(folder.path)
            folder.write_json("report.json", report.table)
            progress.update(task, advance=1)
    record["finished"] = now()
    folder.write_json("run.json", record)
    return report


def check_recipe(recipe: Recipe) -> dict[str, list[Problem]]:
    """Check all that can be checked without a model's weights, and load the problems.

    Returns:
        The problems of each benchmark, by its name.

    Raises:
        ProbeError: An unknown method or benchmark, a missing model, a pair that does not fit, a
            broken benchmark file, a device that is not here.
    """
    check_methods(recipe)
    resolve_devices(recipe.compute.device)
    check_reach(recipe)
    options = recipe.solutions
    questions = None if options.questions == "all" else options.questions
    problems = {
        benchmark.name: load_problems(
            benchmark.name,
            Path(benchmark.path).expanduser() if benchmark.path else None,
            questions,
            options.seed,
        )
        for benchmark in recipe.benchmarks
    }
    for pair in recipe.pairs:
        check_pair(pair.before, pair.after)
        for model in (pair.before, pair.after) if chat_message(pair.prompt)[0] else ():
            if not read_tokenizer(model).chat_template:
                raise ProbeError(no_template(model))
    return problems


def check_methods(recipe: Recipe) -> None:
    """Check that a recipe's methods are known.

    Raises:
        ProbeError: One is not.
    """
    for key, methods in (
        ("attribution.method", (recipe.attribution.method,)),
        ("faithfulness.methods", recipe.faithfulness.methods),
    ):
        for method in methods:
            if method not in METHODS:
                raise ProbeError(f"{key} is {method!r}; known: {', '.join(METHODS)}")


def _solve_all(
    recipe: Recipe,
    problems: Mapping[str, list[Problem]],
    folder: RunFolder,
    devices: list[torch.device],
    progress: Progress,
) -> dict[tuple[str, str], list[Solution]]:
    """Let each model solve each benchmark, once; solutions by file name of model and benchmark."""
    names = model_names(recipe)
    solutions: dict[tuple[str, str], list[Solution]] = {}
    total = len(names) * sum(len(part) for part in problems.values())
    task = progress.add_task("solutions", total=total)
    for number, ((reference, prompt, max_new_tokens), name) in enumerate(names.items()):
        model: Model | None = None
        for benchmark, asked in problems.items():
            path = folder.solutions_file(name, benchmark)
            gold = {problem.id: problem.answer for problem in asked}
            found, damaged = folder.read_solutions(path)
            sound = [s for s in found if gold.get(s.id) == s.gold]
            damaged += len(found) - len(sound)
            if damaged:
                progress.console.print(f"{path}: {damaged} damaged lines; solving these again")
                folder.write_solutions(path, sound)
            done = {solution.id: solution for solution in sound}
            progress.update(task, advance=len(done))
            if len(done) < len(asked):
                if model is None:
                    model = _load(recipe, reference, devices[number % len(devices)])
                batches = solve(
                    model,
                    asked,
                    prompt,
                    max_new_tokens=max_new_tokens,
                    batch_size=recipe.solutions.batch_size,
                    done=frozenset(done),
                )
                for batch in batches:
                    folder.append_solutions(path, batch)
                    done |= {solution.id: solution for solution in batch}
                    progress.update(task, advance=len(batch))
                folder.write_solutions(path, [done[problem.id] for problem in asked])
            solutions[name, benchmark] = [done[problem.id] for problem in asked]
        del model
        gc.collect()
    return solutions


def _select_all(
    recipe: Recipe,
    solutions: Mapping[tuple[str, str], list[Solution]],
    folder: RunFolder,
    progress: Progress,
) -> list[Side]:
    """Select the questions of each cell, and cut the answers.

    A cell without any question is left out; where all are, that is an error.
    """
    names = model_names(recipe)
    options = recipe.selection
    cells = [(p, b.name, a) for p in recipe.pairs for b in recipe.benchmarks for a in options.alpha]
    task = progress.add_task("selection", total=len(cells))
    sides = []
    left_out: dict[str, ProbeError] = {}
    for pair, benchmark, alpha in cells:
        cell = cell_name(pair, benchmark, alpha)
        before, after = (
            solutions[names[model, pair.prompt, pair.max_new_tokens], benchmark]
            for model in (pair.before, pair.after)
        )
        try:
            selection = select(
                before,
                after,
                alpha,
                options.beta,
                options.gamma,
                options.delta,
                options.samples,
                options.seed,
                options.convention,
            )
        except ProbeError as error:
            folder.leave_out(cell, str(error))
            left_out[f"pair {pair.name}, benchmark {benchmark}: {error}"] = error
            continue
        folder.write_selection(cell, selection)
        sides.append(Side(pair.before, cell, "before", cut(before, selection)))
        sides.append(Side(pair.after, cell, "after", cut(after, selection)))
        progress.update(task, advance=1)
    for message, cause in left_out.items():
        if not sides:
            raise ProbeError(message) from cause
        progress.console.print(f"left out: {message}", soft_wrap=True)
    return sides


def _attribute_all(
    recipe: Recipe,
    sides: list[Side],
    folder: RunFolder,
    devices: list[torch.device],
    progress: Progress,
) -> dict[str, float]:
    """Score the edges of every cell, model by model; the largest residual error of each model."""
    options = recipe.attribution
    steps = options.ig_steps if options.method == "eap-ig" else 1
    settings = (options.method, options.granularity, options.ablation, str(steps))
    kernels = recipe.compute.kernels
    if options.method == "relp" and kernels == "auto":
        kernels = "eager"
    task = progress.add_task("attribution", total=sum(len(side.sequences) for side in sides))
    errors: dict[str, float] = {}
    for number, reference in enumerate(recipe.models()):
        model: Model | None = None
        weights = fingerprint(reference)
        for side in sides:
            if side.model != reference:
                continue
            path = folder.edges_file(side.cell, side.side)
            key = edges_key(weights, (*settings, recipe.compute.dtype), side.sequences)
            edges = _read_edges(folder, path, key, progress.console)
            if edges is None:
                device = devices[number % len(devices)]
                model = model or _load(recipe, reference, device, kernels)
                try:
                    edges = _attribute(recipe, model, side, folder, key, progress, task)
                except ProbeError as error:
                    raise ProbeError(f"{side.cell}, {side.side}: {error}") from error
            else:
                progress.update(task, advance=len(side.sequences))
            errors[reference] = max(errors.get(reference, 0), edges.residual_error)
        del model
        gc.collect()
    return errors


def _attribute(
    recipe: Recipe,
    model: Model,
    side: Side,
    folder: RunFolder,
    key: str,
    progress: Progress,
    task: TaskID,
) -> EdgeScores:
    """Score one side of a cell, from where an earlier run has got to, keeping each batch."""
    options = recipe.attribution
    path = folder.edges_file(side.cell, side.side)
    kept: dict[int, tuple[int, EdgeScores]] = {}
    for file in folder.parts(path):
        edges = _read_edges(folder, file, key, progress.console)
        if edges is not None:
            for row, name in enumerate(folder.sequence_ids(file)):
                kept[int(name)] = row, edges
    progress.update(task, advance=len(kept))

    def keep(places: list[int], edges: EdgeScores) -> None:
        folder.write_part(path, edges, places, key)
        progress.update(task, advance=len(places))

    edges = attribute(
        model,
        side.sequences,
        options.method,
        options.granularity,
        options.batch_size,
        ablation=options.ablation,
        ig_steps=options.ig_steps,
        done=kept,
        finished=keep,
    )
    error = edges.residual_error
    for place, (row, part) in kept.items():
        edges.scores[place], edges.losses[place] = part.scores[row], part.losses[row]
        edges.entropies[place] = part.entropies[row]
        error = max(error, part.residual_error)
    edges = edges._replace(residual_error=error)
    folder.write_edges(path, edges, [s.id for s in side.sequences], key)
    for file in folder.parts(path):
        file.unlink()
    return edges


def _read_edges(folder: RunFolder, path: Path, key: str, console: Console) -> EdgeScores | None:
    """Edges that an earlier run has left, or None; says so where they are of no use."""
    try:
        return folder.read_edges(path, key)
    except Damaged as damage:
        console.print(f"{path}: {damage}; computing it again")
        return None


def _load(
    recipe: Recipe, reference: str, device: torch.device, kernels: Kernels = "eager"
) -> Model:
    return load_model(reference, str(device), recipe.compute.dtype, kernels)


def cut(solutions: list[Solution], selection: Selection) -> list[Sequence]:
    """The sequences of a selection: each prompt with the part of its answer that is scored."""
    by_id = {solution.id: solution for solution in solutions}
    return [
        Sequence(by_id[name].prompt, by_id[name].answer[: selection.cut_length], name)
        for name in selection.ids
    ]


def progress_bar(console: Console) -> Progress:
    """The bar that shows how far each phase is."""
    return Progress(
        TextColumn("{task.description:<12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
