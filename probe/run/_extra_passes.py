"""Extra passes: what the tables of `probe.report` need beyond a run's edges.

`states` lets both models of a pair read the same answers, those of the largest alpha, first the one
model's and then the other's; `weights` compares the checkpoints' files, or the models where an
adapter is to be merged first; `tokens` scores each model's own answers position by position. What
comes out stands in the run folder under `extras`, with what it was computed from, and is computed
once.

    >>> PASSES["weights"](run, sides)
"""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict

from probe.attribution import PositionScores, compare_states, each_by_position
from probe.checkpoints import (
    WeightChange,
    fingerprint,
    has_plain_weights,
    tensor_changes,
    weight_changes,
)
from probe.errors import ProbeError
from probe.models import Model, cpu_threads, load_model
from probe.recipe import Comparison, Pair
from probe.run._choosing import Side
from probe.run._session import Run
from probe.store import TEXTS, Damaged, edges_key, states_file, tokens_file, weights_file


def measure_states(run: Run, sides: Sequence[Side]) -> None:
    """Compare the states of every pair on every benchmark; what is there already stays."""
    recipe, folder = run.recipe, run.folder
    if not recipe.selection.alpha:
        return
    alpha = max(recipe.selection.alpha)
    answers = {(side.comparison, side.side): side.sequences for side in sides}
    # A comparison that was left out has none.
    texts = {
        (pair.name, choice.name, text): answers.get(
            (Comparison(pair, choice.name, alpha).name, text), ()
        )
        for pair in recipe.pairs
        for choice in recipe.benchmarks
        for text in TEXTS
    }
    with run.phase("states"):
        bar = run.bar("states", sum(map(len, texts.values())))
        for pair in recipe.pairs:
            models: tuple[Model, Model] | None = None
            weights = " ".join(map(fingerprint, (pair.before, pair.after)))
            for choice in recipe.benchmarks:
                for text in TEXTS:
                    name = states_file(pair, choice.name, text)
                    sequences = texts[pair.name, choice.name, text]
                    if not sequences:
                        continue
                    key = edges_key(weights, ("states", recipe.compute.dtype), sequences)
                    if _is_there(run, name, key):
                        bar.advance(len(sequences))
                        continue
                    models = models or (
                        run.load(pair.before, run.devices[0]),
                        run.load(pair.after, run.devices[-1]),
                    )
                    size = recipe.attribution.batch_size
                    with cpu_threads(models[0].threads):
                        found = compare_states(*models, sequences, size, bar.advance)
                    ids = [sequence.id for sequence in sequences]
                    folder.write_json(name, {"key": key, "ids": ids, **asdict(found)})
            del models
            gc.collect()


def measure_weights(run: Run, sides: Sequence[Side]) -> None:
    """Compare the weights of every pair; what is there already stays.

    A pair whose files cannot be compared is said, and left out.
    """
    del sides
    with run.phase("weights"):
        bar = run.bar("weights", len(run.recipe.pairs))
        for pair in run.recipe.pairs:
            name = weights_file(pair)
            key = " ".join(map(fingerprint, (pair.before, pair.after)))
            if not _is_there(run, name, key):
                try:
                    found = [asdict(change) for change in _moved(run, pair)]
                except ProbeError as error:
                    run.say(f"{name}: {error}")
                else:
                    run.folder.write_json(name, {"key": key, "matrices": found})
            bar.advance(1)


def _moved(run: Run, pair: Pair) -> list[WeightChange]:
    """How far each matrix of a pair moved: from the files, or where these are not all, in memory.

    An adapter is merged into its base, as everywhere in the run, and in the run's precision.
    """
    references = pair.before, pair.after
    if all(map(has_plain_weights, references)):
        return weight_changes(*references)
    dtype = run.recipe.compute.dtype
    before, after = (
        dict(load_model(each, dtype=dtype).network._module.named_parameters())
        for each in references
    )
    return tensor_changes(before, after)


def measure_tokens(run: Run, sides: Sequence[Side]) -> None:
    """Score both models of every pair position by position; what is there already stays.

    A side that cannot be is said, and left out.
    """
    recipe = run.recipe
    alpha = max(recipe.selection.alpha, default=0.0)
    answers = {(side.comparison, side.side): side for side in sides}
    places = [
        (tokens_file(pair, choice.name, side), answers[name, side])
        for pair in recipe.pairs
        for choice in recipe.benchmarks
        for side in TEXTS
        if (name := Comparison(pair, choice.name, alpha).name, side) in answers
    ]
    with run.phase("tokens"):
        bar = run.bar("tokens", sum(len(side.sequences) for _, side in places))
        for reference in dict.fromkeys(side.model for _, side in places):
            model: Model | None = None
            for name, side in places:
                if side.model != reference:
                    continue
                how = recipe.attribution
                options = (how.method, how.granularity, how.ablation, how.ig_steps, how.target)
                settings = ("tokens", recipe.compute.dtype, *map(str, options))
                key = edges_key(fingerprint(reference), settings, side.sequences)
                if _is_there(run, name, key):
                    bar.advance(len(side.sequences))
                    continue
                model = model or run.load(reference, run.devices[0])
                rows = []
                try:
                    with cpu_threads(model.threads):
                        for found in each_by_position(model, side.sequences, *options):
                            rows.append(_placed(model, found))
                            bar.advance(1)
                except ProbeError as error:
                    run.say(f"{name}: {error}")
                    continue
                run.folder.write_json(name, {"key": key, "questions": rows})
            del model
            gc.collect()


def _placed(model: Model, found: PositionScores) -> dict[str, object]:
    """What is kept of a text: at each position, the sum of scores, and the share of all |score|."""
    return {
        "id": found.sequence.id,
        "prompt": len(found.sequence.prompt),
        "tokens": [_piece(model, token) for token in found.tokens],
        "scores": [float(f"{score:.7g}") for score in found.scores.double().sum((1, 2)).tolist()],
        "shares": [float(f"{share:.4g}") for share in found.shares.tolist()],
    }


def _piece(model: Model, token: int) -> str:
    """A token as it stands in a text; some tokenizers take the space before a first word away."""
    text = str(model.tokenizer.decode([token]))
    spaced = str(model.tokenizer.convert_ids_to_tokens(token)).startswith("\u2581")
    return f" {text}" if spaced and not text.startswith(" ") else text


PASSES: Mapping[str, Callable[[Run, Sequence[Side]], None]] = {
    "states": measure_states,
    "weights": measure_weights,
    "tokens": measure_tokens,
}
"""What measures each thing that an extra `needs`; the one place to add one."""


def _is_there(run: Run, name: str, key: str) -> bool:
    try:
        table = run.folder.read_json(name)
    except Damaged as damage:
        run.say(f"{name}: {damage}; computing it again")
        return False
    return table is not None and table.get("key") == key
