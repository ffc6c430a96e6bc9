"""Problem panel: the questions of a run in the web page, to search and to open.

`problems.js` draws it. A page stays small however many questions there are: texts share a budget,
and so do matrices, which are left out where they do not fit; the edges that changed most are always
there.

    >>> panel_data(report)["pairs"][0]["rows"][0]["id"]
    '2'
"""

import base64
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from probe.metrics import metric_named
from probe.models import Graph
from probe.report._problem_view import LOST, WORDS
from probe.report._problems import (
    SOLVED,
    ComparedProblem,
    QuestionEdges,
    compared_problems,
    question_edges,
)
from probe.report._report import Report

TEXT_BUDGET = 1_800_000
"""Characters of all questions and answers of a page."""

MATRIX_BUDGET = 1_000_000
"""Bytes of the matrices of all questions; a page of more has none."""

TOKEN_BUDGET = 1_000_000
"""Characters of all tokens of a page; questions beyond have none."""

DECADES = 6
"""How many powers of ten below a question's largest |score| its matrix shows."""


def panel_data(report: Report) -> dict[str, object]:
    """What the script shows; without a pair where no model has answered.

    A matrix is a byte an edge, target by target: 0 is no score, 255 the question's largest, on a
    logarithmic scale.
    """
    problems = compared_problems(report)
    texts = _Texts(
        one for row in problems for one in (row.question, row.text_before, row.text_after)
    )
    groups: dict[tuple[str, str], list[ComparedProblem]] = {}
    for row in problems:
        groups.setdefault((row.benchmark, row.pair), []).append(row)
    pairs = {pair.name: pair for pair in report.recipe.pairs}
    scored = {where: question_edges(report, pairs[where[1]], where[0]) for where in groups}
    size = sum(2 * len(s.before.ids) * int(s.graph.mask.sum()) for s in scored.values() if s)
    shown: list[dict[str, Any]] = []
    left = TOKEN_BUDGET
    for (benchmark, pair), rows in groups.items():
        edges = scored[benchmark, pair]
        packed = _matrices(edges) if edges and size <= MATRIX_BUDGET else {}
        shown.append(
            {
                "title": f"{pair} on {benchmark}",
                "alpha": edges.alpha if edges else None,
                "graph": _graph(edges.graph) if edges else None,
                "rows": [_row(row, texts, edges, packed.get(row.id)) for row in rows],
            }
        )
        left = _add_tokens(shown[-1]["rows"], rows, left)
    return {
        "pairs": shown,
        "texts": texts.cut(TEXT_BUDGET),
        "words": [WORDS[name] for name in SOLVED],
        "decades": DECADES,
        "lost": LOST,
    }


class _Texts:
    """All texts of a page, each once, by its place."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.places = {text: place for place, text in enumerate(dict.fromkeys(texts))}

    def cut(self, budget: int) -> list[str]:
        """The texts, the longest ones cut so that all of them keep to a budget."""
        low, high = 0, max(map(len, self.places), default=0)
        while low < high:
            middle = (low + high + 1) // 2
            fits = sum(min(len(text), middle) for text in self.places) <= budget
            low, high = (middle, high) if fits else (low, middle - 1)
        return [text if len(text) <= low else f"{text[:low]}…" for text in self.places]


def _row(
    row: ComparedProblem,
    texts: _Texts,
    scored: QuestionEdges | None,
    matrices: Sequence[str] | None,
) -> dict[str, object]:
    found: dict[str, object] = {
        "id": row.id,
        "solved": SOLVED.index(row.solved),
        "gold": row.gold,
        "text": [texts.places[t] for t in (row.question, row.text_before, row.text_after)],
        "answer": [row.extracted_before, row.extracted_after],
        "tokens": [row.tokens_before, row.tokens_after],
    }
    if scored is None or row.alpha is None:
        return found
    places = scored.graph.sources, scored.graph.targets
    found["loss"] = [_short(row.loss_before or 0), _short(row.loss_after or 0)]
    found["edges"] = [
        (
            *(places[0].index(edge.source), places[1].index(edge.target)),
            *(_short(edge.before), _short(edge.after)),
        )
        for edge in row.edges
    ]
    found["shares"] = [
        (ours.label, _short(share))
        for name, share in row.shares.items()
        if (ours := metric_named(name).estimand)
    ]
    if matrices:
        found["matrices"] = matrices
    return found


def _add_tokens(
    shown: Sequence[dict[str, object]], rows: Sequence[ComparedProblem], left: int
) -> int:
    """Add both models' tokens and their shares, a byte each, while characters are left.

    255 is the largest share of a question's two texts. What is left is returned.
    """
    for made, row in zip(shown, rows, strict=True):
        sides = row.by_token_before, row.by_token_after
        left -= sum(len(token.token) + 4 for side in sides for token in side)
        if not all(sides) or left < 0:
            made["tokens_elsewhere"] = all(sides)
            continue
        largest = max(token.share for side in sides for token in side) or 1
        made["pieces"] = [[token.token for token in side] for side in sides]
        made["levels"] = [
            base64.b64encode(bytes(round(255 * t.share / largest) for t in side)).decode()
            for side in sides
        ]
        made["largest"] = _short(largest)
    return left


def _graph(graph: Graph) -> dict[str, object]:
    return {
        "sources": list(graph.sources),
        "targets": list(graph.targets),
        "reads": graph.mask.numpy().sum(0).tolist(),
    }


def _matrices(scored: QuestionEdges) -> dict[str, list[str]]:
    """Both matrices of each question, packed, by its id."""
    mask = scored.graph.mask
    sides = [side.scores.abs().transpose(1, 2)[:, mask.T] for side in (scored.before, scored.after)]
    largest = torch.maximum(sides[0].amax(1), sides[1].amax(1)).clamp_min(1e-30)[:, None]
    packed = []
    for side in sides:
        powers = torch.log10(side / largest).clamp_min(-DECADES) / DECADES + 1
        levels = torch.where(side > 0, 1 + (254 * powers).round(), torch.zeros_like(side))
        packed.append(levels.to(torch.uint8).numpy())
    return {
        name: [base64.b64encode(side[place].tobytes()).decode() for side in packed]
        for place, name in enumerate(scored.before.ids)
    }


def _short(value: float) -> float:
    """A number with three digits."""
    return float(f"{value:.3g}")


def panel(there: bool) -> list[str]:
    """The panel's elements, which the script fills."""
    if not there:
        return []
    return [
        '<h2 id="problems">Problems</h2>',
        '<p class="note">Every question with both answers; of those that were scored also edges. '
        "Flipped questions come first.</p>",
        "<noscript><p>The list needs JavaScript; <code>probe problems</code> prints it.</p>"
        "</noscript>",
        '<div class="controls" id="problem-controls">',
        '<label>pair <select id="problem-pair"></select></label>',
        '<label>solved <select id="problem-solved"></select></label>',
        '<label>search <input id="problem-search" type="search" '
        'placeholder="id, question, answer"></label>',
        '<output id="problem-count"></output></div>',
        '<div class="problems"><div class="scroll" id="problem-list"></div>',
        '<div id="problem" aria-live="polite"></div></div>',
    ]
