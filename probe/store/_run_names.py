"""Run names: what models and measurements are called in a run folder.

>>> list(model_names(read_recipe("tiny-math")).values())
['tiny-math--sft', 'tiny-math--grpo', 'tiny-math--dpo']
"""

import hashlib
import itertools
import json
import os
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from probe.errors import ProbeError
from probe.recipe import Asked, Pair, Recipe

if TYPE_CHECKING:
    from probe.attribution import TokenSequence

Text = Literal["before", "after"]
"""Whose answers both models of a pair read."""

TEXTS: tuple[Text, ...] = ("before", "after")


def model_names(recipe: Recipe) -> dict[Asked, str]:
    """A file name for each model as it is asked.

    A model that two pairs ask in the same way has one name, and so is asked once.
    """
    names: dict[Asked, str] = {}
    for pair in recipe.pairs:
        for asked in pair.asked():
            if asked not in names:
                parts = _parts(asked.model)
                name = plain = "--".join(part.strip(".~ ") for part in parts if part.strip(".~ "))
                number = 2
                while name in names.values():
                    name, number = f"{plain}-{number}", number + 1
                names[asked] = name
    whose: dict[str, str] = {}
    for name, choice in itertools.product(names.values(), recipe.benchmarks):
        file = f"{name}.{choice.name}"
        if file in whose:
            raise ProbeError(
                f"{whose[file]} and {name} on benchmark {choice.name!r} would share the file "
                f"{file}; rename a benchmark, or give a model as a folder of another name"
            )
        whose[file] = f"{name} on benchmark {choice.name!r}"
    return names


def _parts(reference: str) -> list[str]:
    """The last two names of a reference: `org`, `model@step_100`."""
    place, revision = reference.removeprefix("probe:"), ""
    if not place.startswith(("/", ".", "~")):  # a revision may have slashes, too
        place, at, behind = place.partition("@")
        revision = at + behind.replace("/", "-")
    # A checkpoint in a trainer's folder is a folder there.
    parts = place.replace("#", "/").rstrip("/").split("/")[-2:]
    return [*parts[:-1], parts[-1] + revision]


LONGEST = 180
"""So many bytes may a name have, as sides, parts and endings come to it; files may have 255."""


def check_names(recipe: Recipe) -> None:
    """Check that every file system can hold and tell apart the files of a new run.

    Raises:
        ProbeError: Names differ in capitals or in the way that accents are written only, or are too
            long.
    """
    benchmarks = [choice.name for choice in recipe.benchmarks]
    pairs = [pair.name for pair in recipe.pairs]
    models = list(model_names(recipe).values())
    comparisons = [f"{pair}.{each}" for pair in pairs for each in benchmarks]
    solutions = [f"{model}.{each}" for model in models for each in benchmarks]
    for kind, names in (("pairs and benchmarks", comparisons), ("models", models + solutions)):
        seen: dict[str, str] = {}
        for name in names:
            size = len(os.fsencode(name))
            if size > LONGEST:
                raise ProbeError(
                    f"{kind}: the files {name[:40]}... would have names of over {size} bytes, and "
                    f"{LONGEST} are the most; give shorter names"
                )
            same = unicodedata.normalize("NFC", name).casefold()
            other = seen.setdefault(same, name)
            if other != name:
                raise ProbeError(
                    f"{kind}: the files {other} and {name} are one to file systems that do not "
                    "tell capitals apart; rename one"
                )


def first_names(recipe: Recipe) -> dict[str, str]:
    """The first of the names that `model_names` gives each model."""
    names: dict[str, str] = {}
    for asked, name in model_names(recipe).items():
        names.setdefault(asked.model, name)
    return names


def faithfulness_file(model: str) -> str:
    """Where in the run folder the exact effects of a model's edges are, by its first name."""
    return f"faithfulness/{model}.json"


def causal_file(pair: Pair, benchmark: str) -> str:
    """Where in the run folder the causal test of a pair on a benchmark is."""
    return f"causal/{pair.name}.{benchmark}.json"


def edges_key(model: str, settings: Sequence[str], sequences: "Sequence[TokenSequence]") -> str:
    """A short name for all that a set of edges depends on: weights, settings, every token."""
    parts = [model, list(settings), [[s.id, list(s.prompt), list(s.answer)] for s in sequences]]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def states_file(pair: Pair, benchmark: str, text: Text) -> str:
    """Where in the run folder the comparison of both models on one's answers is."""
    return f"extras/{pair.name}.{benchmark}.on-{text}.json"


def temperature_file(comparison: str, side: str) -> str:
    """Where in the run folder the temperature of a control's side is."""
    return f"extras/{comparison}.{side}.json"


def tokens_file(pair: Pair, benchmark: str, side: Text) -> str:
    """Where in the run folder the scores of a model are token by token."""
    return f"extras/{pair.name}.{benchmark}.tokens-{side}.json"


def weights_file(pair: Pair) -> str:
    """Where in the run folder the change of each matrix is."""
    return f"extras/{pair.name}.weights.json"
