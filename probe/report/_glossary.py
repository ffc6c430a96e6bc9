"""Glossary: what the words and marks of a report mean, in a line each.

A legend stands beside the first table in every format; the web page has all of it on its first
screen, and each word's meaning where one points at it.

    >>> dict(legend([report]))["alpha"]
    'share of the usual length of an answer that is scored'
"""

from collections.abc import Sequence

from probe.metrics import METRICS, TOKEN_METRICS
from probe.report._report import Report
from probe.report._wording import MUCH_OF_ONE, counted
from probe.stats import CONTROLS, LEVEL, SMALLEST

Term = tuple[str, str]
"""A word or mark, and what it means."""


def legend(reports: Sequence[Report]) -> list[Term]:
    """What is needed to read the tables of cells; nothing where there are none."""
    cells = [cell for report in reports for cell in report.cells]
    if not cells:
        return []
    terms: list[Term] = [
        ("cell", "one metric of both models at one alpha: a row"),
        ("alpha", "share of the usual length of an answer that is scored"),
    ]
    seen = {cell.metric for cell in cells}
    for name, metric in (METRICS | TOKEN_METRICS).items():
        ours = metric.estimand
        if name in seen and ours and ours.means:
            terms.append((ours.label, ours.means))
    labels = {cell.control for cell in cells}
    for control in CONTROLS.values():
        shown = [label for label, _, _ in control.compared if label in labels]
        terms += [(", ".join(shown), control.asks)] if shown else []
    return [*dict.fromkeys(terms + [term for report in reports for term in _columns(report)])]


def _columns(report: Report) -> list[Term]:
    """What the columns and marks of a table of cells say."""
    if not report.cells:
        return []
    dense = "real edges only" if report.recipe.report.entries == "real" else "the dense matrix"
    own = f"the change of the paper's own number, over {dense}, for comparison with print"
    paper = "whether it moved as the paper (arXiv 2509.21044) reports for online RL"
    last = [("paper", paper), ("paper %", f"{own}; it has no statistics"), ("!", MUCH_OF_ONE)]
    if not report.recipe.report.resamples:
        noise = "of our number, question by question, without its noise: no finding by itself"
        return [("change %", noise), *last]
    tested = sum(cell.p_value is not None for cell in report.cells)
    sure = (
        f"significant: p < {LEVEL:g} where what questions contribute changes signs at random, "
        f"adjusted (Holm) for {counted(tested, 'cell')}, and at least {100 * SMALLEST:g} %"
    )
    ends = "95 % t interval over questions, or clusters of them"
    change = "of our number, question by question"
    return [("change %", change), ("*", sure), ("interval", ends), *last]


def glossary(reports: Sequence[Report]) -> list[Term]:
    """The legend, and before it the names of the parts of a model."""
    shown = legend(reports)
    if not shown:
        return []
    recipe = reports[0].recipe.attribution
    parts: list[Term] = [
        (
            "edge",
            "what one part of a model writes, as far as a later part reads it; its score is how "
            f"much the answer's loss changes without it, in nats, by {recipe.method}",
        ),
        ("input, logits", "the first part, embeddings, and the last one, scores of the next token"),
        ("a0, m0", "attention and FFN of the first layer; a1, m1 of the second, and so on"),
    ]
    if recipe.granularity != "block":
        parts.append(("q/k/v", "what an attention reads as query, key and value: a1.q, a1.k, a1.v"))
    return [*parts, *shown]
