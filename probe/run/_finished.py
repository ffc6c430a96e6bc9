"""Finished runs: what can be measured on a run that is there already.

>>> for row in run_faithfulness("runs/tiny-math", edges=400):
...     print(row.model, row.method, row.spearman.value)
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from probe.checkpoints import fingerprint, model_inputs
from probe.errors import ProbeError
from probe.escaping import PlainConsole
from probe.recipe import (
    Recipe,
    check_named_server,
    read_recipe,
    recipe_files,
    recipe_from,
    recipe_table,
)
from probe.report import build_report, keep_report
from probe.run._checks import check_methods
from probe.run._choosing import read_sides
from probe.run._faithfulness import EDGES
from probe.run._measuring import measure_models
from probe.run._run import run_recipe
from probe.run._session import recipe_host, running, said_on
from probe.stats import Agreement
from probe.store import RunFolder, check_inputs, locked, run_path


def run_faithfulness(
    run: str | Path,
    *,
    edges: int | None = None,
    methods: str | Sequence[str] | None = None,
    sequences: int | None = None,
    seed: int | None = None,
    batch_size: int | None = None,
    device: str | None = None,
    remote: str | None = None,
    console: Console | None = None,
) -> tuple[Agreement, ...]:
    """Measure the faithfulness of every model of a run, or go on with it.

    Args:
        run: A run folder with solutions and selections; or a recipe, which is then run first.
        edges: How many edges per model; 400 where the recipe asks for none. This and the others:
            as the section `faithfulness` of the run's recipe has it, where not given.
        methods: One or several names in `probe.attribution.METHODS`; the first one's scores make
            the strata.
        sequences: How many sequences per model.
        seed: Seed of the draw.
        batch_size: How many edges run at once.
        device: Where to run; as the recipe has it, where not given.
        remote: The server that runs it; likewise.
        console: Where progress goes; standard error if not given.

    Raises:
        ProbeError: Neither a run folder nor a recipe, a run that has not got so far, an unknown
            method, a model that has changed since the run.
    """
    console = console or PlainConsole(stderr=True)
    folder = RunFolder(run_path(run))
    is_recipe = str(run) in recipe_files() or Path(run).suffix == ".toml"
    if folder.record.exists() or (folder.path.is_dir() and not is_recipe):
        is_recipe = False
        recipe, record = recorded(folder, remote)
    else:
        try:
            recipe = read_recipe(run, {} if remote is None else {"compute.remote": remote})
        except ProbeError as error:
            raise error if is_recipe else ProbeError(f"no run folder {run}, and {error}") from error
    names = (methods,) if isinstance(methods, str) else methods or ()
    given = {
        "edges": (recipe.faithfulness.edges or EDGES) if edges is None else edges,
        "methods": None if methods is None else list(dict.fromkeys(names)),
        "sequences": sequences,
        "seed": seed,
        "batch_size": batch_size,
    }
    if given["edges"] == 0:
        raise ProbeError("edges is 0; it must be at least 1")
    recipe = _with(
        recipe, str(run), faithfulness=given, compute={"device": device, "remote": remote}
    )
    check_methods(recipe)
    if is_recipe:
        return run_recipe(recipe, console=console).faithfulness

    check_unchanged(folder, recipe, record)
    sides = read_sides(recipe, folder)
    host = recipe_host(recipe, console)
    with locked(folder, said_on(console)) as held:
        held.open()
        with running(recipe, held, record, host, console) as session:
            measure_models(session, sides)
        report = build_report(held.path)
        keep_report(held, record, report)
    return report.faithfulness


def recorded(folder: RunFolder, remote: str | None = None) -> tuple[Recipe, dict[str, object]]:
    """The recipe of a run that went before, on the server that is asked for, and its record.

    Args:
        folder: The run.
        remote: The server that the user asks for.

    Raises:
        ProbeError: There is none, or it names a server that the user does not.
    """
    record = folder.read_record()
    recipe = recipe_from(record["recipe"], str(folder.record))
    if remote is None:
        check_named_server(recipe, str(folder.record))
        return recipe, record
    return _with(recipe, str(folder.path), compute={"remote": remote}), record


def check_unchanged(folder: RunFolder, recipe: Recipe, record: Mapping[str, object]) -> None:
    """Check that the models are those that a run was made with.

    Raises:
        ProbeError: A file of one is another.
    """
    check_inputs(folder, record, {model: model_inputs(model) for model in recipe.models()})
    if record["models"] != {model: fingerprint(model) for model in recipe.models()}:
        raise ProbeError(
            f"the weights of a model have changed since {folder.path} was made; start over: "
            f"probe recipe ... --output {folder.path} --fresh"
        )


def _with(recipe: Recipe, where: str, **changes: Mapping[str, object]) -> Recipe:
    """A recipe with some keys changed, and checked again; None is no change."""
    table = recipe_table(recipe)
    for section, values in changes.items():
        old = table[section]
        assert isinstance(old, dict)
        table[section] = old | {k: v for k, v in values.items() if v is not None}
    return recipe_from(table, where)
