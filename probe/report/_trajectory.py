"""The tables of a training: each checkpoint, and which way each metric moves along them."""

import re
from collections.abc import Iterator, Sequence

import numpy as np

from probe.attribution import EdgeScores
from probe.checkpoints import total_change
from probe.metrics import METRICS, TOKEN_METRICS, Array
from probe.recipe import Comparison, Recipe, trainings_of
from probe.report._extra_rows import Case, Row, divergence_rows, edges_of, moved_matrices
from probe.stats import compare_circuits
from probe.stats._statistics import defined, flip_all, t_interval, units_of
from probe.stats._trajectory import question_slopes
from probe.store import Missing, RunFolder, model_names

TITLE = "Along the training"
NOTE = (
    "Slope: of log(after / before) on the log of the step, question by question, over the "
    "questions that all checkpoints have in common; 0: no drift. From low to high: 95 % t "
    "interval; p: flips of the signs of questions, not corrected for how many rows there are. "
    "Spearman: of steps and mean logs, a description, as a few checkpoints are no sample. "
    "Text: each checkpoint on its own answers, or all on those of the base (with the cross-text "
    "control). One training is one sample: this is about other questions, not about other "
    "trainings."
)
COLUMNS = (
    *("benchmark", "training", "alpha", "text", "metric"),
    *("slope", "low", "high", "p", "Spearman", "questions", "checkpoints"),
)

CHECKPOINTS = "Every checkpoint"
CHECKPOINTS_NOTE = (
    "Accuracy over all questions; the rest over the scored ones, which all checkpoints share where "
    "there are such. Each model on its own answers: loss and token entropy in nats a token, and "
    "what became of the intensity; on base text: the same where both read the base's answers "
    "(with the cross-text control). KL(checkpoint || base) of the next token on the base's "
    "answers, in nats, mean over tokens and then questions, with a 95 % t interval (with the "
    "table token-kl). Moved: norm of the change of all matrices beside theirs (with the table "
    "weights). Overlap: Jaccard index of the strongest tenth of edges, with the base and with the "
    "checkpoint before it, over the questions that they share. Step 0 is the base, on the "
    "first checkpoint's questions."
)
CHECKPOINT_COLUMNS = (
    *("benchmark", "training", "alpha", "step", "accuracy", "loss", "token entropy"),
    *("intensity %", "on base text %", "KL", "KL low", "KL high", "moved"),
    *("overlap base", "overlap previous", "questions"),
)

SEEDS = "Across seeds"
SEEDS_NOTE = (
    "Trainings whose names differ by -seed-N alone are one training from several seeds, and each "
    "gives one slope. From low to high: 95 % t interval of their mean, over seeds. Drift: whether "
    "it lies apart from 0, not corrected for how many rows there are; of fewer than five seeds "
    "there is no verdict."
)
SEED_COLUMNS = (
    *("benchmark", "training", "alpha", "text", "metric"),
    *("seeds", "slope", "low", "high", "least", "most", "drift"),
)
ENOUGH_SEEDS = 5
"""From so many seeds on there is a verdict."""

TABLES = (CHECKPOINTS, TITLE, SEEDS)
"""The titles of all tables of trainings, in their order."""

_SEED = re.compile(r"(.+)-seed-(\d{1,18})")
_TEXTS = (("own", "after"), ("of the base", "after-on-before"))
_LEAST = 3
"""Checkpoints, and questions, below which there is no slope."""


def trajectory_rows(folder: RunFolder, recipe: Recipe) -> list[Row]:
    """The slopes of every training of a recipe, as far as its checkpoints are scored."""
    rows: list[Row] = []
    for (name, benchmark, alpha), training in trainings(recipe).items():
        cases = [(step, Case(folder, recipe, one)) for step, one in training]
        for text, side in _TEXTS:
            here = [
                (step, case)
                for step, case in cases
                if step > 0 and folder.edges_file(case.name, side).exists()
            ]
            if len(here) >= _LEAST:
                rows += [(benchmark, name, alpha, text, *row) for row in _slopes(here, side)]
    return rows


def trainings(recipe: Recipe) -> dict[tuple[str, str, float], list[tuple[int, Comparison]]]:
    """Steps and comparisons of each training of a recipe, benchmark by benchmark."""
    return trainings_of(recipe.comparisons(by="benchmark"))


def seed_rows(slopes: Sequence[Row]) -> list[Row]:
    """A row of each metric of each training that was run from several seeds.

    Args:
        slopes: The rows of `trajectory_rows`.
    """
    found: dict[tuple[str | float | None, ...], list[float]] = {}
    for benchmark, name, alpha, text, metric, slope, *_ in slopes:
        if (named := _SEED.fullmatch(str(name))) and isinstance(slope, float):
            found.setdefault((benchmark, named[1], alpha, text, metric), []).append(slope)
    rows: list[Row] = []
    for where, of_seeds in found.items():
        values = np.array(of_seeds)
        if len(values) < 2:
            continue
        low, high = t_interval(values) or (None, None)
        verdict = f"{len(values)} of {ENOUGH_SEEDS} seeds"
        if len(values) >= ENOUGH_SEEDS and low is not None and high is not None:
            verdict = "up" if low > 0 else "down" if high < 0 else "no sign"
        ends = float(values.min()), float(values.max())
        rows.append((*where, len(values), float(values.mean()), low, high, *ends, verdict))
    return rows


def _slopes(cases: Sequence[tuple[int, Case]], side: str) -> Iterator[Row]:
    """A row of each metric that is compared by ratios."""
    try:
        scored = [case.sides("before", side) for _, case in cases]
    except Missing:  # the report itself says which edges are not there
        return
    shared = [q for q in scored[0][0].ids if all(q in before.ids for before, _ in scored)]
    if len(shared) < _LEAST:
        return
    places = [[list(before.ids).index(q) for q in shared] for before, _ in scored]
    entries = [(edges_of(before), edges_of(after)) for before, after in scored]
    units = units_of(cases[0][1].clusters(shared), len(shared))
    for metric in (METRICS | TOKEN_METRICS).values():
        estimand = metric.estimand
        if estimand is None or estimand.form != "ratio":
            continue
        pairs: list[tuple[Array, Array]] = [
            (before.parts(estimand.values)[rows], after.parts(estimand.values)[rows])
            for (before, after), rows in zip(entries, places, strict=True)
        ]
        known = np.all([defined("ratio", *pair) for pair in pairs], axis=0)
        if known.sum() < _LEAST:
            continue
        logs = np.stack([np.log(after[known] / before[known]) for before, after in pairs])
        slopes = question_slopes(logs, [step for step, _ in cases])
        (p_value,) = flip_all([(slopes, units[known])])
        low, high = t_interval(slopes, units[known]) or (None, None)
        counts = int(known.sum()), len(cases)
        rank = _spearman([step for step, _ in cases], logs.mean(1))
        yield (estimand.label, float(slopes.mean()), low, high, p_value, rank, *counts)


def _spearman(steps: Sequence[int], values: Array) -> float | None:
    """Rank correlation; None where all values are alike."""
    from scipy.stats import spearmanr

    return float(spearmanr(steps, values).statistic) if np.ptp(values) else None


def checkpoint_rows(folder: RunFolder, recipe: Recipe) -> list[Row]:
    """A row of each checkpoint of each training, and one of its base, in the order of steps."""
    rows: list[Row] = []
    for (name, benchmark, alpha), training in trainings(recipe).items():
        last: EdgeScores | None = None
        for step, one in training:
            case = Case(folder, recipe, one)
            try:
                before, after = case.sides("before", "after")
            except Missing:  # the report itself says which edges are not there
                continue
            where = (benchmark, name, alpha)
            if last is None:
                state = _state(case, 0, before)
                rows.append((*where, 0, *state, *[None] * 8, len(before)))
            change = _intensity(before, after)
            beside = None if last is None else _overlap(last, after)
            overlaps = _overlap(before, after), beside
            apart = _on_base_text(case), *_divergence(case), _moved(case)
            state = _state(case, 1, after)
            rows.append((*where, step, *state, change, *apart, *overlaps, len(after)))
            last = after
    return rows


def _on_base_text(case: Case) -> float | None:
    """The change of the intensity where the checkpoint reads the base's answers, in percent."""
    try:
        return _intensity(*case.sides("before", "after-on-before"))
    except Missing:  # nobody asked for the control
        return None


def _divergence(case: Case) -> Row:
    """How far the checkpoint's next token is from the base's, on the base's answers; its ends."""
    try:
        (row,) = divergence_rows(case)
    except Missing:  # nobody asked for it
        return (None, None, None)
    return row[:3]


def _moved(case: Case) -> float | None:
    """How far the weights are from the base's, beside their norm."""
    try:
        return total_change(moved_matrices(case))
    except Missing:  # nobody asked for it
        return None


def _state(case: Case, side: int, edges: EdgeScores) -> tuple[float | None, float, float]:
    """Accuracy, loss and token entropy of one model of a comparison."""
    pair, benchmark = case.comparison.pair, case.comparison.benchmark
    try:
        name = model_names(case.recipe)[pair.asked()[side]]
        solved = [one.correct for one in case.folder.read_whole(name, benchmark)]
    except Missing:
        solved = []
    accuracy = float(np.mean(solved)) if solved else None
    return accuracy, float(edges.losses.double().mean()), float(edges.entropies.double().mean())


def _intensity(before: EdgeScores, after: EdgeScores) -> float | None:
    """The change of the intensity, in percent: the mean of log ratios, question by question."""
    estimand = METRICS["activation_intensity"].estimand
    assert estimand is not None
    old, new = (edges_of(side).parts(estimand.values) for side in (before, after))
    known = defined("ratio", old, new)
    return 100 * float(np.expm1(np.log(new[known] / old[known]).mean())) if known.any() else None


def _overlap(before: EdgeScores, after: EdgeScores) -> float | None:
    """How much of their strongest edges two models share, on the questions of both."""
    shared = [name for name in before.ids if name in set(after.ids)]
    if not shared:
        return None
    one, other = before[shared], after[shared]
    return compare_circuits(one.scores, other.scores, one.graph).models.edges
