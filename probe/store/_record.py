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

import probe
from probe.checkpoints import fingerprint
from probe.errors import ProbeError
from probe.models import resolve_devices
from probe.recipe import Recipe, recipe_from, recipe_table
from probe.store._run_folder import SCHEMA, RunFolder

# Keys of a recipe that do not change what comes out, only how fast or how it is shown.
_FREE_KEYS = {
    "description": None,
    "compute": ("device", "threads", "kernels", "remote", "jobs", "timeout"),
    "solutions": ("questions", "batch_size", "engine"),
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
) -> dict[str, object]:
    """Open the folder for this recipe and write who is running what.

    Args:
        folder: The run folder.
        recipe: The recipe.
        fresh: Whether to start over.
        given: What is known of solutions that were generated elsewhere, by the model's name.

    Raises:
        ProbeError: The folder holds a run of something else.
    """
    solutions = {name: dict(table) for name, table in (given or {}).items()}
    table = recipe_table(recipe)
    models = {model: fingerprint(model) for model in recipe.models()}
    times: object = {}
    digests: object = True
    if folder.record.exists() and not fresh:
        old = check_goes_on(folder, recipe, models, solutions)
        times, digests = old.get("seconds", {}), old.get("digests", False)
    folder.open(fresh)
    record: dict[str, object] = {
        "schema": SCHEMA,
        "digests": digests,
        "recipe": table,
        "models": models,
        "given_solutions": solutions,
        "versions": {
            "probe": probe.__version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "nnsight")},
        },
        "devices": [recipe.compute.remote]
        if recipe.compute.remote
        else [
            _device_name(device, recipe.compute.threads)
            for device in resolve_devices(recipe.compute.device)
        ],
        "started": now(),
        "seconds": times,
        "finished": None,
    }
    folder.write_json("run.json", record)
    return record


def check_goes_on(
    folder: RunFolder,
    recipe: Recipe,
    models: Mapping[str, str] | None,
    solutions: Mapping[str, Mapping[str, str | int]] | None = None,
) -> dict[str, object]:
    """Check that a folder's run can go on with this recipe; what it has recorded.

    Args:
        folder: The run folder.
        recipe: The recipe.
        models: Fingerprint of each model; None where they are not here.
        solutions: What is known of solutions made elsewhere; None where that is not known yet.

    Raises:
        ProbeError: The folder holds a run of something else.
    """
    old = folder.read_record()
    # Keys that have come since stand at their defaults, which are what was done before.
    earlier = recipe_table(recipe_from(old.get("recipe"), str(folder.record)))
    for what, here, there in (
        ("recipe", _fixed(recipe_table(recipe)), _fixed(earlier)),
        ("weights", models, old.get("models")),
        ("solutions", solutions, old.get("given_solutions")),
    ):
        difference = "" if here is None else _first_difference(here, there)
        if difference:
            raise ProbeError(
                f"{folder.path} holds a run of another {what} ({difference}); "
                "give another --output, or start over with --fresh"
            )
    return old


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
        fixed[key] = {k: v for k, v in value.items() if k not in free} if free else value
    return fixed


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
