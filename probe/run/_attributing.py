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

from probe.attribution import (
    EdgeScores,
    NoTemperature,
    attribute,
    matched_temperature,
    method_named,
)
from probe.checkpoints import fingerprint
from probe.errors import ProbeError
from probe.models import Model
from probe.recipe import Recipe
from probe.run._choosing import Side
from probe.run._parallel import Event, OnEvent
from probe.run._session import Run, Setup
from probe.store import Damaged, RunFolder, edges_key, temperature_file
from probe.tracing import Target, rule_of


def attribute_all(run: Run, sides: Sequence[Side]) -> None:
    """Score the edges of every side, model by model.

    Sides that are brought to the loss of another one wait for all the others. The largest residual
    error of each model comes into the record.
    """
    references = list(dict.fromkeys(side.model for side in sides))
    errors: dict[str, float] = dict.fromkeys(references, 0.0)
    with run.phase("attribution"):
        for name, part in (
            ("attribution", [side for side in sides if not _waits(side)]),
            ("at a loss", [side for side in sides if _waits(side)]),
        ):
            models = [model for model in references if any(s.model == model for s in part)]
            work = [
                partial(attribute_with, run.setup, model, [s for s in part if s.model == model])
                for model in models
            ]
            if not work:
                continue
            found = run.on_each(work, name, sum(len(side.sequences) for side in part))
            for model, error in zip(models, found, strict=True):
                errors[model] = max(errors[model], error)
        run.record["residual_error"] = errors


def _waits(side: Side) -> bool:
    return side.control is not None and side.control.like is not None


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
    kernels = recipe.compute.kernels
    if kernels == "auto" and "liger" not in method_named(recipe.attribution.method).kernels:
        kernels = "eager"
    model: Model | None = None
    weights = fingerprint(reference)
    error = 0.0
    for side in sides:
        like = _loss_like(folder, side) if _waits(side) else None
        file = folder.edges_file(side.comparison, side.side)
        key = edges_key(weights, _settings(recipe, side, like), side.sequences)
        edges = _read_edges(folder, file, key, on_event)
        if edges is None and (edges := _as_it_is(folder, side, like)):
            folder.write_edges(file, edges, edges.ids, key)
            on_event(Event(len(side.sequences)))
        elif edges is None:
            model = model or setup.load(reference, device, kernels)
            try:
                target = _target(recipe, model, side, folder, like)
            except NoTemperature as mistake:
                # No reason to lose the run. What an earlier one left there is of another loss.
                folder.remove(file)
                text = f"left out: {side.comparison}, {side.side}: {mistake}"
                on_event(Event(len(side.sequences), text=text))
                continue
            try:
                edges = _attribute(recipe, model, side, target, folder, key, on_event)
            except ProbeError as mistake:
                raise ProbeError(f"{side.comparison}, {side.side}: {mistake}") from mistake
        else:
            on_event(Event(len(side.sequences)))
        for part in folder.parts(file):
            folder.remove(part)
        error = max(error, edges.residual_error)
    del model
    gc.collect()
    return error


def _settings(recipe: Recipe, side: Side, like: float | None) -> tuple[str, ...]:
    """What edges depend on beside weights and texts."""
    options = recipe.attribution
    steps = method_named(options.method).steps(options.ig_steps)
    rule = rule_of(steps, zero=options.ablation == "zero")
    points = str(steps) if steps == 1 else f"{steps} {rule}"
    # Nothing of the loss at temperature 1: keys of old runs stay.
    target = Target(_what(recipe, side)).key if like is None else ("at loss", repr(like))
    settings = (options.method, options.granularity, options.ablation, points)
    return (*settings, *target, recipe.compute.dtype)


def _what(recipe: Recipe, side: Side) -> str:
    return (side.control and side.control.target) or recipe.attribution.target


def _loss_like(folder: RunFolder, side: Side) -> float:
    """The mean loss that a side is brought to: that of the other model, or its own where it stays.

    Raises:
        ProbeError: The sides that it depends on are damaged.
    """
    assert side.control is not None
    assert side.control.like is not None
    losses = []
    for name in (side.control.model, side.control.like):
        try:
            edges = folder.read_edges(folder.edges_file(side.comparison, name))
        except Damaged as damage:
            raise ProbeError(f"{side.comparison}, {name}: {damage}; run it again") from damage
        assert edges is not None, "it has just been scored"
        losses.append(float(edges.losses.double().mean()))
    own, other = losses
    return own if side.control.only_if_surer and own >= other else other


def _target(
    recipe: Recipe, model: Model, side: Side, folder: RunFolder, like: float | None
) -> Target:
    """What is differentiated on a side; its temperature is kept, where it has one."""
    what = _what(recipe, side)
    temperature = 1.0
    if like is not None:
        size = recipe.attribution.batch_size
        temperature = matched_temperature(model, side.sequences, like, size)
        _keep_temperature(folder, side, temperature, like)
    return Target(what, temperature)


def _as_it_is(folder: RunFolder, side: Side, like: float | None) -> EdgeScores | None:
    """The edges of a side that keeps the loss of its model: they are there already."""
    if like is None or side.control is None or not side.control.only_if_surer:
        return None
    raw = folder.read_edges(folder.edges_file(side.comparison, side.control.model))
    if raw is None or like != float(raw.losses.double().mean()):
        return None
    _keep_temperature(folder, side, 1.0, like)
    return raw


def _keep_temperature(folder: RunFolder, side: Side, temperature: float, loss: float) -> None:
    table = {"temperature": temperature, "loss": loss}
    folder.write_json(temperature_file(side.comparison, side.side), table)


def _attribute(
    recipe: Recipe,
    model: Model,
    side: Side,
    target: Target,
    folder: RunFolder,
    key: str,
    on_event: OnEvent,
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
        target=target,
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
    return edges


def _read_edges(folder: RunFolder, path: Path, key: str, on_event: OnEvent) -> EdgeScores | None:
    """Edges that an earlier run has left, or None; says so where they are of no use."""
    try:
        return folder.read_edges(path, key)
    except Damaged as damage:
        on_event(Event(text=f"{path}: {damage}; computing it again"))
        return None
