"""Faithfulness: what the fast methods say of some edges, beside what these edges really do.

A fast method scores all edges from gradients; the exact effect of an edge is what the loss gains
when that edge is removed, one forward pass each. So a sample of edges is drawn, a third each from
the strongest, the middle and the rest, and every method is compared on it. In strata, because
nearly all edges are weak: a plain draw would hardly hold one that matters.

    >>> for row in run_faithfulness("runs/tiny-math", edges=400):
    ...     print(row.model, row.method, row.spearman.value)
"""

import gc
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from rich.progress import Progress

from probe.agreement import Agreement, MeasuredEdge, Stratum, compare_all
from probe.attribution import ablation_means, attribute, exact_effects
from probe.checkpoints import fingerprint
from probe.checks import check_methods
from probe.concurrency import in_flight
from probe.edges import Edge
from probe.errors import ProbeError
from probe.escaping import PlainConsole
from probe.models import Model, cpu_threads, resolve_devices
from probe.parallel import places_for
from probe.phases import Side, load_there
from probe.recipe import (
    AttributionOptions,
    Recipe,
    read_recipe,
    recipe_files,
    recipe_from,
    recipe_table,
)
from probe.record import timed
from probe.remote import Host
from probe.report import build_report
from probe.run import (
    cut,
    progress_bar,
    recipe_host,
    run_recipe,
    told_of_jobs,
)
from probe.run_folder import (
    SCHEMA,
    Damaged,
    RunFolder,
    cell_name,
    edges_key,
    faithfulness_file,
    first_names,
    model_names,
    run_path,
)
from probe.scatter import draw_scatter
from probe.sequences import TokenSequence

EDGES = 400


class DrawnEdge(NamedTuple):
    """One edge of the sample."""

    edge: Edge
    """Which."""

    stratum: Stratum
    """From which part of the ranking."""


def draw_edges(
    scores: torch.Tensor, mask: torch.Tensor, count: int, seed: int
) -> tuple[DrawnEdge, ...]:
    """Draw real edges of all sequences together, none twice, a third from each stratum.

    `top` are the strongest by |score|; `middle` is drawn from the middle third of the ranking;
    `random` from all that is left, and it makes up for what the middle third cannot give.

    Args:
        scores: [sequence, source, target].
        mask: The real edges, [source, target].
        count: How many to draw; all of them where there are fewer.
        seed: Seed of the draw.
    """
    places = mask.expand(scores.shape).nonzero()
    strengths = scores[tuple(places.T)].abs()
    ranking: list[int] = torch.argsort(strengths, descending=True, stable=True).tolist()
    real = len(ranking)
    count = min(count, real)
    generator = random.Random(seed)

    top = ranking[: -(-count // 3)]
    middle = ranking[max(len(top), real // 3) : real - real // 3]
    middle = generator.sample(middle, min((count + 1) // 3, len(middle)))
    taken = {*top, *middle}
    rest = [place for place in ranking if place not in taken]
    rest = generator.sample(rest, count - len(taken))
    strata: dict[Stratum, list[int]] = {"top": top, "middle": middle, "random": rest}
    return tuple(
        DrawnEdge(Edge(*places[place].tolist()), stratum)
        for stratum, drawn in strata.items()
        for place in drawn
    )


def measure(
    model: Model,
    sequences: Sequence[TokenSequence],
    methods: Sequence[str],
    edges: int = EDGES,
    seed: int = 42,
    options: AttributionOptions | None = None,
    batch_size: int = 32,
    known: Mapping[tuple[str, str, str], float] | None = None,
    progress: Callable[[list[MeasuredEdge], int], None] | None = None,
) -> list[MeasuredEdge]:
    """Score a sample of edges by each method, and compute what they really do.

    Args:
        model: A model from `load_model`.
        sequences: What to measure on.
        methods: Names in `probe.attribution.METHODS`; the first one's scores make the strata.
        edges: How many edges to draw.
        seed: Seed of the draw.
        options: Granularity, ablation, steps and batch size of the methods; their defaults if
            not given.
        batch_size: How many edges run at once where the exact effects are computed.
        known: Exact effects from before, by sequence, source and target.
        progress: Called with the sample so far and the number of exact effects that have come to
            it: first with those that were known, then after each batch.
    """
    options = options or AttributionOptions()
    granularity, ablation = options.granularity, options.ablation
    names = [sequence.id or str(place) for place, sequence in enumerate(sequences)]
    found = {
        method: attribute(
            model,
            sequences,
            method,
            granularity,
            options.batch_size,
            ablation=ablation,
            ig_steps=options.ig_steps,
        )
        for method in methods
    }
    strata, graph = found[methods[0]].scores, found[methods[0]].graph
    sample = draw_edges(strata, graph.mask, edges, seed)
    drawn = [edge for edge, _ in sample]
    rows = []
    for edge, stratum in sample:
        name = names[edge.sequence], graph.sources[edge.source], graph.targets[edge.target]
        scores = {method: float(found[method].scores[edge]) for method in methods}
        rows.append(MeasuredEdge(*name, stratum, scores, (known or {}).get(name)))
    if progress:
        progress(rows, sum(row.exact is not None for row in rows))

    # Sequence by sequence, so that a batch holds next to no filling. The batches do not depend on
    # what is known: a run that was stopped between two of them ends in the same numbers.
    order = sorted(range(len(rows)), key=lambda place: drawn[place])
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    batches = [[place for place in batch if rows[place].exact is None] for batch in batches]
    batches = [batch for batch in batches if batch]
    baseline = ablation_means(model, sequences if batches else [], graph, ablation, batch_size)
    exact = partial(
        exact_effects,
        model,
        sequences,
        granularity=granularity,
        batch_size=batch_size,
        ablation=ablation,
        baseline=baseline,
    )
    calls = (partial(exact, [drawn[place] for place in batch]) for batch in batches)
    for batch, effects in zip(batches, in_flight(calls, model.jobs), strict=True):
        for place, effect in zip(batch, effects.tolist(), strict=True):
            rows[place] = replace(rows[place], exact=effect)
        if progress:
            progress(rows, len(batch))
    return rows


def run_faithfulness(
    run: str | Path,
    *,
    edges: int | None = None,
    methods: Sequence[str] | None = None,
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
        methods: Names in `probe.attribution.METHODS`; the first one's scores make the strata.
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
        record = folder.read_record()
        recipe = recipe_from(record["recipe"], str(folder.record))
    else:
        try:
            recipe = read_recipe(run)
        except ProbeError as error:
            raise error if is_recipe else ProbeError(f"no run folder {run}, and {error}") from error
    given = {
        "edges": (recipe.faithfulness.edges or EDGES) if edges is None else edges,
        "methods": None if methods is None else list(dict.fromkeys(methods)),
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

    if record["models"] != {model: fingerprint(model) for model in recipe.models()}:
        raise ProbeError(
            f"the weights of a model have changed since {folder.path} was made; start over: "
            f"probe recipe ... --output {folder.path} --fresh"
        )
    places = places_for(recipe.models(), resolve_devices(recipe.compute.device_here))
    sides = _read_sides(recipe, folder)
    host = recipe_host(recipe, console)
    folder.open()
    with (
        progress_bar(console) as progress,
        timed(folder, record, "faithfulness"),
        cpu_threads(recipe.compute.threads),
        told_of_jobs(host, record, progress),
    ):
        measure_models(recipe, sides, folder, places, progress, host)
    report = build_report(folder.path)
    folder.write_json("report.json", report.table)
    return report.faithfulness


def measure_models(
    recipe: Recipe,
    sides: Sequence[Side],
    folder: RunFolder,
    places: Sequence[str],
    progress: Progress,
    host: Host | None = None,
) -> None:
    """Measure every model of a run into its folder, from where an earlier run has got to.

    A model's sequences are those of the largest alpha of its first pair, on the first benchmark.
    """
    total = recipe.faithfulness.edges * len(recipe.models())
    task = progress.add_task("faithfulness", total=total)
    for number, (reference, name) in enumerate(first_names(recipe).items()):
        side = next(
            s for cell in _cells(recipe) for s in sides if (s.cell, s.model) == (cell, reference)
        )
        edges = _measure_side(
            recipe,
            side,
            name,
            folder,
            places[number % len(places)],
            host,
            lambda new: progress.update(task, advance=new),
            progress.console.print,
        )
        total += edges - recipe.faithfulness.edges  # where a model has fewer than that
        progress.update(task, total=total)
        gc.collect()


def _cells(recipe: Recipe) -> list[str]:
    """The cell of each pair that its models may be measured on."""
    alpha = max(recipe.selection.alpha)
    return [cell_name(pair, recipe.benchmarks[0].name, alpha) for pair in recipe.pairs]


def _read_sides(recipe: Recipe, folder: RunFolder) -> list[Side]:
    """What models may be measured on, from the run folder alone."""
    names = model_names(recipe)
    sides = []
    for pair, cell in zip(recipe.pairs, _cells(recipe), strict=True):
        for side, asked in zip(("before", "after"), pair.asked(), strict=True):
            path = folder.solutions_file(names[asked], recipe.benchmarks[0].name)
            solutions, _ = folder.read_solutions(path)
            selection = folder.read_selection(cell)
            if selection is None or not {s.id for s in solutions} >= set(selection.ids):
                raise ProbeError(
                    f"{folder.path} has no whole selection or solutions of {cell}; go on with its "
                    f"recipe first: probe recipe ... --output {folder.path}"
                )
            sides.append(Side(asked.model, cell, side, cut(solutions, selection)))
    return sides


def _with(recipe: Recipe, where: str, **changes: Mapping[str, object]) -> Recipe:
    """A recipe with some keys changed, and checked again; None is no change."""
    table = recipe_table(recipe)
    for section, values in changes.items():
        old = table[section]
        assert isinstance(old, dict)
        table[section] = old | {k: v for k, v in values.items() if v is not None}
    return recipe_from(table, where)


def _rows(table: Mapping[str, object], header: Mapping[str, object]) -> list[MeasuredEdge]:
    """The edges in a file, if they belong to this model and these sequences."""
    if table.get("key") != header["key"]:
        raise Damaged("computed from other solutions or settings")
    try:
        return TypeAdapter(list[MeasuredEdge]).validate_python(table.get("sample"))
    except ValidationError as error:
        raise Damaged("damaged (not a sample of edges)") from error


def _measure_side(
    recipe: Recipe,
    side: Side,
    name: str,
    folder: RunFolder,
    place: str,
    host: Host | None,
    advance: Callable[[int], None],
    say: Callable[[str], None],
) -> int:
    """Measure one model; how many edges there were."""
    options = recipe.faithfulness
    scoring, precision = recipe.attribution, recipe.compute.dtype
    settings = ("exact", scoring.granularity, scoring.ablation, precision)
    sequences = side.sequences[: options.sequences]
    file = faithfulness_file(name)
    picture = (folder.path / file).with_suffix(".png")
    header: dict[str, object] = {
        "schema": SCHEMA,
        "model": side.model,
        "cell": f"{side.cell}.{side.side}",
        "key": edges_key(fingerprint(side.model), settings, sequences),
        **{key: value for key, value in asdict(options).items() if key != "batch_size"},
        "methods": list(options.methods),
        "ig_steps": scoring.ig_steps,
    }
    finished, rows = False, []
    try:
        old = folder.read_json(file)
        if old is not None:
            rows = _rows(old, header)
            finished = "agreement" in old and all(old.get(key) == header[key] for key in header)
    except Damaged as damage:
        say(f"{folder.path / file}: {damage}; computing it again")
    if finished and picture.exists():
        advance(len(rows))
        return len(rows)

    def keep(sample: list[MeasuredEdge], new: int) -> None:
        folder.write_json(file, header | {"sample": [asdict(row) for row in sample]})
        advance(new)

    known = {(r.sequence, r.source, r.target): r.exact for r in rows if r.exact is not None}
    model = load_there(recipe, side.model, place, host)
    try:
        rows = measure(
            model,
            sequences,
            options.methods,
            options.edges,
            options.seed,
            scoring,
            options.batch_size,
            known,
            keep,
        )
    except ProbeError as error:
        raise ProbeError(f"{name}, {header['cell']}: {error}") from error
    found = compare_all(name, rows)
    table = header | {"sample": [asdict(row) for row in rows]}
    folder.write_json(file, table | {"agreement": [agreement.table for agreement in found]})
    draw_scatter(picture, rows, found, len(sequences))
    return len(rows)
