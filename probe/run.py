"""A run: the phases of a recipe, one after the other, into a run folder.

problems -> solutions -> selection -> attribution (-> faithfulness) -> metrics and report.
Everything that can be wrong with a recipe is checked before the folder is touched; every phase
finds in the folder what is done already and goes on from there, and ends in the same files.

    >>> report = probe.run_recipe("tiny-math", output="runs/tiny-math")
    >>> report.cells[0].metric
    'activation_intensity'
"""

import gc
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from probe.attribution import METHODS, EdgeScores, Sequence, attribute
from probe.checkpoints import fetch_checkpoint, fingerprint, weight_files
from probe.errors import ProbeError
from probe.extra_passes import measure_states, measure_weights
from probe.extras import EXTRAS, check_extras
from probe.hosting import check_host
from probe.imported import Given, GivenAnswer, imported, match, read_given
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
from probe.remote import Host, open_host
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
    """`before` or `after`; with the cross-text control also `before-on-after` and
    `after-on-before`: which model on whose answers."""

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
    given, answers = _read_given(recipe, problems)
    host = recipe_host(recipe, console)
    for reference in recipe.models():
        if host is None and not weight_files(reference):
            console.print(f"downloading {reference}")
            fetch_checkpoint(reference)
    folder = RunFolder(Path(output) if output else Path("runs") / recipe.name)
    tables = {name: file.table for name, file in given.items()}
    record = open_record(folder, recipe, fresh, tables)
    for name, file in given.items():
        console.print(f"solutions of {name}: {file.account}", soft_wrap=True)
    devices = resolve_devices(recipe.compute.device_here)

    with (
        progress_bar(console) as progress,
        cpu_threads(recipe.compute.threads),
        told_of_jobs(host, record, progress),
    ):
        with timed(folder, record, "solutions"):
            solutions = _solve_all(recipe, problems, answers, folder, devices, host, progress)
        with timed(folder, record, "selection"):
            sides = _select_all(recipe, solutions, folder, progress)
        with timed(folder, record, "attribution"):
            record["residual_error"] = _attribute_all(
                recipe, sides, folder, devices, host, progress
            )
        if recipe.faithfulness.edges:
            from probe.faithfulness import measure_models  # needs this module in turn

            with timed(folder, record, "faithfulness"):
                measure_models(recipe, sides, folder, devices, progress, host)
        needs = {EXTRAS[name].needs for name in recipe.report.extra}
        if "states" in needs:
            with timed(folder, record, "states"):
                measure_states(recipe, sides, folder, devices, progress)
        if "weights" in needs:
            with timed(folder, record, "weights"):
                measure_weights(recipe, folder, progress)
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
    check_extras(recipe)
    resolve_devices(recipe.compute.device_here)
    check_reach(recipe)
    options = recipe.solutions
    questions = None if options.questions == "all" else options.questions
    problems = {
        benchmark.name: load_problems(
            benchmark.name,
            Path(benchmark.path).expanduser() if benchmark.path else None,
            questions,
            options.seed,
            benchmark.grading,
        )
        for benchmark in recipe.benchmarks
    }
    for pair in recipe.pairs:
        check_pair(pair.before, pair.after)
        for model in (pair.before, pair.after) if chat_message(pair.prompt)[0] else ():
            if not read_tokenizer(model).chat_template:
                raise ProbeError(no_template(model))
    return problems


def recipe_host(recipe: Recipe, console: Console) -> Host | None:
    """The server of a recipe, asked whether it can run it; None where it runs here.

    Raises:
        ProbeError: It cannot be reached, does not take the key, understands other versions only,
            or does not have a model of the recipe.
    """
    options = recipe.compute
    if not options.remote:
        return None

    def say(line: str) -> None:
        console.print(line, soft_wrap=True, markup=False)

    host = open_host(options.remote, options.jobs, options.timeout, say)
    for line in check_host(host):
        say(line)
    for reference in recipe.models():
        load_model(reference, dtype=options.dtype, host=host)
    return host


@contextmanager
def told_of_jobs(
    host: Host | None, record: dict[str, object], progress: Progress
) -> Iterator[None]:
    """Show how many jobs are queued and running on a server, and record what went over the wire."""
    if host is None:
        yield
        return
    task = progress.add_task("jobs", total=None)

    def show() -> None:
        states = host.states
        line = f"{states['queued']} queued, {states['running']} running"
        progress.update(task, description=line, completed=states["done"])

    host.watch = show
    try:
        yield
    finally:
        record["remote"] = host.table


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


def _read_given(
    recipe: Recipe, problems: Mapping[str, list[Problem]]
) -> tuple[dict[str, Given], dict[tuple[str, str], dict[str, GivenAnswer]]]:
    """The files of solutions by the model's name; their answers by name and benchmark."""
    given: dict[str, Given] = {}
    answers: dict[tuple[str, str], dict[str, GivenAnswer]] = {}
    for asked, name in model_names(recipe).items():
        if asked.given is not None:
            given[name] = read_given(Path(asked.given).expanduser())
            for benchmark in problems:
                answers[name, benchmark] = match(given[name], problems, benchmark)
    return given, answers


def _solve_all(
    recipe: Recipe,
    problems: Mapping[str, list[Problem]],
    given: Mapping[tuple[str, str], Mapping[str, GivenAnswer]],
    folder: RunFolder,
    devices: list[torch.device],
    host: Host | None,
    progress: Progress,
) -> dict[tuple[str, str], list[Solution]]:
    """Let each model solve each benchmark, once; solutions by file name of model and benchmark."""
    names = model_names(recipe)
    solutions: dict[tuple[str, str], list[Solution]] = {}
    total = len(names) * sum(len(part) for part in problems.values())
    task = progress.add_task("solutions", total=total)
    for number, (use, name) in enumerate(names.items()):
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
                if use.given is not None:
                    tokenizer, answers = read_tokenizer(use.model), given[name, benchmark]
                    batches = imported(tokenizer, asked, use.prompt, answers, frozenset(done))
                else:
                    if model is None:
                        model = _load(recipe, use.model, devices[number % len(devices)], host)
                    batches = solve(
                        model,
                        asked,
                        use.prompt,
                        max_new_tokens=use.max_new_tokens,
                        stop=use.stop,
                        batch_size=recipe.solutions.batch_size,
                        engine=recipe.solutions.engine,
                        done=frozenset(done),
                        say=progress.console.print,
                    )
                start, tokens = time.monotonic(), 0
                with closing(batches):
                    for batch in batches:
                        folder.append_solutions(path, batch)
                        done |= {solution.id: solution for solution in batch}
                        tokens += sum(len(solution.answer) for solution in batch)
                        speed = f"{tokens / (time.monotonic() - start):,.0f} tokens/s"
                        progress.update(task, advance=len(batch), speed=speed)
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
    """Select the questions of each cell, and cut the answers."""
    names = model_names(recipe)
    options = recipe.selection
    cells = [(p, b.name, a) for p in recipe.pairs for b in recipe.benchmarks for a in options.alpha]
    task = progress.add_task("selection", total=len(cells))
    sides = []
    for pair, benchmark, alpha in cells:
        before, after = (solutions[names[asked], benchmark] for asked in pair.asked())
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
            raise ProbeError(f"pair {pair.name}, benchmark {benchmark}: {error}") from error
        cell = cell_name(pair, benchmark, alpha)
        folder.write_selection(cell, selection)
        old, new = cut(before, selection), cut(after, selection)
        sides += [Side(pair.before, cell, "before", old), Side(pair.after, cell, "after", new)]
        if recipe.attribution.control == "cross-text":
            old, new = cross(old, new)
            sides.append(Side(pair.before, cell, "before-on-after", old))
            sides.append(Side(pair.after, cell, "after-on-before", new))
        progress.update(task, advance=1)
    return sides


def _attribute_all(
    recipe: Recipe,
    sides: list[Side],
    folder: RunFolder,
    devices: list[torch.device],
    host: Host | None,
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
                model = model or _load(recipe, reference, device, host, kernels)
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
    recipe: Recipe,
    reference: str,
    device: torch.device,
    host: Host | None,
    kernels: Kernels = "eager",
) -> Model:
    return load_model(reference, str(device), recipe.compute.dtype, kernels, host)


def cut(solutions: list[Solution], selection: Selection) -> list[Sequence]:
    """The sequences of a selection: each prompt with the part of its answer that is scored."""
    by_id = {solution.id: solution for solution in solutions}
    return [
        Sequence(by_id[name].prompt, by_id[name].answer[: selection.cut_length], name)
        for name in selection.ids
    ]


def cross(before: list[Sequence], after: list[Sequence]) -> tuple[list[Sequence], list[Sequence]]:
    """Exchange the answers of two sides; each model keeps the prompt as it tokenises it."""
    pairs = list(zip(before, after, strict=True))
    return (
        [old._replace(answer=new.answer) for old, new in pairs],
        [new._replace(answer=old.answer) for old, new in pairs],
    )


class Speed(ProgressColumn):
    """What a task's `speed` says, where it says any."""

    def render(self, task: Task) -> Text:
        """Give the text."""
        return Text(task.fields.get("speed", ""))


def progress_bar(console: Console) -> Progress:
    """The bar that shows how far each phase is."""
    return Progress(
        TextColumn("{task.description:<12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        Speed(),
        console=console,
    )
