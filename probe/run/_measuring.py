"""Measuring: the step that compares fast scores with the exact effects of some edges.

>>> measure_models(run, sides)  # into runs/tiny-math/faithfulness
"""

import gc
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from pydantic import TypeAdapter, ValidationError

from probe.checkpoints import fingerprint
from probe.errors import ProbeError
from probe.report import draw_scatter
from probe.run._choosing import Side, measured_sides
from probe.run._faithfulness import measure
from probe.run._session import Bar, Run
from probe.stats import MeasuredEdge, compare_all
from probe.store import SCHEMA, Damaged, edges_key, faithfulness_file, first_names
from probe.tracing import Target


def measure_models(run: Run, sides: Sequence[Side]) -> None:
    """Measure every model of a run into its folder, from where an earlier run has got to.

    A model's sequences are those of the largest alpha of its first pair on the first benchmark, as
    far as they were not left out; a model without any is said, and left out as well.
    """
    recipe = run.recipe
    total = recipe.faithfulness.edges * len(recipe.models())
    measured = measured_sides(recipe, sides)
    with run.phase("faithfulness"):
        bar = run.bar("faithfulness", total)
        for number, name in enumerate(first_names(recipe).values()):
            if name not in measured:
                run.say(f"faithfulness of {name}: left out, as no question of it was chosen")
                total -= recipe.faithfulness.edges
                bar.resize(total)
                continue
            edges = _measure_side(
                run, measured[name], name, run.devices[number % len(run.devices)], bar
            )
            total += edges - recipe.faithfulness.edges  # where a model has fewer than that
            bar.resize(total)
            gc.collect()


def _rows(table: Mapping[str, object], header: Mapping[str, object]) -> list[MeasuredEdge]:
    """The edges in a file, if they belong to this model and these sequences."""
    if table.get("key") != header["key"]:
        raise Damaged("computed from other solutions or settings")
    try:
        return TypeAdapter(list[MeasuredEdge]).validate_python(table.get("sample"))
    except ValidationError as error:
        raise Damaged("damaged (not a sample of edges)") from error


def _measure_side(run: Run, side: Side, name: str, device: str, bar: Bar) -> int:
    """Measure one model; how many edges there were."""
    recipe, folder = run.recipe, run.folder
    options = recipe.faithfulness
    scoring, precision = recipe.attribution, recipe.compute.dtype
    target = Target(scoring.target).key  # nothing of the loss: keys of old samples stay
    settings = ("exact", scoring.granularity, scoring.ablation, *target, precision)
    sequences = side.sequences[: options.sequences]
    file = faithfulness_file(name)
    picture = (folder.path / file).with_suffix(".png")
    header: dict[str, object] = {
        "schema": SCHEMA,
        "model": side.model,
        "cell": f"{side.comparison}.{side.side}",
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
        run.say(f"{folder.path / file}: {damage}; computing it again")
    if finished and picture.exists():
        bar.advance(len(rows))
        return len(rows)

    def keep(sample: list[MeasuredEdge], new: int) -> None:
        folder.write_json(file, header | {"sample": [asdict(row) for row in sample]})
        bar.advance(new)

    known = {(r.sequence, r.source, r.target): r.exact for r in rows if r.exact is not None}
    model = run.load(side.model, device)
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
    folder.write(picture, lambda place: draw_scatter(place, rows, found, len(sequences)))
    return len(rows)
