"""Checks: what is wrong with a recipe, found before anything is downloaded, loaded or written.

`--dry-run` and a run call the same two functions, so that a plan is shown of nothing that the run
would refuse.

    >>> check_here(read_recipe("tiny-math"))
"""

import os
from collections.abc import Mapping
from pathlib import Path

from probe.attribution import METHODS
from probe.checkpoints import check_folder, find_checkpoint, fingerprint, model_inputs, weight_files
from probe.errors import ProbeError, likely_meant
from probe.files import at_home
from probe.metrics import METRICS, TOKEN_METRICS
from probe.models import (
    architecture_of,
    chat_message,
    check_model,
    check_pair,
    no_template,
    read_config,
    resolve_devices,
    resolve_kernels,
    tokenizer_at,
)
from probe.problems import BENCHMARKS, Problem, data_set_here, load_problems
from probe.recipe import Recipe
from probe.remote import open_completions
from probe.report import check_extras
from probe.run._plan import reading_lines
from probe.solutions import match, read_given
from probe.stats import CONTROLS
from probe.store import RunFolder, check_free, check_goes_on, check_names
from probe.tracing import TARGETS


def check_here(recipe: Recipe) -> None:
    """Check all of a recipe that this machine can tell without the network.

    Raises:
        ProbeError: An unknown method, table, metric or benchmark, a device or kernels that are not
            here, a folder or file that is missing or broken, a pair that does not fit, solutions
            that do not belong to the questions.
    """
    check_methods(recipe)
    check_extras(recipe)
    check_metrics(recipe)
    options = recipe.compute
    if options.remote and options.cluster:
        raise ProbeError("models run on a server or on a cluster: take --remote or --cluster away")
    devices = resolve_devices(recipe.compute.device_here)
    problems = _problems_here(recipe)
    checked: set[str] = set()  # a training's base is in each of its pairs
    for pair in recipe.pairs:
        models = [model for model in (pair.before, pair.after) if find_checkpoint(model)]
        for model in models:
            kind = read_config(model).model_type
            architecture_of(kind)
            if not options.remote and model not in checked:
                check_folder(model)
                if weight_files(model):
                    check_model(model, numbers=False)
                checked.add(model)
                if not options.cluster:  # its nodes say what they have
                    resolve_kernels(options.kernels, devices[0], kind)
            if chat_message(pair.prompt)[0] and not tokenizer_at(model).chat_template:
                raise ProbeError(no_template(model))
        if len(models) == 2:
            check_pair(pair.before, pair.after)
        for asked in pair.asked():
            if asked.server is not None:
                open_completions(asked.server)
                if recipe.solutions.decoding == "model":
                    raise ProbeError(
                        "a model's own decoding works here only, and not on a server of answers; "
                        "use solutions.decoding greedy"
                    )
            if asked.file is not None:
                given = read_given(at_home(asked.file))
                for benchmark in problems:
                    match(given, problems, benchmark)


def check_methods(recipe: Recipe) -> None:
    """Check that a recipe's methods, target and controls are known.

    Raises:
        ProbeError: One is not.
    """
    tables: tuple[tuple[str, tuple[str, ...], Mapping[str, object]], ...] = (
        ("attribution.method", (recipe.attribution.method,), METHODS),
        ("attribution.target", (recipe.attribution.target,), TARGETS),
        ("attribution.control", recipe.attribution.control, CONTROLS),
        ("faithfulness.methods", recipe.faithfulness.methods, METHODS),
    )
    for key, names, known in tables:
        for name in names:
            if name not in known:
                hint = likely_meant(name, known)
                raise ProbeError(f"{key} is {name!r}; known: {', '.join(known)}{hint}")


def check_metrics(recipe: Recipe) -> None:
    """Check that published values are of metrics that there are.

    Raises:
        ProbeError: One is not.
    """
    metrics = (*METRICS, *TOKEN_METRICS)
    for key, names, known in (
        ("published", [value.metric for value in recipe.published], (*metrics, "accuracy")),
        ("published_changes", [value.metric for value in recipe.published_changes], metrics),
    ):
        for name in names:
            if name not in known:
                hint = likely_meant(name, known)
                raise ProbeError(f"{key}.metric is {name!r}; known: {', '.join(known)}{hint}")


def check_output(recipe: Recipe, output: Path, fresh: bool = False, add: bool = False) -> None:
    """Check that a run of a recipe can go to a folder, without touching it.

    With `add` the folder's run may have pairs that the recipe has not, and the other way round.

    Raises:
        ProbeError: It is a file, cannot be written to, is in use, or holds something else.
    """
    folder = RunFolder(output)
    folder.check()
    check_free(folder)
    existing = next(
        place for place in (output.absolute(), *output.absolute().parents) if place.exists()
    )
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ProbeError(
            f"cannot write to the run folder {output}: {existing} is no folder that one may write "
            "to; give another one with --output"
        )
    if fresh or not folder.record.exists():
        check_names(recipe)
    else:
        here = all(weight_files(model) for model in recipe.models())
        models = {model: fingerprint(model) for model in recipe.models()} if here else None
        # What takes long to read is left to the run, which says so first.
        quick = here and not reading_lines(recipe)
        inputs = {model: model_inputs(model) for model in recipe.models()} if quick else None
        check_goes_on(folder, recipe, models, inputs=inputs, add=add)


def _problems_here(recipe: Recipe) -> dict[str, list[Problem]]:
    """The problems of each benchmark that is here already."""
    options = recipe.solutions
    questions = None if options.questions == "all" else options.questions
    found = {}
    for choice in recipe.benchmarks:
        known = BENCHMARKS.get(choice.name)
        if known and known.source and not choice.path and not data_set_here(known.source):
            continue
        path = at_home(choice.path) if choice.path else None
        found[choice.name] = load_problems(
            choice.name, path, questions, options.seed, choice.grading
        )
    return found
