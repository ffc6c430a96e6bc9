"""Circuits of a finished run: which edges carry each model's answers, and how faithfully.

>>> found = run_circuits("runs/tiny-math")
>>> found["tiny-math--sft"][0].cpr
0.93
"""

import gc
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from rich.console import Console

from probe.attribution import EdgeScores, ScoredEdge, TokenSequence, attribute, method_named
from probe.causes import Circuit, Curve, Leaves, faithfulness_curves, halves, sizes_of
from probe.checkpoints import fingerprint
from probe.errors import check_count
from probe.escaping import PlainConsole
from probe.models import Model
from probe.recipe import Recipe
from probe.report import draw_curves, draw_strongest
from probe.run._choosing import Side, measured_sides, read_sides
from probe.run._finished import check_unchanged, recorded
from probe.run._session import Run, recipe_host, running, said_on
from probe.store import SCHEMA, Damaged, RunFolder, edges_key, locked, run_path
from probe.vocabulary import Granularity

METHODS = ("eap", "eap-ig", "relp", "exact")


def run_circuits(
    run: str | Path,
    *,
    methods: str | Sequence[str] | None = None,
    granularity: Granularity | None = None,
    ablation: Leaves = "mean",
    n_random: int = 10,
    greedy: bool = False,
    questions: int = 100,
    edges: int = 20,
    seed: int = 42,
    remote: str | None = None,
    console: Console | None = None,
) -> dict[str, tuple[Curve, ...]]:
    """Measure the circuits of every model of a run, into its folder.

    Edges are ranked on one half of a model's questions, and its circuits are run on the other.
    Models that are measured already stay: a measurement that was stopped goes on from there.

    Args:
        run: A run folder with solutions and selections.
        methods: One or several names in `probe.attribution.METHODS`; `METHODS` of this module if
            not given.
        granularity: That of the edges; the recipe's if not given.
        ablation: What is left of a removed output; see `intervene`.
        n_random: How many random circuits of each size stand beside.
        greedy: Whether circuits grow from the logits back.
        questions: How many questions are used, both halves together, at most.
        edges: How many of the strongest edges are kept in the file by name.
        seed: Seed of the halves and of random circuits.
        remote: The server that runs it; as the recipe has it, where not given.
        console: Where progress goes; standard error if not given.

    Returns:
        The curves of each model by its name in the run folder.

    Raises:
        ProbeError: No run folder, a run that has not got so far, an unknown method, a model that
            has changed since the run.
    """
    names = _checked(methods, {"n_random": n_random, "edges": edges, "questions": questions})
    options = Options(names, granularity, ablation, n_random, greedy, questions, edges, seed)
    folder = RunFolder(run_path(run))
    recipe, record = recorded(folder, remote)
    check_unchanged(folder, recipe, record)
    console = console or PlainConsole(stderr=True)
    found: dict[str, tuple[Curve, ...]] = {}
    sides, host = read_sides(recipe, folder), recipe_host(recipe, console)
    with (
        locked(folder, said_on(console)) as held,
        running(recipe, held, record, host, console) as session,
    ):
        held.open()
        for number, (name, side) in enumerate(measured_sides(recipe, sides).items()):
            device = session.devices[number % len(session.devices)]
            found[name] = _measured(session, side, name, device, options)
            gc.collect()
    return found


@dataclass(frozen=True)
class Options:
    """What is asked of the circuits."""

    methods: tuple[str, ...]
    """What ranks the edges."""

    granularity: Granularity | None
    """That of the edges; None for the recipe's."""

    ablation: Leaves
    """What is left of a removed output."""

    n_random: int
    """How many random circuits of each size stand beside."""

    greedy: bool
    """Whether circuits grow from the logits back."""

    questions: int
    """How many questions are used, both halves together, at most."""

    edges: int
    """How many of the strongest edges are kept in the file by name."""

    seed: int
    """Seed of the halves and of random circuits."""


def _measured(run: Run, side: Side, name: str, device: str, options: Options) -> tuple[Curve, ...]:
    """The curves of one model, measured or from before, with its file and its picture."""
    recipe, folder, file = run.recipe, run.folder, f"circuits/{name}.json"
    ranked, held_out = halves(side.sequences[: options.questions], options.seed)
    level = options.granularity or recipe.attribution.granularity
    scoring = (str(recipe.attribution.ig_steps), recipe.compute.dtype)
    settings = ("circuits", level, *map(str, asdict(options).values()), *scoring)
    key = edges_key(fingerprint(side.model), settings, [*ranked, *held_out])
    curves = _known(run, file, key)
    if curves is None:
        model = run.load(side.model, device)
        n_sizes = len(sizes_of(int(model.graph(level).mask.sum())))
        rows = len(held_out) * n_sizes * (2 * len(options.methods) + options.n_random)
        scores = _scored(model, ranked, options.methods, level, recipe, options.ablation)
        curves = faithfulness_curves(
            model,
            held_out,
            scores,
            ablation=options.ablation,
            n_random=options.n_random,
            greedy=options.greedy,
            seed=options.seed,
            progress=run.bar(f"circuits of {name}", rows).advance,
        )
        table = [asdict(curve) | _shown(scores[curve.method], options.edges) for curve in curves]
        header = _header(side, ranked, held_out, options) | {"key": key}
        folder.write_json(file, header | {"curves": table})
    draw = partial(draw_curves, model=name, curves=curves, questions=len(held_out))
    folder.write((folder.path / file).with_suffix(".png"), draw)
    _draw_best(folder, file, name, curves)
    return curves


def _draw_best(folder: RunFolder, file: str, name: str, curves: Sequence[Curve]) -> None:
    """Draw the strongest edges by the method whose circuits are the most faithful."""
    best = max(range(len(curves)), key=lambda place: curves[place].cpr)
    table = folder.read_json(file) or {}
    edges = TypeAdapter(list[_Edges]).validate_python(table.get("curves"))[best].top_edges
    draw = partial(draw_strongest, model=name, method=curves[best].method, edges=edges)
    folder.write((folder.path / file).with_suffix(".edges.png"), draw)


@dataclass(frozen=True)
class _Edges:
    """What a file has of the edges of a method."""

    top_edges: list[ScoredEdge]
    """The strongest."""


def _known(run: Run, file: str, key: str) -> tuple[Curve, ...] | None:
    """The curves in a file, if they are those that are asked for."""
    try:
        table = run.folder.read_json(file)
        if table is None or table.get("key") != key:
            return None
        return TypeAdapter(tuple[Curve, ...]).validate_python(table.get("curves"))
    except (Damaged, ValidationError):
        run.say(f"{run.folder.path / file}: damaged; computing it again")
        return None


def _checked(methods: str | Sequence[str] | None, counts: Mapping[str, object]) -> tuple[str, ...]:
    """The names of the methods, once each, if they are known and these are counts."""
    names = (methods,) if isinstance(methods, str) else tuple(dict.fromkeys(methods or METHODS))
    for name in names:
        method_named(name)
    for what, value in counts.items():
        check_count(what, value)
    return names


def _scored(
    model: Model,
    sequences: Sequence[TokenSequence],
    methods: Sequence[str],
    granularity: Granularity,
    recipe: Recipe,
    ablation: Leaves,
) -> dict[str, EdgeScores]:
    """The scores that rank the edges, by method."""
    score = partial(
        attribute,
        model,
        sequences,
        granularity=granularity,
        batch_size=recipe.attribution.batch_size,
        ablation="zero" if ablation == "zero" else "mean",
        ig_steps=recipe.attribution.ig_steps,
    )
    return {method: score(method=method) for method in methods}


def _shown(scores: EdgeScores, edges: int) -> dict[str, object]:
    """What the file says of the strongest edges."""
    top = Circuit.top(scores, edges)
    named = [edge._asdict() for edge in top.top_edges(edges)]
    return {"top_edges": named, "pruned": len(top.pruned()), "nodes": top.nodes}


def _header(
    side: Side,
    ranked: Sequence[TokenSequence],
    held_out: Sequence[TokenSequence],
    options: Options,
) -> dict[str, object]:
    return {
        "schema": SCHEMA,
        "model": side.model,
        "cell": f"{side.comparison}.{side.side}",
        "ranked_on": [sequence.id for sequence in ranked],
        "measured_on": [sequence.id for sequence in held_out],
        "ablation": options.ablation,
        "n_random": options.n_random,
        "greedy": options.greedy,
        "seed": options.seed,
    }
