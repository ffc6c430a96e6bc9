"""What a report says first, and whether every word of it is explained."""

import re
from dataclasses import replace

import pytest

from probe.report import ExtraTable, build_report, opening, print_report, render
from probe.report._glossary import glossary, legend
from probe.report._layout import CELL_TITLES, cell_rows
from probe.stats import Agreement, Estimate


def lines_of(report):
    return {label: text for finding in opening([report]) for label, text in finding.lines}


def agreement(model, value, method="eap"):
    number = Estimate(value, None if value is None else value - 0.1, value)
    return Agreement(model, method, 400, number, number, number, number, number)


def controlled(report, alone, equal, significant):
    """The report as if intensity had been controlled for sureness."""
    raw = next(cell for cell in report.cells if cell.metric == "activation_intensity")
    raw = replace(raw, change=-0.8, significant=True, samples=5)
    rest = [cell for cell in report.cells if cell.metric != "activation_intensity"]
    cells = [
        raw,
        replace(raw, control="sharpness", change=alone),
        replace(
            raw,
            control="equal loss",
            change=equal,
            interval=(equal - 0.05, equal + 0.05),
            significant=significant,
        ),
    ]
    return replace(report, cells=(*cells, *rest))


def test_the_inside_is_said_with_its_controls(half_run):
    report = build_report(half_run.path)
    assert "is not controlled for" in lines_of(report)["Inside"]
    told = lines_of(controlled(report, -0.7, -0.5, significant=True))["Inside"]
    assert told == (
        "intensity, the mean strength of an edge, fell by 80.0 % (5 questions that both solve, "
        "scored up to 50 % of the usual length: alpha 0.5). Being surer alone would lower it by "
        "70.0 %. At equal loss the change is -50.0 % [-55.0..-45.0]: sureness is not all of it."
    )
    told = lines_of(controlled(report, 0.2, 0.01, significant=False))["Inside"]
    assert "alone would raise it by 20.0 %" in told
    assert told.endswith("+1.0 % [-4.0..+6.0], which is not significant.")


def test_how_far_to_trust_the_scores(half_run):
    report = build_report(half_run.path)
    told = lines_of(report)["Trust"]
    assert told.endswith(f"is not measured: probe faithfulness {half_run.path}")
    rows = (agreement("sft", 0.95), agreement("grpo", 0.5), agreement("grpo", 0.2, "relp"))
    told = lines_of(replace(report, faithfulness=rows))["Trust"]
    assert "Spearman correlation of 0.50 [0.40..0.50] in the worst of 2 models" in told
    assert told.endswith("at that, no single edge is a finding.")
    told = lines_of(replace(report, faithfulness=rows[:1]))["Trust"]
    assert "0.95 [0.85..0.95]" in told
    assert "no single edge" not in told
    assert "is not measured" in lines_of(replace(report, faithfulness=rows[2:]))["Trust"]
    nothing = (agreement("sft", None),)
    assert "is not measured" in lines_of(replace(report, faithfulness=nothing))["Trust"]


@pytest.mark.parametrize("style", ["markdown", "html"])
def test_every_word_of_the_tables_is_explained_beside_the_first(half_run, style):
    report = controlled(build_report(half_run.path), -0.7, -0.5, significant=True)
    terms = dict(legend([report]))
    words = {part for term in terms for part in term.split(", ")}
    columns = {*CELL_TITLES} - {"metric", "before → after"}
    labels = {row[1].strip() for cell in report.cells for row in cell_rows(cell, report)}
    assert columns | labels | {"*", "!"} <= words
    text = render(report, style)
    first = re.search(r"tiny-math · sft-grpo", text).start()
    for term in terms:
        assert term.replace("*", r"\*") in text[:first] or term in text[:first]


def test_the_page_explains_the_parts_of_a_model(half_run):
    report = build_report(half_run.path)
    parts = dict(glossary([report]))
    assert {"edge", "a0, m0", "q/k/v", "alpha", "cell"} <= parts.keys()
    text = render(report, "html")
    start = text.index("Words and marks")
    assert start < text.index("<h2>Every cell")
    for meaning in ("attention and FFN of the first layer", "as query, key and value"):
        assert meaning in text[start:]
    assert '<abbr title="share of the usual length of an answer that is scored">alpha' in text
    blocks = replace(report.recipe.attribution, granularity="block")
    report = replace(report, recipe=replace(report.recipe, attribution=blocks))
    assert "q/k/v" not in dict(glossary([report]))


def test_nothing_is_explained_where_there_is_nothing(half_run):
    report = replace(build_report(half_run.path), cells=(), extras=(ExtraTable("a", "", (), ()),))
    assert legend([report]) == glossary([report]) == []
    assert "Words and marks" not in render(report, "html")


def test_a_terminal_shows_what_comes_first_again_at_its_end(half_run, monkeypatch, capsys):
    report = build_report(half_run.path)
    print_report(report)
    assert capsys.readouterr().out.count("How sure, and what next") == 1
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    print_report(report)
    text = capsys.readouterr().out
    assert text.count("How sure, and what next") == 2
    assert " ".join(text.split()).endswith("to point at.")
