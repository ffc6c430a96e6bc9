"""A run: the phases of a recipe, one after the other, into a run folder.

problems -> solutions -> selection -> attribution (-> faithfulness) -> metrics and report.
Everything that can be wrong with a recipe is checked before the folder is touched; every phase
finds in the folder what is done already and goes on from there, and ends in the same files.

    >>> report = probe.run_recipe("tiny-math", output="runs/tiny-math")
    >>> report.cells[0].metric
    'activation_intensity'
"""

from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

from rich.console import Console

from probe.checkpoints import fetch_checkpoint, find_checkpoint, weight_files
from probe.escaping import PlainConsole
from probe.files import at_home
from probe.models import check_model, check_pair, encode_prompt, tokenizer_at
from probe.problems import Problem, load_problems
from probe.recipe import Recipe, read_recipe
from probe.remote import Host
from probe.report import EXTRAS, Report, build_report, keep_report
from probe.run._attributing import attribute_all
from probe.run._checks import check_here, check_output
from probe.run._choosing import select_all
from probe.run._cluster import Cluster, cluster_of
from probe.run._extra_passes import PASSES
from probe.run._measuring import measure_models
from probe.run._needs import make_plan
from probe.run._plan import (
    check_reach,
    lengths_line,
    plan_lines,
    reading_lines,
    took_line,
)
from probe.run._reading import read_models
from probe.run._session import recipe_host, running, said_on
from probe.run._solving import solve_all
from probe.run._timing import time_line, worth_timing
from probe.solutions import Given, GivenAnswer, match, read_given
from probe.store import (
    QUESTIONS,
    RunFolder,
    check_questions,
    locked,
    model_names,
    now,
    open_record,
    phase_seconds,
    version_lines,
    with_earlier_tables,
)


def run_recipe(
    recipe: str | Path | Recipe,
    output: str | Path | None = None,
    *,
    overrides: Mapping[str, str | int | float] | None = None,
    fresh: bool = False,
    add: bool = False,
    console: Console | None = None,
) -> Report:
    """Run a recipe, or go on with it.

    Tables of an earlier run in the folder, and its control, stay and are brought up to date.

    Args:
        recipe: A recipe's name, a TOML file, or a recipe.
        output: The run folder; `runs/NAME` if not given.
        overrides: Values by dotted key, as in `{"selection.samples": 50}`; not for a `Recipe`.
        fresh: Start over where the folder holds an earlier run.
        add: Add its pairs to those of an earlier run in the folder, which stay as they are; their
            models need not be there any more.
        console: Where progress goes; standard error if not given.

    Raises:
        ProbeError: Anything that the user can mend; nothing is lost by it.
    """
    if not isinstance(recipe, Recipe):
        recipe = read_recipe(recipe, overrides)
    console = console or PlainConsole(stderr=True)
    folder = RunFolder(Path(output) if output else Path("runs") / recipe.name)
    check_output(recipe, folder.path, fresh, add)
    problems = check_recipe(recipe)
    for line in reading_lines(recipe):
        console.print(line, soft_wrap=True)
    given, answers = _read_given(recipe, problems)
    host = recipe_host(recipe, console)
    for reference in recipe.models():
        if host is None and not weight_files(reference):
            console.print(f"downloading {reference}")
            fetch_checkpoint(reference)
    # A run that goes on has looked through these numbers: its record knows these weights.
    begun = folder.record.exists() and not fresh
    known = folder.read_record().get("models") if begun else None
    known = known if isinstance(known, dict) else {}
    with cluster_of(recipe, said_on(console)) as cluster:
        for reference in recipe.models():
            if weight_files(reference):
                numbers = cluster is None and reference not in known
                for line in check_model(reference, numbers):
                    console.print(line, soft_wrap=True)
        if cluster is not None:
            read_models(recipe.models(), known, cluster, console)
        with locked(folder, said_on(console)) as held:
            return _run(held, recipe, problems, given, answers, host, cluster, fresh, add, console)


def _run(
    folder: RunFolder,
    recipe: Recipe,
    problems: Mapping[str, list[Problem]],
    given: Mapping[str, Given],
    answers: Mapping[tuple[str, str], Mapping[str, GivenAnswer]],
    host: Host | None,
    cluster: Cluster | None,
    fresh: bool,
    add: bool,
    console: Console,
) -> Report:
    """Run a recipe that was checked into a folder that this process holds."""
    if not fresh:
        recipe = with_earlier_tables(folder, recipe)
    tables = {name: file.table for name, file in given.items()}
    questions: Mapping[str, Mapping[str, str]] = {
        name: {p.id: sha256(p.question.encode()).hexdigest()[:16] for p in part}
        for name, part in problems.items()
    }
    if not fresh and folder.record.exists():
        questions = check_questions(folder, questions)
    record = open_record(folder, recipe, fresh, tables, add)
    for line in version_lines(record):
        console.print(line, soft_wrap=True)
    folder.write_json(QUESTIONS, questions)
    folder.write_clusters(
        {name: {p.id: p.cluster for p in part if p.cluster} for name, part in problems.items()}
    )
    for name, file in given.items():
        console.print(f"solutions of {name}: {file.account}", soft_wrap=True)
    plan = make_plan(recipe)
    for line in plan_lines(plan):
        console.print(line, soft_wrap=True)
    begun = any(folder.path.glob("solutions/*.jsonl"))
    expected = time_line(plan) if worth_timing(plan) and not begun else None
    if expected:
        console.print(expected, soft_wrap=True)
    if cluster:
        record["devices"] = cluster.nodes
    with running(recipe, folder, record, host, console, cluster) as run:
        if run.workers:
            run.workers.start()
        sides = select_all(run, solve_all(run, problems, answers))
        lengths = [sequence.length for side in sides for sequence in side.sequences]
        if lengths:
            run.say(lengths_line(lengths, recipe))
        attribute_all(run, sides)
        if recipe.faithfulness.edges:
            measure_models(run, sides)
        # Models on a server do not leave it; what was measured here before is still shown.
        needs = {EXTRAS[name].needs for name in recipe.report.extra if host is None}
        for name, measure_pass in PASSES.items():
            if name in needs:
                measure_pass(run, sides)
        with run.phase("report"):
            bar = run.bar("metrics", 1)
            report = build_report(folder.path)
            keep_report(folder, record, report)
            bar.advance(1)
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
    new = [p for p in recipe.pairs if not all(map(find_checkpoint, (p.before, p.after)))]
    check_reach(recipe)
    options = recipe.solutions
    questions = None if options.questions == "all" else options.questions
    problems = {
        benchmark.name: load_problems(
            benchmark.name,
            at_home(benchmark.path) if benchmark.path else None,
            questions,
            options.seed,
            benchmark.grading,
        )
        for benchmark in recipe.benchmarks
    }
    for pair in new:  # the others are checked
        check_pair(pair.before, pair.after)
    asked = [(model, pair.prompt) for pair in recipe.pairs for model in (pair.before, pair.after)]
    for model, prompt in dict.fromkeys(asked):
        tokenizer = tokenizer_at(model)
        for first, *_ in problems.values():
            encode_prompt(tokenizer, prompt, first.question)
    return problems


def _read_given(
    recipe: Recipe, problems: Mapping[str, list[Problem]]
) -> tuple[dict[str, Given], dict[tuple[str, str], dict[str, GivenAnswer]]]:
    """The files of solutions by the model's name; their answers by name and benchmark."""
    given: dict[str, Given] = {}
    answers: dict[tuple[str, str], dict[str, GivenAnswer]] = {}
    for asked, name in model_names(recipe).items():
        if asked.file is not None:
            given[name] = read_given(at_home(asked.file))
            for benchmark in problems:
                answers[name, benchmark] = match(given[name], problems, benchmark)
    return given, answers
