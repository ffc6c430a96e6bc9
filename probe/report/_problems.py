"""Problems: every question with both models' answers, and what is known of its edges.

The page's panel, `probe problems` and `OpenRun.compared` are all made of these records.

    >>> flipped = [one for one in compared_problems(report) if one.solved in ("before", "after")]
    >>> flipped[0].text_before, flipped[0].text_after
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, Literal, NamedTuple, cast

import numpy as np

from probe.attribution import EdgeScores
from probe.errors import ProbeError
from probe.files import at_home
from probe.metrics import METRICS, TOKEN_METRICS, Array, Entries
from probe.models import Graph
from probe.problems import BENCHMARKS, data_set_here, load_problems
from probe.recipe import Pair, Recipe
from probe.report._report import Report
from probe.report._strength import ChangedEdge
from probe.solutions import Solution
from probe.stats import describe, units_of
from probe.store import (
    QUESTIONS,
    TEXTS,
    Damaged,
    Missing,
    RunFolder,
    Text,
    model_names,
    tokens_file,
)

SOLVED = ("after", "before", "none", "both")
"""Who solves a question, in the order of lists: those that flipped come first."""


class TokenShare(NamedTuple):
    """What one token of a text carries."""

    token: str
    """The token."""

    share: float
    """Its share of the sum of |score| over all edges and tokens."""

    score: float
    """The sum of the scores of all edges there, in nats."""


STRONGEST = 8
"""How many edges of a question are named."""

Solved = Literal["after", "before", "none", "both"]


@dataclass(frozen=True)
class ComparedProblem:
    """One question, and what both models of a pair made of it."""

    benchmark: str
    """The benchmark's name."""

    pair: str
    """The pair's name."""

    id: str
    """The question's name."""

    question: str
    """The question; empty where its benchmark is not on this machine."""

    gold: str
    """The right answer."""

    solved: Solved
    """Who solves it: `both`, `none`, or only the model `before` or `after`."""

    text_before: str
    """All that the model before wrote."""

    text_after: str
    """All that the model after wrote."""

    extracted_before: str | None
    """The final answer that was read from it; None where there is none."""

    extracted_after: str | None
    """Of the model after."""

    tokens_before: int
    """How many tokens it wrote."""

    tokens_after: int
    """The model after."""

    alpha: float | None = None
    """The longest scored length at which its edges are known; None where they are not, and what
    follows is empty."""

    loss_before: float | None = None
    """Loss per scored token of the model before, of its own answer, in nats."""

    loss_after: float | None = None
    """Of the model after."""

    edges: tuple[ChangedEdge, ...] = ()
    """The edges whose |score| differs most between the models, the largest difference first."""

    shares: Mapping[str, float] = field(default_factory=dict)
    """Its share of all questions' |contributions| to the change of each metric, by name."""

    by_token_before: tuple[TokenShare, ...] = ()
    """What each token of question and scored answer carries in the model before; empty where
    `report.extra` does not ask for `tokens`."""

    by_token_after: tuple[TokenShare, ...] = ()
    """In the model after, of its own answer."""


class QuestionEdges(NamedTuple):
    """The edges of the questions of one pair on one benchmark, at the longest scored length."""

    alpha: float
    """Scored length as a share of the usual one."""

    before: EdgeScores
    """Of the model before."""

    after: EdgeScores
    """Of the model after, of the same questions in the same order."""

    @property
    def graph(self) -> Graph:
        """Which row and column is which node."""
        return self.before.graph


def compared_problems(report: Report) -> list[ComparedProblem]:
    """Every question that both models of a pair answered, flipped ones first.

    Of a pair whose solutions are not whole there are none; the report names it as missing.
    """
    folder = RunFolder(report.path)
    names = model_names(report.recipe)
    asked = _questions(report.recipe, folder)
    found: list[ComparedProblem] = []
    for benchmark in (choice.name for choice in report.recipe.benchmarks):
        for pair in report.recipe.pairs:
            try:
                before, after = (
                    {one.id: one for one in folder.read_whole(names[side], benchmark)}
                    for side in pair.asked()
                )
            except Missing:
                continue  # the report has said so
            texts = asked.get(benchmark, {})
            rows = [
                _compared(benchmark, pair, texts.get(name, ""), before[name], after[name])
                for name in before
                if name in after
            ]
            scored = question_edges(report, pair, benchmark)
            found += sorted(
                _with_edges(
                    rows,
                    scored,
                    folder.read_clusters(benchmark),
                    [_by_token(folder, pair, benchmark, side) for side in TEXTS],
                )
                if scored
                else rows,
                key=lambda one: SOLVED.index(one.solved),
            )
    return found


def question_edges(report: Report, pair: Pair, benchmark: str) -> QuestionEdges | None:
    """The edges of a pair's questions at the longest alpha that is there; None where none is."""
    folder = RunFolder(report.path)
    alphas = {c.alpha for c in report.cells if (c.pair, c.benchmark) == (pair.name, benchmark)}
    for comparison in report.recipe.comparisons():
        where = comparison.pair.name, comparison.benchmark, comparison.alpha
        if alphas and where == (pair.name, benchmark, max(alphas)):
            before, after = folder.read_sides(comparison.name, "before", "after")
            return QuestionEdges(comparison.alpha, before, after)
    return None


def _questions(recipe: Recipe, folder: RunFolder) -> dict[str, dict[str, str]]:
    """The text of each question by benchmark and id, where it is here and is what was asked."""
    found: dict[str, dict[str, str]] = {}
    try:
        digests = folder.read_json(QUESTIONS) or {}
    except Damaged:
        return {}  # nobody can tell what was asked
    for choice in recipe.benchmarks:
        known, then = BENCHMARKS.get(choice.name), digests.get(choice.name)
        path = at_home(choice.path) if choice.path else None
        source = known.source if known and not path else None
        there = path.exists() if path else source is None or data_set_here(source)
        if not isinstance(then, dict) or not there:
            continue
        try:
            problems = load_problems(choice.name, path, grading=choice.grading)
        except ProbeError:
            continue  # what stands there now is no benchmark any more
        found[choice.name] = {
            one.id: one.question for one in problems if then.get(one.id) == digest_of(one.question)
        }
    return found


def _by_token(
    folder: RunFolder, pair: Pair, benchmark: str, side: Text
) -> dict[str, tuple[TokenShare, ...]]:
    """What each token carries, by question; nothing where that was not measured.

    Of a damaged file there is none; the table of the report says so.
    """
    try:
        found = folder.read_measured(tokens_file(pair, benchmark, side))
    except Missing:
        return {}
    rows = cast(list[dict[str, Any]], found["questions"])
    return {
        row["id"]: tuple(map(TokenShare, row["tokens"], row["shares"], row["scores"]))
        for row in rows
    }


def digest_of(question: str) -> str:
    """What questions.json holds of a question's text."""
    return sha256(question.encode()).hexdigest()[:16]


def _compared(
    benchmark: str, pair: Pair, question: str, before: Solution, after: Solution
) -> ComparedProblem:
    solved: dict[tuple[bool, bool], Solved] = {
        (True, True): "both",
        (True, False): "before",
        (False, True): "after",
        (False, False): "none",
    }
    return ComparedProblem(
        benchmark,
        pair.name,
        before.id,
        question,
        before.gold,
        solved[before.correct, after.correct],
        before.text,
        after.text,
        before.extracted,
        after.extracted,
        len(before.answer),
        len(after.answer),
    )


def _with_edges(
    rows: list[ComparedProblem],
    scored: QuestionEdges,
    clusters: Mapping[str, str],
    tokens: Sequence[Mapping[str, tuple[TokenShare, ...]]],
) -> Iterator[ComparedProblem]:
    """The same with what their edges say, where they were scored."""
    places = {name: place for place, name in enumerate(scored.before.ids)}
    shares = _shares(scored, clusters)
    for row in rows:
        place = places.get(row.id)
        if place is None:
            yield row
            continue
        yield ComparedProblem(
            **{name: value for name, value in vars(row).items() if name not in _FROM_EDGES},
            alpha=scored.alpha,
            loss_before=float(scored.before.losses[place]),
            loss_after=float(scored.after.losses[place]),
            edges=strongest(scored, place),
            shares={name: float(values[place]) for name, values in shares.items()},
            by_token_before=tokens[0].get(row.id, ()),
            by_token_after=tokens[1].get(row.id, ()),
        )


_FROM_EDGES = (
    *("alpha", "loss_before", "loss_after", "edges", "shares"),
    *("by_token_before", "by_token_after"),
)


def strongest(scored: QuestionEdges, place: int, count: int = STRONGEST) -> tuple[ChangedEdge, ...]:
    """The edges of one question whose |score| differs most, the largest difference first."""
    before, after = (side.scores[place].abs().double() for side in (scored.before, scored.after))
    difference = (after - before).abs().flatten()
    found = []
    # Not sorted whole: single heads and experts have millions of edges.
    for index in difference.topk(min(count, len(difference))).indices.tolist():
        row, column = divmod(index, before.shape[1])
        if difference[index] > 0:
            ends = float(before[row, column]), float(after[row, column])
            nodes = scored.graph.sources[row], scored.graph.targets[column]
            found.append(ChangedEdge(*nodes, *ends))
    return tuple(found)


def _shares(scored: QuestionEdges, clusters: Mapping[str, str]) -> dict[str, Array]:
    """Each question's share of all |contributions| to the change of each metric, [question]."""
    sides = [
        Entries(side.scores, scored.graph.mask, dense=True, entropies=side.entropies)
        for side in (scored.before, scored.after)
    ]
    units = units_of([clusters.get(name) for name in scored.before.ids], len(sides[0]))
    found: dict[str, Array] = {}
    for name, metric in (METRICS | TOKEN_METRICS).items():
        ours = metric.estimand
        if ours is None:
            continue
        before, after = (side.parts(ours.values) for side in sides)
        _, parts, counted = describe(ours.form, before, after, units)
        sizes = np.zeros(len(counted))
        if parts is not None:
            sizes[counted] = np.abs(parts)
        if np.isfinite(sizes.sum()) and sizes.sum() > 0:
            found[name] = sizes / sizes.sum()
    return found
