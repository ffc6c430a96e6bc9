"""Choosing: the step from solutions to the sequences that are scored.

>>> sides = select_all(run, solutions)
>>> sides[0].comparison, sides[0].side
('sft-grpo.tiny-math.alpha-0.03', 'before')
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from probe.attribution import TokenSequence
from probe.errors import ProbeError
from probe.recipe import Comparison, Recipe, SelectionOptions
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
    sides: list[Side] = []
    left_out: dict[str, ProbeError] = {}
    with run.phase("selection"):
        comparisons = recipe.comparisons()
        bar = run.bar("selection", len(comparisons))
        for comparison in comparisons:
            pair, benchmark, _ = comparison
            before, after = (solutions[names[asked], benchmark] for asked in pair.asked())
            try:
                selection = _select(before, after, comparison.alpha, recipe.selection)
            except ProbeError as error:
                run.folder.leave_out(comparison.name, str(error))
                left_out[f"pair {pair.name}, benchmark {benchmark}: {error}"] = error
                continue
            run.folder.write_selection(comparison.name, selection)
            old, new = cut(before, selection), cut(after, selection)
            sides += _sides(comparison, old, new, control_sides(recipe.attribution.control))
            bar.advance(1)
        for message, cause in left_out.items():
            if not sides:
                raise ProbeError(message) from cause
            run.say(f"left out: {message}")
    return sides


def _select(
    before: Sequence[Solution], after: Sequence[Solution], alpha: float, options: SelectionOptions
) -> Selection:
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
