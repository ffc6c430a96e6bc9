"""A run: the phases of a recipe, one after the other, into a run folder.

problems -> solutions -> selection -> attribution (-> faithfulness) -> metrics and report.
Everything that can be wrong with a recipe is checked before the folder is touched; every phase
finds in the folder what is done already and goes on from there, and ends in the same files.

    >>> report = probe.run_recipe("tiny-math", output="runs/tiny-math")
    >>> report.cells[0].metric
    'activation_intensity'
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from probe.answer_files import Given, GivenAnswer, read_given
from probe.checkpoints import fetch_checkpoint, weight_files
from probe.checks import check_here, check_output
from probe.errors import ProbeError
from probe.escaping import PlainConsole
from probe.extra_passes import measure_states, measure_weights
from probe.extras import EXTRAS
from probe.hosting import check_host, load_hosted, open_host
from probe.imported import match
from probe.models import (
    check_pair,
    cpu_threads,
    read_tokenizer,
    resolve_devices,
)
from probe.parallel import Tell, Told, on_each, places_for
from probe.phases import Side, attribute_with, solve_with
from probe.plan import check_reach, lengths_line, make_plan, plan_lines, took_line
from probe.problems import Problem, load_problems
from probe.prompts import encode_prompt
from probe.recipe import Recipe, read_recipe
from probe.record import now, open_record, phase_seconds, timed, with_earlier_tables
from probe.remote import Host
from probe.report import Report, build_report
from probe.run_folder import RunFolder, cell_name, model_names
from probe.selection import Selection, Solution, select
from probe.sequences import TokenSequence


def run_recipe(
    recipe: str | Path | Recipe,
    output: str | Path | None = None,
    *,
    overrides: Mapping[str, str | int | float] | None = None,
    fresh: bool = False,
    console: Console | None = None,
) -> Report:
    """Run a recipe, or go on with it.

    Tables of an earlier run in the folder, and its control, stay and are brought up to date.

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
    console = console or PlainConsole(stderr=True)
    folder = RunFolder(Path(output) if output else Path("runs") / recipe.name)
    check_output(recipe, folder.path, fresh)
    problems = check_recipe(recipe)
    given, answers = _read_given(recipe, problems)
    host = recipe_host(recipe, console)
    for reference in recipe.models():
        if host is None and not weight_files(reference):
            console.print(f"downloading {reference}")
            fetch_checkpoint(reference)
    if not fresh:
        recipe = with_earlier_tables(folder, recipe)
    tables = {name: file.table for name, file in given.items()}
    record = open_record(folder, recipe, fresh, tables)
    folder.write_clusters(
        {name: {p.id: p.cluster for p in part if p.cluster} for name, part in problems.items()}
    )
    for name, file in given.items():
        console.print(f"solutions of {name}: {file.account}", soft_wrap=True)
    for line in plan_lines(make_plan(recipe)):
        console.print(line, soft_wrap=True)
    places = places_for(recipe.models(), resolve_devices(recipe.compute.device_here))

    with (
        progress_bar(console) as progress,
        cpu_threads(recipe.compute.threads),
        told_of_jobs(host, record, progress),
    ):
        with timed(folder, record, "solutions"):
            solutions = _solve_all(recipe, problems, answers, folder, places, host, progress)
        with timed(folder, record, "selection"):
            sides = _select_all(recipe, solutions, folder, progress)
        lengths = [len(s.prompt) + len(s.answer) - 1 for side in sides for s in side.sequences]
        if lengths:
            console.print(lengths_line(lengths, recipe), soft_wrap=True)
        with timed(folder, record, "attribution"):
            record["residual_error"] = _attribute_all(recipe, sides, folder, places, host, progress)
        if recipe.faithfulness.edges:
            from probe.faithfulness import measure_models  # needs this module in turn

            with timed(folder, record, "faithfulness"):
                measure_models(recipe, sides, folder, places, progress, host)
        # Models on a server do not leave it; what was measured here before is still shown.
        needs = {EXTRAS[name].needs for name in recipe.report.extra if host is None}
        if "states" in needs and recipe.selection.alpha:
            with timed(folder, record, "states"):
                measure_states(recipe, sides, folder, places, progress)
        if "weights" in needs:
            with timed(folder, record, "weights"):
                measure_weights(recipe, folder, progress)
        with timed(folder, record, "report"):
            task = progress.add_task("metrics", total=1)
            report = build_report(folder.path)
            folder.write_json("report.json", report.table)
            progress.update(task, advance=1)
    console.print(took_line(phase_seconds(record)), soft_wrap=True)
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
    check_here(recipe)
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
        for model in (pair.before, pair.after):
            tokenizer = read_tokenizer(model)
            for first, *_ in problems.values():
                encode_prompt(tokenizer, pair.prompt, first.question)
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
        console.print(line, soft_wrap=True)

    host = open_host(options.remote, options.jobs, options.timeout, say)
    for line in check_host(host):
        say(line)
    for reference in recipe.models():
        load_hosted(reference, host, options.dtype)
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

    def show(states: Mapping[str, int]) -> None:
        line = f"{states['queued']} queued, {states['running']} running"
        progress.update(task, description=line, completed=states["done"])

    try:
        with host.watched(show):
            yield
    finally:
        record["remote"] = host.table


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
    places: list[str],
    host: Host | None,
    progress: Progress,
) -> dict[tuple[str, str], list[Solution]]:
    """Let each model solve each benchmark, once; solutions by file name of model and benchmark."""
    names = model_names(recipe)
    total = len(names) * sum(len(part) for part in problems.values())
    work = [
        partial(solve_with, recipe, asked, name, problems, given, folder.path, host=host)
        for asked, name in names.items()
    ]
    found = on_each(work, places, teller(progress, "solutions", total))
    return {
        (name, benchmark): solutions
        for name, of_model in zip(names.values(), found, strict=True)
        for benchmark, solutions in of_model.items()
    }


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
            folder.leave_out(cell, str(error))
            left_out[f"pair {pair.name}, benchmark {benchmark}: {error}"] = error
            continue
        folder.write_selection(cell, selection)
        old, new = cut(before, selection), cut(after, selection)
        sides += [Side(pair.before, cell, "before", old), Side(pair.after, cell, "after", new)]
        if recipe.attribution.control == "cross-text":
            old, new = cross(old, new)
            sides.append(Side(pair.before, cell, "before-on-after", old))
            sides.append(Side(pair.after, cell, "after-on-before", new))
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
    places: list[str],
    host: Host | None,
    progress: Progress,
) -> dict[str, float]:
    """Score the edges of every cell, model by model; the largest residual error of each model."""
    references = list(dict.fromkeys(side.model for side in sides))
    work = [
        partial(
            attribute_with,
            recipe,
            reference,
            [side for side in sides if side.model == reference],
            folder.path,
            host=host,
        )
        for reference in references
    ]
    total = sum(len(side.sequences) for side in sides)
    errors = on_each(work, places, teller(progress, "attribution", total))
    return dict(zip(references, errors, strict=True))


def teller(progress: Progress, phase: str, total: int) -> Tell:
    """What shows what a phase tells."""
    task = progress.add_task(phase, total=total)

    def tell(told: Told) -> None:
        if told.text:
            progress.console.print(told.text)
        if told.advance:
            progress.update(task, advance=told.advance, speed=told.speed)

    return tell


def cut(solutions: list[Solution], selection: Selection) -> list[TokenSequence]:
    """The sequences of a selection: each prompt with the part of its answer that is scored."""
    by_id = {solution.id: solution for solution in solutions}
    return [
        TokenSequence(by_id[name].prompt, by_id[name].answer[: selection.cut_length], name)
        for name in selection.ids
    ]


def cross(
    before: list[TokenSequence], after: list[TokenSequence]
) -> tuple[list[TokenSequence], list[TokenSequence]]:
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
        TextColumn("{task.description:<12}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        Speed(),
        console=console,
    )
