"""Choosing: the step from solutions to the sequences that are scored.

>>> sides = select_all(run, solutions)
>>> sides[0].comparison, sides[0].side
('sft-grpo.tiny-math.alpha-0.03', 'before')
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from probe.attribution import TokenSequence
from probe.errors import ProbeError
from probe.recipe import Comparison, Recipe, recipe_from, trainings_of
from probe.run._session import Run
from probe.solutions import Selection, Solution, select
from probe.stats import ControlSide, control_sides, texts_of
from probe.store import RunFolder, first_names, model_names


class Side(NamedTuple):
    """One model of one comparison, to be attributed."""

    model: str
    """Its reference."""

    comparison: str
    """The comparison's name."""

    side: str
    """`before` or `after`, each model on its own answers; or the name of a control's side."""

    sequences: Sequence[TokenSequence]
    """What is scored: each prompt with its cut answer."""

    control: ControlSide | None = None
    """What is held fixed in it; None of a model on its own answers, as they are."""


def select_all(run: Run, solutions: Mapping[tuple[str, str], Sequence[Solution]]) -> list[Side]:
    """Select the questions of each comparison, and cut the answers.

    A comparison without any question is left out; where all are, that is an error.
    """
    recipe, names = run.recipe, model_names(run.recipe)
    answers = {
        each.name: [solutions[names[asked], each.benchmark] for asked in each.pair.asked()]
        for each in recipe.comparisons()
    }
    sides: list[Side] = []
    left_out: dict[str, ProbeError] = {}
    found: dict[str, Selection] = {}
    with run.phase("selection"):
        for comparison in recipe.comparisons():
            try:
                found[comparison.name] = _select(
                    recipe, comparison.alpha, *answers[comparison.name]
                )
            except ProbeError as error:
                run.folder.leave_out(comparison.name, str(error))
                pair, benchmark, _ = comparison
                left_out[f"pair {pair.name}, benchmark {benchmark}: {error}"] = error
        found |= _along_trainings(run, answers, found)
        bar = run.bar("selection", len(answers))
        for comparison in recipe.comparisons():
            if comparison.name not in found:
                continue
            selection = found[comparison.name]
            run.folder.write_selection(comparison.name, selection)
            old, new = (cut(side, selection) for side in answers[comparison.name])
            sides += _sides(comparison, old, new, control_sides(recipe.attribution.control))
            bar.advance(1)
        for message, cause in left_out.items():
            if not sides:
                raise ProbeError(message) from cause
            run.say(f"left out: {message}")
    return sides


def _along_trainings(
    run: Run, answers: Mapping[str, Sequence[Sequence[Solution]]], alone: Mapping[str, Selection]
) -> dict[str, Selection]:
    """The selections of checkpoints that are compared on the same questions.

    Those that are scored at once have one set. Where some were scored by an earlier command, as
    when a training is watched, the questions of the first one stay, and a later checkpoint has
    those of them that it solves. What has none of these is compared on its own.

    Args:
        run: The run; its record has the pairs of earlier commands, too.
        answers: The solutions before and after, by the comparison's name.
        alone: What each comparison would be on its own, of those that can be compared.
    """
    whole = recipe_from(run.record["recipe"], str(run.folder.record))
    added = [pair.name for pair in whole.pairs]
    found: dict[str, Selection] = {}
    for (name, benchmark, alpha), steps in trainings_of(whole.comparisons()).items():
        here = [one.name for _, one in steps if one.name in alone]
        there = [one for _, one in steps if one.name not in answers]
        there.sort(key=lambda one: added.index(one.pair.name))
        first = next(filter(None, (run.folder.read_selection(one.name) for one in there)), None)
        if first is None and len(here) > 1:
            before, afters = answers[here[0]][0], [answers[one][1] for one in here]
            try:
                together = _select(run.recipe, alpha, before, *afters)
            except ProbeError as error:
                run.say(
                    f"training {name}, benchmark {benchmark}: {error}, so each checkpoint is "
                    "compared on questions of its own"
                )
                continue
            found |= dict.fromkeys(here, together)
        elif first is not None:
            for one in here:
                try:
                    found[one] = _select(run.recipe, alpha, *answers[one], within=first)
                except ProbeError as error:
                    run.say(f"{one}: {error}, so it is compared on questions of its own")
    return found


def _select(
    recipe: Recipe,
    alpha: float,
    before: Sequence[Solution],
    after: Sequence[Solution],
    *others: Sequence[Solution],
    within: Selection | None = None,
) -> Selection:
    options = recipe.selection
    return select(
        before,
        after,
        alpha,
        options.beta,
        options.gamma,
        options.delta,
        options.samples,
        options.seed,
        options.convention,
        others=others,
        within=within,
    )


def _sides(
    comparison: Comparison,
    before: Sequence[TokenSequence],
    after: Sequence[TokenSequence],
    controls: Sequence[ControlSide] = (),
) -> list[Side]:
    """Both models on their own answers, and what controls need beside."""
    pair, name = comparison.pair, comparison.name
    sides = [Side(pair.before, name, "before", before), Side(pair.after, name, "after", after)]
    own = {"before": before, "after": after}
    models = {"before": pair.before, "after": pair.after}
    for control in controls:
        texts = texts_of(control, own[control.model], own[control.text])
        sides.append(Side(models[control.model], name, control.name, texts, control))
    return sides


def cut(solutions: Sequence[Solution], selection: Selection) -> list[TokenSequence]:
    """The sequences of a selection: each prompt with the part of its answer that is scored."""
    by_id = {solution.id: solution for solution in solutions}
    return [
        TokenSequence(by_id[name].prompt, by_id[name].answer[: selection.cut_length], name)
        for name in selection.ids
    ]


def measured_on(recipe: Recipe) -> list[Comparison]:
    """The comparisons that models may be measured on, of the largest alpha; the first one first."""
    alpha = max(recipe.selection.alpha)
    return [
        Comparison(pair, choice.name, alpha)
        for choice in recipe.benchmarks
        for pair in recipe.pairs
    ]


def measured_sides(recipe: Recipe, sides: Sequence[Side]) -> dict[str, Side]:
    """What each model is measured on, by its first name: the first of the comparisons above.

    A model of which no question was chosen is none of them.
    """
    order = [comparison.name for comparison in measured_on(recipe)]
    found = {}
    for reference, name in first_names(recipe).items():
        own = [side for side in sides if side.model == reference and side.comparison in order]
        if own:
            found[name] = min(own, key=lambda side: order.index(side.comparison))
    return found


def read_sides(recipe: Recipe, folder: RunFolder) -> list[Side]:
    """What models may be measured on, from the run folder alone; nothing of what was left out.

    Raises:
        ProbeError: The run has not got so far.
    """
    names = model_names(recipe)
    sides: list[Side] = []
    for comparison in measured_on(recipe):
        if folder.left_out(comparison.name):
            continue
        selection = folder.read_selection(comparison.name)
        found: list[list[TokenSequence]] = []
        for asked in comparison.pair.asked():
            path = folder.solutions_file(names[asked], comparison.benchmark)
            solutions, _ = folder.read_solutions(path)
            if selection is None or not {s.id for s in solutions} >= set(selection.ids):
                raise ProbeError(
                    f"{folder.path} has no whole selection or solutions of {comparison.name}; go "
                    f"on with its recipe first: probe recipe ... --output {folder.path}"
                )
            found.append(cut(solutions, selection))
        before, after = found
        sides += _sides(comparison, before, after)
    return sides
