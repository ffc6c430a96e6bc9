"""Attributing: the step in which every edge of every side is scored.

What it computes is in the run folder batch by batch, and what an earlier run has left there is not
computed again.

    >>> attribute_with(setup, "probe:tiny-math/sft", sides, device="cpu", on_event=print)
    0.0
"""

import gc
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from probe.attribution import (
    LEAST_SLOPE,
    SMALLEST_LOSS,
    EdgeScores,
    LossCurves,
    NoTemperature,
    attribute,
    method_named,
)
from probe.checkpoints import fingerprint
from probe.errors import ProbeError
from probe.models import Model
from probe.recipe import Recipe
from probe.run._answering import check_served
from probe.run._choosing import Side
from probe.run._parallel import Event, OnEvent, Unit
from probe.run._session import Run, Setup
from probe.store import Damaged, RunFolder, edges_key
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
            units = [
                Unit(
                    label,
                    sides[0].model,
                    sum(len(side.sequences) for side in sides),
                    partial(attribute_with, run.setup, sides[0].model, sides),
                )
                for label, sides in _together(part, references, apart=run.cluster is not None)
            ]
            if not units:
                continue
            found = run.on_each(units, name)
            for unit, error in zip(units, found, strict=True):
                errors[unit.model] = max(errors[unit.model], error)
        run.note("residual_error", errors)


def _together(
    sides: Sequence[Side], references: Sequence[str], apart: bool
) -> list[tuple[str, list[Side]]]:
    """The sides that are scored by one unit, and its name: those of a model, model by model.

    On a cluster, those of a pair on a benchmark are apart: a base has as many as all checkpoints.
    """
    groups: dict[tuple[str, str], list[Side]] = {}
    for reference in references:
        for side in sides:
            if side.model == reference:
                part = side.comparison.rpartition(".alpha-")[0] if apart else ""
                groups.setdefault((reference, part), []).append(side)
    return [
        (f"{part}, {group[0].side}" if part else reference, group)
        for (reference, part), group in groups.items()
    ]


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
    curves: LossCurves | None = None
    weights = fingerprint(reference)
    scored = _Scored(setup)
    error = 0.0
    for side in sides:
        like = _losses_like(folder, side) if _waits(side) else None
        file = folder.edges_file(side.comparison, side.side)
        key = edges_key(weights, _settings(recipe, side, like), side.sequences)
        edges = _read_edges(folder, file, key, on_event)
        if like is not None and folder.read_temperatures(side.comparison, side.side) is None:
            edges = None  # nobody knows which questions count
        if edges is None:
            if model is None or curves is None:
                model = setup.load(reference, device, kernels)
                curves = LossCurves(model, recipe.attribution.batch_size)
                check_served(setup, model, on_event)
            try:
                target, done = _target(recipe, curves, side, folder, like)
            except NoTemperature as mistake:
                # No reason to lose the run. What an earlier one left there is of another loss.
                folder.remove(file)
                text = f"left out: {side.comparison}, {side.side}: {mistake}"
                on_event(Event(len(side.sequences), text=text))
                continue
            done = scored.again(side) | done
            try:
                edges = _attribute(recipe, model, side, target, folder, key, on_event, done)
            except ProbeError as mistake:
                raise ProbeError(f"{side.comparison}, {side.side}: {mistake}") from mistake
        else:
            on_event(Event(len(side.sequences)))
        for part in folder.parts(file):
            folder.remove(part)
        scored.add(side)
        error = max(error, edges.residual_error)
    del model, curves
    gc.collect()
    return error


class _Scored:
    """What a model has been scored on: pairs that share it share most of their questions."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._places: dict[Hashable, tuple[Side, int]] = {}

    def add(self, side: Side) -> None:
        """Remember where the scores of a side are; its temperatures are in the folder by now."""
        for row, key in enumerate(self._keys(side)):
            self._places.setdefault(key, (side, row))

    def again(self, side: Side) -> dict[int, tuple[int, EdgeScores]]:
        """What of a side is there already, by its place: a row of some edges."""
        found = {
            index: self._places[key]
            for index, key in enumerate(self._keys(side))
            if key in self._places
        }
        owners = {(other.comparison, other.side): other for other, _ in found.values()}
        edges = {
            name: _own_edges(self._setup.folder, other, other.side)
            for name, other in owners.items()
        }
        return {
            index: (row, edges[other.comparison, other.side])
            for index, (other, row) in found.items()
        }

    def _keys(self, side: Side) -> list[Hashable]:
        """What the scores of each sequence depend on, beside the model and the recipe."""
        recipe, folder = self._setup.recipe, self._setup.folder
        texts = [(tuple(text.prompt), tuple(text.answer)) for text in side.sequences]
        # A mean over all of them comes into each one's scores.
        together = () if recipe.attribution.ablation == "zero" else tuple(texts)
        known = folder.read_temperatures(side.comparison, side.side) if _waits(side) else {}
        found = [(known or {}).get(text.id) or 1.0 for text in side.sequences]
        what = _what(recipe, side)
        return [
            (text, temperature, what, together)
            for text, temperature in zip(texts, found, strict=True)
        ]


def _settings(recipe: Recipe, side: Side, like: Sequence[float] | None) -> tuple[str, ...]:
    """What edges depend on beside weights and texts."""
    options = recipe.attribution
    steps, zero = method_named(options.method).steps(options.ig_steps), options.ablation == "zero"
    own_mean = zero and options.ig_steps == "auto"
    rule = rule_of(steps, zero and not own_mean)
    points = str(steps) if steps == 1 else f"{steps} {rule}{' from own mean' * own_mean}"
    # Nothing of the loss at temperature 1: keys of old runs stay.
    target = Target(_what(recipe, side)).key
    if like is not None:
        target += ("at losses", repr(LEAST_SLOPE), *map(repr, like))
    settings = (options.method, options.granularity, options.ablation, points)
    return (*settings, *target, recipe.compute.dtype)


def _what(recipe: Recipe, side: Side) -> str:
    return (side.control and side.control.target) or recipe.attribution.target


def _own_edges(folder: RunFolder, side: Side, model: str) -> EdgeScores:
    """The edges of a model of a comparison on its own answers, as they are.

    Raises:
        ProbeError: They are damaged.
    """
    try:
        edges = folder.read_edges(folder.edges_file(side.comparison, model))
    except Damaged as damage:
        raise ProbeError(f"{side.comparison}, {model}: {damage}; run it again") from damage
    assert edges is not None, "it has just been scored"
    return edges


def _losses_like(folder: RunFolder, side: Side) -> list[float]:
    """The loss that each question is brought to: the other model's, or its own where it stays."""
    assert side.control is not None
    assert side.control.like is not None
    own, other = (
        _own_edges(folder, side, name).losses.double().clamp(min=SMALLEST_LOSS)
        for name in (side.control.model, side.control.like)
    )
    found = own.maximum(other) if side.control.only_if_surer else other
    return [float(loss) for loss in found]


def _target(
    recipe: Recipe,
    curves: LossCurves,
    side: Side,
    folder: RunFolder,
    like: Sequence[float] | None,
) -> tuple[Target, dict[int, tuple[int, EdgeScores]]]:
    """What is differentiated on a side, and what is known already: questions that stay as they are.

    Temperatures are kept, where it has some. A question without one stays as it is, and does not
    count.

    Raises:
        NoTemperature: No question has one.
    """
    what = _what(recipe, side)
    if like is None:
        return Target(what), {}
    assert side.control is not None
    raw = _own_edges(folder, side, side.control.model)
    own = raw.losses.double().clamp(min=SMALLEST_LOSS).tolist()
    moved = [index for index, loss in enumerate(like) if loss != own[index]]
    found: list[float | None] = [1.0] * len(like)
    if moved:
        texts, losses = [side.sequences[i] for i in moved], [like[i] for i in moved]
        matched = curves.temperatures(texts, losses)
        for index, temperature in zip(moved, matched, strict=True):
            found[index] = temperature
    if all(temperature is None for temperature in found):
        raise NoTemperature(f"no temperature gives {side.model} the loss of a question")
    folder.write_temperatures(side.comparison, side.side, [s.id for s in side.sequences], found)
    stay = (index for index, temperature in enumerate(found) if temperature in (None, 1.0))
    return Target(what, [t or 1.0 for t in found]), {index: (index, raw) for index in stay}


def _attribute(
    recipe: Recipe,
    model: Model,
    side: Side,
    target: Target,
    folder: RunFolder,
    key: str,
    on_event: OnEvent,
    done: Mapping[int, tuple[int, EdgeScores]],
) -> EdgeScores:
    """Score one side of a comparison, from where an earlier run has got to, keeping each batch.

    What of it is `done` elsewhere is said by its place: a row of some edges.
    """
    options = recipe.attribution
    path = folder.edges_file(side.comparison, side.side)
    kept = dict(done)
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
