"""Problem view: the questions of a run in a terminal, as a list or one by one.

>>> Console().print(problem_list(run.compared))
"""

import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from itertools import zip_longest

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from probe.errors import ProbeError
from probe.metrics import metric_named
from probe.report._problems import SOLVED, STRONGEST, ComparedProblem
from probe.report._report import ExtraTable
from probe.report._terminal import table_view
from probe.report._wording import counted, number

WORDS = {
    "after": "solved only after",
    "before": "solved only before",
    "none": "solved by none",
    "both": "solved by both",
}
"""Who solves a question, in words."""

LOST = "The text of the question is not here: no benchmark on this machine is what was asked."
"""Where a question would stand."""

PARTS = re.compile(r"\\?\w+|\s+|[^\w\s]")
"""What answers are compared by: words, numbers and signs."""


def problem_list(problems: Sequence[ComparedProblem]) -> RenderableType:
    """How many questions each pair flipped, and every question, flipped ones first."""
    if not problems:
        raise ProbeError("no pair of this run has answers of both models yet")
    parts: list[RenderableType] = []
    for where in dict.fromkeys((one.benchmark, one.pair) for one in problems):
        rows = [one for one in problems if (one.benchmark, one.pair) == where]
        counts = [f"{sum(r.solved == name for r in rows)} {WORDS[name]}" for name in SOLVED]
        texts = tuple(
            (
                *(row.id, WORDS[row.solved].removeprefix("solved "), row.gold),
                *(_short(answer) for answer in (row.extracted_before, row.extracted_after)),
                _short(row.question or "(not here)"),
            )
            for row in rows
        )
        note = "" if all(row.question for row in rows) else f"(not here) {LOST}"
        columns = ("id", "solved", "right", "before", "after", "question")
        title = f"{where[0]} · {where[1]}: {counted(len(rows), 'question')}"
        table = ExtraTable(f"{title}; {', '.join(counts)}", note, columns, texts)
        parts += [table_view(table), Text("")]
    return Group(*parts)


def problem_view(problems: Sequence[ComparedProblem], ids: Sequence[str]) -> RenderableType:
    """Some questions, each with both answers and what differs in brackets, and its edges.

    Raises:
        ProbeError: There is no question of an id.
    """
    known = {one.id for one in problems}
    for name in ids:
        if name not in known:
            raise ProbeError(f"no question {name!r} that both models answered; see probe problems")
    found = [_one(one) for name in ids for one in problems if one.id == name]
    return Group(*found)


def _one(one: ComparedProblem) -> RenderableType:
    title = f"{one.benchmark} · {one.pair} · question {one.id}: {WORDS[one.solved]}"
    parts: list[RenderableType] = [Text(title, style="bold"), Text("")]
    question = Text(one.question) if one.question else Text(LOST, style="dim")
    parts.append(Padding(question, (0, 0, 1, 2)))
    parts.append(Text(f"right answer: {one.gold}"))
    before, after = differences(one.text_before, one.text_after)
    sides = (
        ("before", before, one.extracted_before, one.tokens_before, one.loss_before),
        ("after", after, one.extracted_after, one.tokens_after, one.loss_after),
    )
    for name, text, answer, tokens, loss in sides:
        right = one.solved in ("both", name)
        scored = f", loss {number(loss)} nats a token" if loss is not None else ""
        grade = f"{'✓ right' if right else '✗ wrong'}: {_short(answer)}"
        parts += [Text(f"{name}: {grade} ({counted(tokens, 'token')}{scored})")]
        parts += [Padding(text, (0, 0, 0, 2))]
    parts.append(Text(""))
    if one.alpha is None:
        return Group(*parts, Text("Its edges were not scored: see the selection.", style="dim"), "")
    columns = ("source", "target", "before", "after")
    edges = ExtraTable(f"Edges that changed most, alpha {one.alpha:g}", "", columns, one.edges)
    shares = ExtraTable(
        "Its share of each change",
        "Of all questions' |contributions| to the change of a metric.",
        ("metric", "share"),
        tuple(
            (metric_named(name).estimand.label, f"{100 * share:.1f} %")  # type: ignore[union-attr]
            for name, share in one.shares.items()
        ),
    )
    parts += [table_view(edges), Text(""), table_view(shares), Text("")]
    if one.by_token_before or one.by_token_after:
        parts += [table_view(_tokens(one)), Text("")]
    return Group(*parts)


def _tokens(one: ComparedProblem) -> ExtraTable:
    """The tokens that carry most, of each model beside those of the other."""
    rows = []
    strongest = [
        sorted(enumerate(side, 1), key=lambda placed: -placed[1].share)[:STRONGEST]
        for side in (one.by_token_before, one.by_token_after)
    ]
    for pair in zip_longest(*strongest):
        row: list[str | float | None] = []
        for placed in pair:
            if placed is None:
                row += ["", "", ""]
            else:
                place, (token, share, _) = placed
                row += [str(place), repr(token)[1:-1], f"{100 * share:.1f} %"]
        rows.append(tuple(row))
    return ExtraTable(
        "Tokens that carry most, before and after",
        "Share of the sum of |score| over all edges and tokens; #: the token's place in question "
        "and answer.",
        ("#", "before", "share", "# ", "after", "share "),
        tuple(rows),
    )


def differences(before: str, after: str) -> tuple[Text, Text]:
    """Both texts, what only one of them has between brackets and in bold."""
    first, second = PARTS.findall(before), PARTS.findall(after)
    sides = Text(), Text()
    for kind, a, b, c, d in SequenceMatcher(None, first, second, autojunk=False).get_opcodes():
        for side, piece in zip(sides, ("".join(first[a:b]), "".join(second[c:d])), strict=True):
            if piece:
                same = kind == "equal"
                side.append(piece if same else f"[{piece}]", "" if same else "bold")
    return sides


def _short(text: str | None) -> str:
    """One line of a text that may be long."""
    line = "-" if text is None else " ".join(text.split())
    return line if len(line) <= 48 else f"{line[:47]}…"
