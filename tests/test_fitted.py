"""Every table of a terminal, at 60 and 80 columns: no line is cut, and no word becomes a column."""

import io
import itertools
from dataclasses import replace

import pytest
from conftest import run_recorded
from rich.console import Console

from probe.recipe import read_recipe, recipe_files
from probe.report import render
from probe.report import view as report_view
from probe.run import make_plan, plan_view, recipes_view
from probe.stats import Agreement, Estimate, view

LONG = "Qwen2.5-0.5B-Instruct-after-my-own-grpo-checkpoint-1200"
WIDTHS = (60, 80)


def shown(part, width):
    """What a terminal of a width shows, having checked that all of it fits."""
    console = Console(file=io.StringIO(), width=width)
    console.print(part)
    text = console.file.getvalue()
    lines = text.splitlines()
    assert max(len(line.rstrip()) for line in lines) <= width
    assert "…" not in text
    # A word that is broken into a column of letters: lines below each other with one letter each.
    for group in zip(lines, lines[1:], lines[2:], strict=False):
        assert not all(len(line.strip()) == 1 for line in group), text
    return text


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["sft", LONG])
def test_faithfulness(width, name):
    number = Estimate(-0.123, -1.0, 1.0)
    found = [
        Agreement(model, method, 400, *[number] * 4, Estimate(12.5, 10.0, 200.0))
        for model in (name, "dpo")
        for method in ("eap", "eap-ig")
    ]
    text = shown(view(found), width)
    words = text.split()
    for word in ("model", "Pearson", "Spearman", "sign", "error", "eap-ig", "dpo"):
        assert word in words
    assert words.count("-1.00..1.00") == 8
    assert words.count("1000..20000") == 4


@pytest.mark.parametrize("width", WIDTHS)
def test_plans(width):
    for recipe in (
        read_recipe("paper"),
        read_recipe("tiny-math", {"pairs.0.after": f"organisation/{LONG}"}),
    ):
        words = shown(plan_view(make_plan(recipe)), width).split()
        for word in ("model", "here", "parameters", "benchmark", "from", "questions"):
            assert word in words
    for plan in map(make_plan, map(read_recipe, ("paper", "tiny-math"))):
        words = shown(plan_view(plan), width).split()
        for model in plan.models:
            assert f"{model.shape.parameters:,}" in words


@pytest.mark.parametrize("width", WIDTHS)
def test_recipes(width):
    text = shown(recipes_view([make_plan(read_recipe(name)) for name in recipe_files()]), width)
    names = [line.split()[0] for line in text.splitlines() if line[:1] not in ("", " ", "─")]
    assert names == ["recipe", *recipe_files()]
    assert "8 models, 118 GB" in text
    assert "nothing: all is here" in text


@pytest.fixture(scope="module")
def long_run(tmp_path_factory):
    """The report of two pairs with long names, with everything beside their cells."""
    settings = {
        "solutions.questions": 60,
        "selection.samples": 4,
        "selection.alpha": "[0.5]",
        "faithfulness.edges": 3,
        "faithfulness.sequences": 1,
        "report.extra": '["overlap", "mass", "token-kl", "residual", "weights"]',
        "pairs.0.name": LONG,
        "pairs.1.name": f"{LONG}-dpo",
    }
    return run_recorded(settings, tmp_path_factory.mktemp("runs") / "long")[0]


@pytest.mark.parametrize("width", WIDTHS)
def test_a_run_of_long_names(long_run, width):
    text = shown(report_view([long_run]), width)
    for word in ("alpha", "metric", "change", "interval", "accuracy", "points", "layer"):
        assert word in text.split()
    # Numbers are as whole as in a format without columns.
    wide = render(long_run, "markdown")
    intervals = [word for word in wide.split() if ".." in word and word[0] in "+-"]
    assert intervals
    for interval in itertools.islice(intervals, 8):
        assert interval in text


def test_the_cells_of_a_report_need_80_columns(long_run):
    """With their controls, and intervals of twelve characters, which most have."""
    cell = replace(long_run.cells[0], interval=(-0.999, -0.999))
    control = replace(long_run.cells[0], control="equal loss", interval=(-0.999, -0.999))
    text = shown(report_view([replace(long_run, cells=(cell, control), extras=())]), 80)
    lines = text.splitlines()  # the legend has a line on alpha, too
    (heading,) = (line for line in lines if line.startswith("alpha") and "interval" in line)
    assert " ".join(heading.split()).endswith("interval paper paper %")
