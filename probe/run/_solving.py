"""Solving: the step in which each model answers each question, once.

What it computes is in the run folder batch by batch, and what an earlier run has left there is not
computed again.

    >>> solutions = solve_all(run, problems, given={})
    >>> solutions["tiny-math--sft", "tiny-math"][0].correct
    True
"""

import gc
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from functools import partial

from probe.models import Model, read_tokenizer
from probe.problems import Problem
from probe.recipe import Asked
from probe.run._answering import find_served
from probe.run._parallel import Event, OnEvent, Unit
from probe.run._session import Run, Setup
from probe.solutions import GivenAnswer, Served, Solution, ask, cut_off, imported, solve
from probe.store import RunFolder, model_names
from probe.vocabulary import CUT_OFF_SHARE


def solve_all(
    run: Run,
    problems: Mapping[str, Sequence[Problem]],
    given: Mapping[tuple[str, str], Mapping[str, GivenAnswer]],
) -> dict[tuple[str, str], list[Solution]]:
    """Let each model solve each benchmark, once; solutions by file name of model and benchmark."""
    names = model_names(run.recipe)
    # A cluster has room for each benchmark apart; a device has each model on it once.
    parts = [{key: part} for key, part in problems.items()] if run.cluster else [problems]
    owners = [name for name in names.values() for _ in parts]
    units = [
        Unit(
            f"{name} on {', '.join(part)}",
            asked.model,
            sum(map(len, part.values())),
            partial(solve_with, run.setup, asked, name, part, given),
        )
        for asked, name in names.items()
        for part in parts
    ]
    with run.phase("solutions"):
        found = run.on_each(units, "solutions")
        solved = {
            (name, benchmark): solutions
            for name, of_model in zip(owners, found, strict=True)
            for benchmark, solutions in of_model.items()
        }
        # So that a report can tell when some of them are lost.
        counts = {run.folder.solutions_file(*n).name: len(part) for n, part in solved.items()}
        run.note("solved", counts)
    return solved


def solve_with(
    setup: Setup,
    asked: Asked,
    name: str,
    problems: Mapping[str, Sequence[Problem]],
    given: Mapping[tuple[str, str], Mapping[str, GivenAnswer]],
    *,
    device: str,
    on_event: OnEvent,
) -> dict[str, list[Solution]]:
    """Let a model solve each benchmark.

    Args:
        setup: Recipe, run folder and server.
        asked: The model, and how it is asked.
        name: Its name in files.
        problems: The questions, by benchmark.
        given: Answers that it has written already, by name and benchmark.
        device: The device.
        on_event: Called with what happens.

    Returns:
        Its solutions by benchmark, in the order of the questions.
    """
    folder = setup.folder
    solutions: dict[str, list[Solution]] = {}
    writer = _Writer(setup, asked, name, device, on_event)
    for benchmark, questions in problems.items():
        file = folder.solutions_file(name, benchmark)
        done = _solved(folder, name, benchmark, questions, on_event)
        on_event(Event(len(done)))
        if len(done) < len(questions):
            if asked.file is not None:
                tokenizer, answers = read_tokenizer(asked.model), given[name, benchmark]
                batches = imported(tokenizer, questions, asked.prompt, answers, frozenset(done))
            else:
                batches = writer.write(questions, frozenset(done))
            start, tokens = time.monotonic(), 0
            with closing(batches):
                for batch in batches:
                    folder.append_solutions(file, batch)
                    done |= {solution.id: solution for solution in batch}
                    tokens += sum(len(solution.answer) for solution in batch)
                    speed = f"{tokens / (time.monotonic() - start):,.0f} tokens/s"
                    on_event(Event(len(batch), speed=speed))
            folder.write_solutions(file, [done[problem.id] for problem in questions])
        solutions[benchmark] = [done[problem.id] for problem in questions]
        count = 0 if asked.file else cut_off(solutions[benchmark], asked.max_new_tokens)
        if count > CUT_OFF_SHARE * len(questions):
            on_event(
                Event(
                    text=f"{name} on {benchmark}: {count} of {len(questions)} answers did not end "
                    f"within {asked.max_new_tokens} tokens and are graded as they stand; raise "
                    "max_new_tokens, or see `probe doctor` for end tokens and template"
                )
            )
    del writer
    gc.collect()
    return solutions


class _Writer:
    """Writes solutions of one model, here or at a server; either is loaded once it is needed."""

    def __init__(
        self, setup: Setup, asked: Asked, name: str, device: str, on_event: OnEvent
    ) -> None:
        self._setup, self._asked, self._name = setup, asked, name
        self._device, self._on_event = device, on_event
        self._model: Model | None = None
        self._served: Served | None = None

    def write(
        self, questions: Sequence[Problem], done: frozenset[str]
    ) -> Generator[list[Solution], None, None]:
        """Solutions of the questions that are not done, batch by batch."""
        asked, options = self._asked, self._setup.recipe.solutions
        if asked.server is not None:
            self._served = self._served or find_served(
                self._setup, asked, self._name, questions, self._on_event
            )
            return ask(
                self._served,
                questions,
                asked.prompt,
                max_new_tokens=asked.max_new_tokens,
                at_once=options.batch_size,
                done=done,
                say=self._say,
            )
        self._model = self._model or self._setup.load(asked.model, self._device)
        return solve(
            self._model,
            questions,
            asked.prompt,
            max_new_tokens=asked.max_new_tokens,
            stop=asked.stop,
            batch_size=options.batch_size,
            engine=options.engine,
            decoding=options.decoding,
            seed=options.seed,
            done=done,
            say=self._say,
        )

    def _say(self, text: str) -> None:
        self._on_event(Event(text=text))


def _solved(
    folder: RunFolder,
    name: str,
    benchmark: str,
    questions: Sequence[Problem],
    on_event: OnEvent,
) -> dict[str, Solution]:
    """What an earlier run has left, by id; answers to what is not asked any more are put aside."""
    file, aside = folder.solutions_file(name, benchmark), folder.unused_file(name, benchmark)
    gold = {problem.id: problem.answer for problem in questions}
    found, damaged = folder.read_solutions(file)
    known = {s.id: s for s in (*folder.read_solutions(aside)[0], *found)}
    if any(solution.id not in gold for solution in found):
        folder.write_solutions(aside, known.values())
    damaged += sum(gold.get(s.id, s.gold) != s.gold for s in found)
    if damaged:
        on_event(Event(text=f"{file}: {damaged} damaged lines; solving these again"))
    sound = [known[i] for i, answer in gold.items() if i in known and known[i].gold == answer]
    if damaged or sound != found:
        folder.write_solutions(file, sound)
    return {solution.id: solution for solution in sound}
