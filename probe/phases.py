"""The two long phases, for one model: its solutions, and its edges.

Each is one function of plain data that keeps what it computes in the run folder batch by batch,
finds there what an earlier run has left, and can run in a process of its own.

    >>> attribute_with(recipe, "probe:tiny-math/sft", sides, path, place="cpu", tell=print)
    0.0
"""

import gc
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from probe.answer_files import GivenAnswer
from probe.attribution import attribute, method_named
from probe.checkpoints import fingerprint
from probe.edges import EdgeScores
from probe.errors import ProbeError
from probe.hosting import load_hosted
from probe.imported import imported
from probe.models import Model, load_model, read_tokenizer
from probe.parallel import Tell, Told
from probe.problems import Problem
from probe.recipe import Asked, Recipe
from probe.remote import Host
from probe.run_folder import Damaged, RunFolder, edges_key
from probe.selection import Solution
from probe.sequences import TokenSequence
from probe.solutions import solve
from probe.vocabulary import Kernels


class Side(NamedTuple):
    """One model of one cell, to be attributed."""

    model: str
    """Its reference."""

    cell: str
    """The cell's name."""

    side: str
    """`before` or `after`; with the cross-text control also `before-on-after` and
    `after-on-before`: which model on whose answers."""

    sequences: list[TokenSequence]
    """What is scored: each prompt with its cut answer."""


def load_there(
    recipe: Recipe, reference: str, device: str, host: Host | None, kernels: Kernels = "eager"
) -> Model:
    """A model where the recipe runs it: on the server if there is one, or on a device here."""
    if host is not None:
        return load_hosted(reference, host, recipe.compute.dtype)
    options = recipe.compute
    return load_model(reference, device, options.dtype, kernels, options.threads)


def solve_with(
    recipe: Recipe,
    asked: Asked,
    name: str,
    problems: Mapping[str, Sequence[Problem]],
    given: Mapping[tuple[str, str], Mapping[str, GivenAnswer]],
    path: Path,
    *,
    place: str,
    tell: Tell,
    host: Host | None = None,
) -> dict[str, list[Solution]]:
    """Let a model solve each benchmark.

    Args:
        recipe: The recipe.
        asked: The model, and how it is asked.
        name: Its name in files.
        problems: The questions, by benchmark.
        given: Answers that it has written already, by name and benchmark.
        path: The run folder.
        place: The device.
        tell: Called with what there is to say.
        host: The server that runs the model, if one does.

    Returns:
        Its solutions by benchmark, in the order of the questions.
    """
    folder = RunFolder(path)
    options = recipe.solutions
    solutions: dict[str, list[Solution]] = {}
    model: Model | None = None
    for benchmark, questions in problems.items():
        file = folder.solutions_file(name, benchmark)
        gold = {problem.id: problem.answer for problem in questions}
        found, damaged = folder.read_solutions(file)
        aside = folder.unused_file(name, benchmark)
        known = {s.id: s for s in (*folder.read_solutions(aside)[0], *found)}
        if any(solution.id not in gold for solution in found):
            folder.write_solutions(aside, known.values())
        damaged += sum(gold.get(s.id, s.gold) != s.gold for s in found)
        if damaged:
            tell(Told(text=f"{file}: {damaged} damaged lines; solving these again"))
        sound = [known[i] for i, answer in gold.items() if i in known and known[i].gold == answer]
        if damaged or sound != found:
            folder.write_solutions(file, sound)
        done = {solution.id: solution for solution in sound}
        tell(Told(len(done)))
        if len(done) < len(questions):
            if asked.given is not None:
                tokenizer, answers = read_tokenizer(asked.model), given[name, benchmark]
                batches = imported(tokenizer, questions, asked.prompt, answers, frozenset(done))
            else:
                if model is None:
                    model = load_there(recipe, asked.model, place, host)
                batches = solve(
                    model,
                    questions,
                    asked.prompt,
                    max_new_tokens=asked.max_new_tokens,
                    stop=asked.stop,
                    batch_size=options.batch_size,
                    engine=options.engine,
                    decoding=options.decoding,
                    seed=options.seed,
                    done=frozenset(done),
                    say=lambda text: tell(Told(text=text)),
                )
            start, tokens = time.monotonic(), 0
            with closing(batches):
                for batch in batches:
                    folder.append_solutions(file, batch)
                    done |= {solution.id: solution for solution in batch}
                    tokens += sum(len(solution.answer) for solution in batch)
                    speed = f"{tokens / (time.monotonic() - start):,.0f} tokens/s"
                    tell(Told(len(batch), speed=speed))
            folder.write_solutions(file, [done[problem.id] for problem in questions])
        solutions[benchmark] = [done[problem.id] for problem in questions]
    del model
    gc.collect()
    return solutions


def attribute_with(
    recipe: Recipe,
    reference: str,
    sides: Sequence[Side],
    path: Path,
    *,
    place: str,
    tell: Tell,
    host: Host | None = None,
) -> float:
    """Score the edges of a model in every cell.

    Args:
        recipe: The recipe.
        reference: The model.
        sides: What is scored.
        path: The run folder.
        place: The device.
        tell: Called with what there is to say.
        host: The server that runs the model, if one does.

    Returns:
        Its largest residual error.
    """
    folder = RunFolder(path)
    options = recipe.attribution
    method = method_named(options.method)
    steps = method.steps(options.ig_steps)
    settings = (options.method, options.granularity, options.ablation, str(steps))
    kernels = recipe.compute.kernels
    if kernels == "auto" and "liger" not in method.kernels:
        kernels = "eager"
    model: Model | None = None
    weights = fingerprint(reference)
    error = 0.0
    for side in sides:
        file = folder.edges_file(side.cell, side.side)
        key = edges_key(weights, (*settings, recipe.compute.dtype), side.sequences)
        edges = _read_edges(folder, file, key, tell)
        if edges is None:
            model = model or load_there(recipe, reference, place, host, kernels)
            try:
                edges = _attribute(recipe, model, side, folder, key, tell)
            except ProbeError as mistake:
                raise ProbeError(f"{side.cell}, {side.side}: {mistake}") from mistake
        else:
            tell(Told(len(side.sequences)))
        error = max(error, edges.residual_error)
    del model
    gc.collect()
    return error


def _attribute(
    recipe: Recipe, model: Model, side: Side, folder: RunFolder, key: str, tell: Tell
) -> EdgeScores:
    """Score one side of a cell, from where an earlier run has got to, keeping each batch."""
    options = recipe.attribution
    path = folder.edges_file(side.cell, side.side)
    kept: dict[int, tuple[int, EdgeScores]] = {}
    for file in folder.parts(path):
        edges = _read_edges(folder, file, key, tell)
        if edges is not None:
            for row, name in enumerate(edges.ids):
                kept[int(name)] = row, edges
    tell(Told(len(kept)))

    def keep(places: list[int], edges: EdgeScores) -> None:
        folder.write_part(path, edges, places, key)
        tell(Told(len(places)))

    edges = attribute(
        model,
        side.sequences,
        options.method,
        options.granularity,
        options.batch_size,
        ablation=options.ablation,
        ig_steps=options.ig_steps,
        done=kept,
        finished=keep,
    )
    error = edges.residual_error
    for place, (row, part) in kept.items():
        edges.scores[place], edges.losses[place] = part.scores[row], part.losses[row]
        edges.entropies[place] = part.entropies[row]
        error = max(error, part.residual_error)
    edges = replace(edges, residual_error=error)
    folder.write_edges(path, edges, [s.id for s in side.sequences], key)
    for file in folder.parts(path):
        file.unlink()
    return edges


def _read_edges(folder: RunFolder, path: Path, key: str, tell: Tell) -> EdgeScores | None:
    """Edges that an earlier run has left, or None; says so where they are of no use."""
    try:
        return folder.read_edges(path, key)
    except Damaged as damage:
        tell(Told(text=f"{path}: {damage}; computing it again"))
        return None
