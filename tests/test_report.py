import csv
import io
import json

import pytest
import torch
from rich.console import Console

from probe.attribution import EdgeScores
from probe.errors import ProbeError
from probe.graph import Graph
from probe.metrics import METRICS
from probe.recipe import read_recipe, recipe_table
from probe.report import build_report, model_names, print_report, render, summary, tables
from probe.run_folder import RunFolder

ALPHAS = {"selection.alpha": "[0.1, 0.5]"}


@pytest.fixture
def folder(tmp_path):
    """A run folder of which one pair has edges for one alpha: twice as strong after."""
    folder = RunFolder(tmp_path / "run")
    folder.open()
    recipe = read_recipe("tiny-math", ALPHAS)
    folder.write_json("run.json", {"schema": 1, "recipe": recipe_table(recipe)})
    graph = Graph.build(2, "qkv")
    torch.manual_seed(0)
    scores = torch.randn(5, *graph.mask.shape) * graph.mask
    for side, factor in (("before", 1), ("after", 2)):
        edges = EdgeScores(factor * scores, torch.ones(5), graph)
        path = folder.edges_file("sft-grpo.tiny-math.alpha-0.5", side)
        folder.write_edges(path, edges, list("abcde"), "key")
    return folder


def test_a_half_finished_run(folder):
    report = build_report(folder.path)
    assert len(report.cells) == len(METRICS)
    assert report.missing == (
        "sft-grpo.tiny-math.alpha-0.1: not computed yet",
        "sft-dpo.tiny-math.alpha-0.1: not computed yet",
        "sft-dpo.tiny-math.alpha-0.5: not computed yet",
    )
    intensity = report.cells[0]
    assert intensity.metric == "activation_intensity"
    assert intensity.change == pytest.approx(1.0)
    assert intensity.as_in_paper is True
    assert report.table["complete"] is False


def test_an_empty_run_prints(folder, capsys):
    for path in (folder.path / "edges").iterdir():
        path.unlink()
    report = build_report(folder.path)
    for style in ("table", "markdown", "json", "csv"):
        print_report(report, style)
    assert "not computed yet" in capsys.readouterr().out


def test_formats_hold_the_same_numbers(folder):
    report = build_report(folder.path)
    from_json = json.loads(render(report, "json"))["cells"]
    from_csv = list(csv.DictReader(io.StringIO(render(report, "csv"))))
    markdown = render(report, "markdown")
    for cell, row in zip(from_json, from_csv, strict=True):
        assert float(row["before"]) == cell["before"]
        assert float(row["real_edges_after"]) == cell["real_edges"]["after"]
        assert f"{cell['before']:.2e} → {cell['after']:.2e}" in markdown
    with pytest.raises(ProbeError, match="'html' is not known"):
        render(report, "html")


@pytest.mark.parametrize("width", [80, 100, 200])
def test_tables_fit(folder, width):
    console = Console(file=io.StringIO(), width=width, record=True)
    console.print(tables(build_report(folder.path)))
    text = console.export_text()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    assert "+100.0 %" in text
    assert summary(build_report(folder.path)).startswith("On tiny-math, GRPO moved ")


def test_real_edges_can_be_what_the_table_shows(folder):
    record = folder.read_record()
    record["recipe"]["report"]["entries"] = "real"
    folder.write_json("run.json", record)
    report = build_report(folder.path)
    shown = report.cells[0].real_edges.before
    assert f"{shown:.2e} →" in render(report, "markdown")
    assert shown > report.cells[0].before


def test_metrics_that_are_not_defined_are_null(folder):
    graph = Graph.build(2, "qkv")
    for side in ("before", "after"):
        edges = EdgeScores(torch.zeros(1, *graph.mask.shape), torch.ones(1), graph)
        path = folder.edges_file("sft-grpo.tiny-math.alpha-0.5", side)
        folder.write_edges(path, edges, ["a"], "key")
    report = build_report(folder.path)
    cells = {cell.metric: cell for cell in report.cells}
    assert cells["activation_intensity"].change is None  # from 0
    assert cells["sample_diversity"].before is None
    assert cells["sample_diversity"].as_in_paper is None
    assert json.loads(render(report, "json"))
    print_report(report)


def test_a_model_has_one_name_for_each_way_of_asking():
    recipe = read_recipe(
        "tiny-math",
        {"pairs.1.before": "other/place/sft", "pairs.1.after": "probe:tiny-math/grpo"}
        | {"pairs.1.prompt": "Q: {question}"},
    )
    names = list(model_names(recipe).values())
    assert names == ["tiny-math--sft", "tiny-math--grpo", "place--sft", "tiny-math--grpo-2"]


def test_not_a_run_folder(tmp_path):
    with pytest.raises(ProbeError, match="is not a run folder"):
        build_report(tmp_path)
