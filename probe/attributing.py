"""Attributing: the step in which every edge of every side is scored.

What it computes is in the run folder batch by batch, and what an earlier run has left there is not
computed again.

    >>> attribute_with(setup, "probe:tiny-math/sft", sides, device="cpu", on_event=print)
    0.0
"""

import gc
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from probe.attribution import attribute
from probe.checkpoints import fingerprint
from probe.choosing import Side
from probe.edges import EdgeScores
from probe.errors import ProbeError
from probe.integration import RULE
from probe.methods import method_named
from probe.models import Model
from probe.parallel import Event, OnEvent
from probe.recipe import Recipe
from probe.run_folder import Damaged, RunFolder
from probe.run_names import edges_key
from probe.session import Run, Setup
from probe.targets import Target


def attribute_all(run: Run, sides: Sequence[Side]) -> None:
    """Score the edges of every side, model by model.

    The largest residual error of each model comes into the record.
    """
    references = list(dict.fromkeys(side.model for side in sides))
    work = [
        partial(attribute_with, run.setup, model, [side for side in sides if side.model == model])
        for model in references
    ]
    total = sum(len(side.sequences) for side in sides)
    with run.phase("attribution"):
        errors = run.on_each(work, "attribution", total)
        run.record["residual_error"] = dict(zip(references, errors, strict=True))


def attribute_with(
    setup: Setup,
    reference: str,
    sides: Sequence[Side],
    *,
    device: str,
    on_event: OnEvent,
) -> float:
    """Score the edges of a model in every comparison.

    Args:
        setup: Recipe, run folder and server.
        reference: The model.
        sides: What is scored.
        device: The device.
        on_event: Called with what happens.

    Returns:
        Its largest residual error.
    """
    recipe, folder = setup.recipe, setup.folder
    options = recipe.attribution
    method = method_named(options.method)
    steps = method.steps(options.ig_steps)
    points = str(steps) if steps == 1 else f"{steps} {RULE}"
    target = Target(options.target).key  # nothing of the loss: keys of old runs stay
    settings = (options.method, options.granularity, options.ablation, points, *target)
    kernels = recipe.compute.kernels
    if kernels == "auto" and "liger" not in method.kernels:
        kernels = "eager"
    model: Model | None = None
    weights = fingerprint(reference)
    error = 0.0
    for side in sides:
        file = folder.edges_file(side.comparison, side.side)
        key = edges_key(weights, (*settings, recipe.compute.dtype), side.sequences)
        edges = _read_edges(folder, file, key, on_event)
        if edges is None:
            model = model or setup.load(reference, device, kernels)
            try:
                edges = _attribute(recipe, model, side, folder, key, on_event)
            except ProbeError as mistake:
                raise ProbeError(f"{side.comparison}, {side.side}: {mistake}") from mistake
        else:
            on_event(Event(len(side.sequences)))
        error = max(error, edges.residual_error)
    del model
    gc.collect()
    return error


def _attribute(
    recipe: Recipe, model: Model, side: Side, folder: RunFolder, key: str, on_event: OnEvent
) -> EdgeScores:
    """Score one side of a comparison, from where an earlier run has got to, keeping each batch."""
    options = recipe.attribution
    path = folder.edges_file(side.comparison, side.side)
    kept: dict[int, tuple[int, EdgeScores]] = {}
    for file in folder.parts(path):
        edges = _read_edges(folder, file, key, on_event)
        if edges is not None:
            for row, name in enumerate(edges.ids):
                kept[int(name)] = row, edges
    on_event(Event(len(kept)))

    def keep(indices: list[int], edges: EdgeScores) -> None:
        folder.write_part(path, edges, indices, key)
        on_event(Event(len(indices)))

    edges = attribute(
        model,
        side.sequences,
        options.method,
        options.granularity,
        options.batch_size,
        ablation=options.ablation,
        ig_steps=options.ig_steps,
        target=options.target,
        done=kept,
        finished=keep,
    )
    error = edges.residual_error
    for index, (row, part) in kept.items():
        edges.scores[index], edges.losses[index] = part.scores[row], part.losses[row]
        edges.entropies[index], edges.values[index] = part.entropies[row], part.values[row]
        if edges.gaps is not None and part.gaps is not None:
            edges.gaps[index] = part.gaps[row]
        error = max(error, part.residual_error)
    edges = replace(edges, residual_error=error)
    folder.write_edges(path, edges, [s.id for s in side.sequences], key)
    for file in folder.parts(path):
        file.unlink()
    return edges


def _read_edges(folder: RunFolder, path: Path, key: str, on_event: OnEvent) -> EdgeScores | None:
    """Edges that an earlier run has left, or None; says so where they are of no use."""
    try:
        return folder.read_edges(path, key)
    except Damaged as damage:
        on_event(Event(text=f"{path}: {damage}; computing it again"))
        return None
