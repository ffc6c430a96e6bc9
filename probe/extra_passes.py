"""Extra passes: what the tables of `probe.extras` need beyond a run's edges.

`states` lets both models of a pair read the same answers, those of the largest alpha, first the one
model's and then the other's; `weights` compares the checkpoints' files. What comes out stands in
the run folder under `extras`, with what it was computed from, and is computed once.

    >>> measure_weights(recipe, RunFolder(Path("runs/tiny-math")), progress)
"""

import gc
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.progress import Progress

from probe.checkpoints import fingerprint
from probe.errors import ProbeError
from probe.models import Model, cpu_threads, load_model
from probe.recipe import Recipe
from probe.run_folder import Damaged, RunFolder, cell_name
from probe.run_names import TEXTS, edges_key, states_file, weights_file
from probe.states import compare_states
from probe.weights import weight_changes

if TYPE_CHECKING:
    from probe.phases import Side


def measure_states(
    recipe: Recipe,
    sides: Sequence["Side"],
    folder: RunFolder,
    places: Sequence[str],
    progress: Progress,
) -> None:
    """Compare the states of every pair on every benchmark; what is there already stays."""
    alpha = max(recipe.selection.alpha)
    texts = {(side.cell, side.side): side.sequences for side in sides}
    total = sum(
        len(texts[cell_name(pair, choice.name, alpha), text])
        for pair in recipe.pairs
        for choice in recipe.benchmarks
        for text in TEXTS
    )
    task = progress.add_task("states", total=total)
    for pair in recipe.pairs:
        models: tuple[Model, Model] | None = None
        weights = " ".join(map(fingerprint, (pair.before, pair.after)))
        for choice in recipe.benchmarks:
            for text in TEXTS:
                name = states_file(pair, choice.name, text)
                sequences = texts[cell_name(pair, choice.name, alpha), text]
                key = edges_key(weights, ("states", recipe.compute.dtype), sequences)
                if _is_there(folder, name, key, progress):
                    progress.update(task, advance=len(sequences))
                    continue
                dtype, threads = recipe.compute.dtype, recipe.compute.threads
                models = models or (
                    load_model(pair.before, places[0], dtype, threads=threads),
                    load_model(pair.after, places[-1], dtype, threads=threads),
                )
                with cpu_threads(models[0].threads):
                    found = compare_states(
                        *models,
                        sequences,
                        recipe.attribution.batch_size,
                        lambda count: progress.update(task, advance=count),
                    )
                ids = [sequence.id for sequence in sequences]
                folder.write_json(name, {"key": key, "ids": ids, **asdict(found)})
        del models
        gc.collect()


def measure_weights(recipe: Recipe, folder: RunFolder, progress: Progress) -> None:
    """Compare the weights of every pair; what is there already stays.

    A pair whose files cannot be compared is said, and left out.
    """
    task = progress.add_task("weights", total=len(recipe.pairs))
    for pair in recipe.pairs:
        name = weights_file(pair)
        key = " ".join(map(fingerprint, (pair.before, pair.after)))
        if not _is_there(folder, name, key, progress):
            try:
                changes = weight_changes(pair.before, pair.after)
                folder.write_json(name, {"key": key, "matrices": [asdict(c) for c in changes]})
            except ProbeError as error:
                progress.console.print(f"{name}: {error}")
        progress.update(task, advance=1)


def _is_there(folder: RunFolder, name: str, key: str, progress: Progress) -> bool:
    try:
        table = folder.read_json(name)
    except Damaged as damage:
        progress.console.print(f"{name}: {damage}; computing it again")
        return False
    return table is not None and table.get("key") == key
