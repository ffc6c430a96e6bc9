"""The record of a run: run.json, which says what was run, with what, on what, and for how long.

A folder goes on only with the recipe and the weights that it was made with; this module decides
that, and names the first difference where it refuses.

    >>> record = open_record(RunFolder(Path("runs/tiny-math")), recipe, fresh=False)
    >>> record["versions"]["nnsight"]
    '0.8.1'
"""

import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version

import torch
from pydantic import TypeAdapter, ValidationError

import probe
from probe.attribution import METHODS
from probe.checkpoints import fingerprint, hub_commits, model_inputs
from probe.errors import ProbeError
from probe.models import resolve_devices
from probe.recipe import Recipe, is_address, recipe_from, recipe_table
from probe.store._digests import Damaged
from probe.store._run_folder import QUESTIONS, SCHEMA, RunFolder

# Keys of a recipe that do not change what comes out, only how fast or how it is shown.
_FREE_KEYS = {
    "description": None,
    "compute": (
        "device",
        "threads",
        "kernels",
        "cluster",
        "gpus",
        "remote",
        "jobs",
        "timeout",
    ),
    "solutions": ("questions", "batch_size", "engine", "server"),
    "attribution": ("batch_size", "control"),
    "faithfulness": None,
    "report": None,
    "published": None,
    "published_changes": None,
}


def open_record(
    folder: RunFolder,
    recipe: Recipe,
    fresh: bool,
    given: Mapping[str, Mapping[str, str | int]] | None = None,
    add: bool = False,
) -> dict[str, object]:
    """Open the folder for this recipe and write who is running what.

    Args:
        folder: The run folder.
        recipe: The recipe.
        fresh: Whether to start over.
        given: What is known of solutions that were generated elsewhere, by the model's name.
        add: Whether pairs of the folder's run that the recipe has not stay, as they are.

    Raises:
        ProbeError: The folder holds a run of something else.
    """
    solutions = {name: dict(table) for name, table in (given or {}).items()}
    table = recipe_table(with_earlier_pairs(folder, recipe) if add and not fresh else recipe)
    models = {model: fingerprint(model) for model in recipe.models()}
    inputs = {model: model_inputs(model) for model in recipe.models()}
    times: object = {}
    digests: object = True
    earlier: list[object] = []
    kept: dict[str, object] = {}
    if folder.record.exists() and not fresh:
        old = check_goes_on(folder, recipe, models, solutions, inputs, add)
        kept = old if add else {}
        times, digests = old.get("seconds", {}), old.get("digests", False)
        earlier = _earlier_versions(old)
    folder.open(fresh)
    record: dict[str, object] = {
        "schema": SCHEMA,
        "digests": digests,
        "recipe": table,
        "models": _table_of(kept, "models") | models,
        "inputs": _table_of(kept, "inputs") | inputs,
        "commits": _table_of(kept, "commits")
        | {k: v for model in models for k, v in hub_commits(model).items()},
        "given_solutions": _table_of(kept, "given_solutions") | solutions,
        "versions": versions(),
        "devices": [recipe.compute.remote]
        if recipe.compute.remote
        else [
            _device_name(device, recipe.compute.threads)
            for device in resolve_devices(recipe.compute.device_here)
        ],
        "started": now(),
        "seconds": times,
        "finished": None,
    }
    if earlier:
        record["earlier_versions"] = earlier
    record |= {key: kept[key] for key in ("solved", "residual_error") if key in kept}
    folder.write_json("run.json", record)
    return record


def _table_of(record: Mapping[str, object], key: str) -> dict[str, object]:
    """A table in a record; an empty one where it has none."""
    found = record.get(key)
    return found if isinstance(found, dict) else {}


def versions() -> dict[str, str]:
    """The versions of this package, Python and the libraries that numbers come from."""
    return {
        "probe": probe.__version__,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "nnsight")},
    }


def _earlier_versions(old: Mapping[str, object]) -> list[object]:
    """The versions that a run was gone on with so far, but for those that are here now."""
    before = old.get("earlier_versions", [])
    found = [*before, old.get("versions")] if isinstance(before, list) else []
    here = _numbers_from(versions())
    return [
        each
        for place, each in enumerate(found)
        if isinstance(each, dict) and _numbers_from(each) != here and each not in found[:place]
    ]


def _numbers_from(versions: Mapping[str, object]) -> dict[str, object]:
    """The versions that may move a number."""
    return {name: number for name, number in versions.items() if name != "python"}


def version_lines(record: Mapping[str, object]) -> tuple[str, ...]:
    """A line for each package of which a run was computed with several versions."""
    earlier, here = record.get("earlier_versions"), record.get("versions")
    if not isinstance(earlier, list) or not isinstance(here, dict):
        return ()
    lines = []
    for name, number in _numbers_from(here).items():
        others = [str(each.get(name)) for each in earlier if isinstance(each, dict)]
        others = [other for other in dict.fromkeys(others) if other != number]
        if others:
            lines.append(
                f"computed in part with {name} {', '.join(others)}, in part with {number}: numbers "
                "may differ in the last digits"
            )
    return tuple(lines)


def check_goes_on(
    folder: RunFolder,
    recipe: Recipe,
    models: Mapping[str, str] | None,
    solutions: Mapping[str, Mapping[str, str | int]] | None = None,
    inputs: Mapping[str, Mapping[str, str]] | None = None,
    add: bool = False,
) -> dict[str, object]:
    """Check that a folder's run can go on with this recipe; what it has recorded.

    Args:
        folder: The run folder.
        recipe: The recipe.
        models: Fingerprint of each model; None where they are not here.
        solutions: What is known of solutions made elsewhere; None where that is not known yet.
        inputs: Digests of each model's files; None where they are not here.
        add: Whether the recipe may have pairs that the run has not, or lack some that it has.

    Raises:
        ProbeError: The folder holds a run of something else.
    """
    old = folder.read_record()
    known = {key: _table_of(old, key) for key in ("models", "given_solutions")}
    # Keys that have come since stand at their defaults, which are what was done before.
    earlier = recipe_from(old.get("recipe"), str(folder.record))
    if add:
        whole = with_earlier_pairs(folder, recipe).pairs[: len(earlier.pairs)]
        recipe = replace(recipe, pairs=whole)
        # Of what is new nothing is known yet, and of what is not run nothing is asked.
        models = models and {m: v for m, v in models.items() if m in known["models"]}
        inputs = inputs and {m: v for m, v in inputs.items() if m in known["models"]}
        known["models"] = {m: known["models"][m] for m in models or ()}
        known["given_solutions"] |= solutions or {}
    difference = _first_difference(_fixed(recipe_table(recipe)), _fixed(recipe_table(earlier)))
    if not difference and inputs is not None:
        check_inputs(folder, old, inputs)
    for what, here, there in (
        ("recipe", _fixed(recipe_table(recipe)), _fixed(recipe_table(earlier))),
        ("weights", models, known["models"]),
        ("solutions", solutions, known["given_solutions"]),
    ):
        difference = "" if here is None else _first_difference(here, there)
        if difference:
            raise ProbeError(
                f"{folder.path} holds a run of another {what} ({difference}); "
                "give another --output, or start over with --fresh"
            )
    return old


def check_inputs(
    folder: RunFolder, record: Mapping[str, object], inputs: Mapping[str, Mapping[str, str]]
) -> None:
    """Check that the files of every model are those that a run was made with.

    Args:
        folder: The run folder.
        record: Its record; those of old runs do not know the files.
        inputs: Digests of each model's files.

    Raises:
        ProbeError: A file has changed, is new or is gone.
    """
    known = record.get("inputs")
    if not isinstance(known, dict):
        return
    changed = []
    for model, files in inputs.items():
        before = known.get(model)
        before = before if isinstance(before, dict) else {}
        for name in dict.fromkeys((*before, *files)):
            if before.get(name) != files.get(name):
                how = "is new" if name not in before else "has changed"
                how = how if name in files else "is gone"
                changed.append(f"{name} of {model} {how}")
    if changed:
        more = f", and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise ProbeError(
            f"{changed[0]} since {folder.path} was begun{more}; put it back, give another "
            "--output, or start over with --fresh"
        )


def check_questions(
    folder: RunFolder, digests: Mapping[str, Mapping[str, str]]
) -> dict[str, dict[str, str]]:
    """Check that questions are those that a run has asked; all that it has asked, with these.

    Args:
        folder: The run folder.
        digests: A digest of each question's text, by benchmark and id.

    Raises:
        ProbeError: The text of one has changed.
    """
    try:
        known = TypeAdapter(dict[str, dict[str, str]]).validate_python(
            folder.read_json(QUESTIONS) or {}
        )
    except (Damaged, ValidationError) as error:
        why = error if isinstance(error, Damaged) else "damaged"
        raise ProbeError(
            f"{folder.path / QUESTIONS}: {why}, so nobody can tell whether questions have changed; "
            "take it away if they have not, or start over with --fresh"
        ) from error
    for benchmark, here in digests.items():
        there = known.get(benchmark, {})
        changed = [name for name, digest in here.items() if there.get(name, digest) != digest]
        if changed:
            more = f", and {len(changed) - 1} more" if len(changed) > 1 else ""
            raise ProbeError(
                f"question {changed[0]} of {benchmark} has changed since {folder.path} was begun"
                f"{more}; put it back, give another --output, or start over with --fresh"
            )
    names = dict.fromkeys((*known, *digests))
    return {name: {**known.get(name, {}), **digests.get(name, {})} for name in names}


def with_earlier_tables(folder: RunFolder, recipe: Recipe) -> Recipe:
    """The recipe with the controls and further tables that its folder has from before, too.

    Raises:
        ProbeError: The folder's record is damaged.
    """
    if not folder.record.exists():
        return recipe
    earlier = recipe_from(folder.read_record().get("recipe"), str(folder.record))
    extra = tuple(dict.fromkeys((*earlier.report.extra, *recipe.report.extra)))
    control = tuple(dict.fromkeys((*earlier.attribution.control, *recipe.attribution.control)))
    return replace(
        recipe,
        report=replace(recipe.report, extra=extra),
        attribution=replace(recipe.attribution, control=control),
    )


def with_earlier_pairs(folder: RunFolder, recipe: Recipe) -> Recipe:
    """The recipe with the pairs that its folder's run has from before, too, and these first.

    Raises:
        ProbeError: The folder's record is damaged.
    """
    if not folder.record.exists():
        return recipe
    earlier = recipe_from(folder.read_record().get("recipe"), str(folder.record))
    pairs = {pair.name: pair for pair in (*earlier.pairs, *recipe.pairs)}
    return replace(recipe, pairs=tuple(pairs.values()))


@contextmanager
def timed(folder: RunFolder, record: dict[str, object], phase: str) -> Iterator[None]:
    """Add a phase's seconds to the record, also those of a phase that was broken off."""
    start = time.monotonic()
    seconds = phase_seconds(record)
    try:
        yield
    finally:
        seconds[phase] = round(seconds.get(phase, 0) + time.monotonic() - start, 3)
        folder.write_json("run.json", record)


def phase_seconds(record: dict[str, object]) -> dict[str, float]:
    """How long each phase has taken, in a run's record."""
    seconds = record["seconds"]
    assert isinstance(seconds, dict)
    return seconds


def _fixed(table: object) -> object:
    """The part of a recipe that decides what comes out."""
    if not isinstance(table, dict):
        return table
    fixed = {}
    for key, value in table.items():
        free = _FREE_KEYS.get(key, ())
        if free is None:
            continue
        if key == "attribution" and not _takes_steps(value.get("method")):
            free = (*free, "ig_steps")
        if key == "pairs":
            value = [_without_servers(pair) for pair in value]
        fixed[key] = {k: v for k, v in value.items() if k not in free} if free else value
    return fixed


def _without_servers(pair: object) -> object:
    """A pair as where its solutions are written here: where does not decide what comes out."""
    files = pair.get("solutions") if isinstance(pair, dict) else None
    if not isinstance(pair, dict) or not isinstance(files, dict):
        return pair
    return {**pair, "solutions": {k: None if is_address(v) else v for k, v in files.items()}}


def _takes_steps(method: object) -> bool:
    """Whether a method's scores depend on the number of steps; one that is not known may."""
    known = METHODS.get(method) if isinstance(method, str) else None
    return known is None or known.steps(2) != known.steps(3)


def _first_difference(here: object, there: object, key: str = "") -> str:
    """Name where two pieces of plain data differ first, or nothing."""
    if isinstance(here, list) and isinstance(there, list) and len(here) == len(there):
        here, there = dict(enumerate(here)), dict(enumerate(there))
    if isinstance(here, dict) and isinstance(there, dict):
        for name in [*here, *(name for name in there if name not in here)]:
            inner = f"{key}.{name}" if key else str(name)
            difference = _first_difference(here.get(name), there.get(name), inner)
            if difference:
                return difference
        return ""
    return "" if here == there else f"{key}: {there} there, {here} here"


def _device_name(device: torch.device, threads: int | None) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({threads or f'up to {torch.get_num_threads()}'} threads)"


def now() -> str:
    """The time, in UTC, as records write it."""
    return datetime.now(UTC).isoformat(timespec="seconds")
