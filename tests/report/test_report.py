import json
from dataclasses import replace

import pytest
import torch

from probe.attribution import EdgeScores
from probe.errors import ProbeError
from probe.metrics import METRICS, TOKEN_METRICS
from probe.models import Graph
from probe.report import build_report, percent, print_report, render, summary
from probe.solutions import Solution
from probe.stats import Change


def test_a_half_finished_run(half_run):
    report = build_report(half_run.path)
    assert len(report.cells) == len(METRICS | TOKEN_METRICS)
    assert report.missing == (
        "sft-grpo.tiny-math.alpha-0.1: not computed yet",
        "sft-dpo.tiny-math.alpha-0.1: not computed yet",
        "sft-dpo.tiny-math.alpha-0.5: not computed yet",
    )
    intensity = report.cells[0]
    assert intensity.metric == "activation_intensity"
    assert intensity.change == pytest.approx(1.0)
    assert intensity.as_in_paper is True
    assert intensity.interval == pytest.approx((1, 1))
    assert intensity.p_value == 2 * 0.5**5  # all five rise, or all fall
    assert intensity.p_value < intensity.p_holm
    assert intensity.significant is False  # five questions cannot be enough
    assert report.cells[1].p_value == 1  # an entropy does not see the scale
    assert report.table["complete"] is False


def test_metrics_that_are_not_defined_are_null(half_run):
    graph = Graph.build(2, "qkv")
    for side in ("before", "after"):
        edges = EdgeScores(torch.zeros(1, *graph.mask.shape), torch.ones(1), torch.ones(1), graph)
        path = half_run.edges_file("sft-grpo.tiny-math.alpha-0.5", side)
        half_run.write_edges(path, edges, ["a"], "key")
    report = build_report(half_run.path)
    cells = {cell.metric: cell for cell in report.cells}
    assert cells["activation_intensity"].change is None  # from 0
    assert cells["sample_diversity"].before is None
    assert cells["sample_diversity"].as_in_paper is None
    for cell in cells.values():  # of one question
        assert cell.interval is cell.p_value is cell.p_holm is cell.effect_size is None
        assert cell.significant is None
    assert json.loads(render(report, "json"))
    print_report(report)


def write_sides(folder, cell, before, after, ids=None):
    graph = Graph.build(2, "qkv")
    for side, scores in (("before", before), ("after", after)):
        edges = EdgeScores(
            scores * graph.mask, torch.ones(len(scores)), torch.ones(len(scores)), graph
        )
        names = [str(place) for place in range(len(scores))] if ids is None else ids[side]
        folder.write_edges(folder.edges_file(cell, side), edges, names, "key")


def test_what_is_significant(half_run):
    torch.manual_seed(1)
    shape = (30, *Graph.build(2, "qkv").mask.shape)
    before, other = torch.randn(shape), torch.randn(shape)
    write_sides(half_run, "sft-grpo.tiny-math.alpha-0.5", before, before / 3)
    write_sides(half_run, "sft-dpo.tiny-math.alpha-0.5", before, other)
    report = build_report(half_run.path)
    assert len(report.cells) == 2 * len(METRICS | TOKEN_METRICS)
    found = {(cell.pair, cell.metric): cell for cell in report.cells}
    weaker = found.pop(("sft-grpo", "activation_intensity"))
    assert weaker.significant
    assert weaker.as_in_paper is False
    assert weaker.p_holm == pytest.approx(12 * weaker.p_value)  # of twelve cells the smallest
    assert not any(cell.significant for cell in found.values())
    assert all(low <= 0 <= high for low, high in (cell.interval for cell in found.values()))
    first, second = summary(report)
    assert first.startswith(
        "sft → grpo (GRPO) on tiny-math: Inside: intensity, the mean strength of an edge, fell by "
        "66.7 % (30 questions that both solve, scored up to 50 % of the usual length: alpha 0.5)."
    )
    assert first.endswith(
        "All cells: 1 of 6 (6 metrics at 1 alpha) moved beyond chance: intensity (1 down). 0 moved "
        "as the paper (arXiv 2509.21044) reports for online RL, 1 against it."
    )
    assert "did not measurably change (" in second
    assert second.endswith("All cells: none of 6 (6 metrics at 1 alpha) moved beyond chance.")


def test_statistics_can_be_left_out(half_run):
    record = half_run.read_record()
    record["recipe"]["report"]["resamples"] = 0
    half_run.write_json("run.json", record)
    report = build_report(half_run.path)
    for cell in report.cells:
        assert cell.change is not None
        assert cell.interval is cell.p_holm is cell.significant is None
    assert "beyond chance" not in render(report, "markdown")
    assert "significant" not in render(report, "markdown")
    assert "without its noise" in render(report, "markdown")


def test_sides_of_different_questions_are_not_paired(half_run):
    scores = torch.randn(2, *Graph.build(2, "qkv").mask.shape)
    cell = "sft-grpo.tiny-math.alpha-0.5"
    write_sides(half_run, cell, scores, scores, {"before": ["a", "b"], "after": ["b", "a"]})
    report = build_report(half_run.path)
    assert not report.cells
    assert f"{cell}: before and after are of different questions" in report.missing


def test_not_a_run_folder(tmp_path):
    with pytest.raises(ProbeError, match="is not a run folder"):
        build_report(tmp_path)


def test_published_values_stand_beside_their_cells(half_run):
    cell = {"pair": "sft-grpo", "benchmark": "tiny-math"}
    intensity = cell | {"metric": "activation_intensity", "alpha": 0.5}
    record = half_run.read_record()
    record["recipe"]["published"] = [
        intensity | {"before": 1e-3, "after": 1.5e-3},
        intensity | {"before": 1e-3, "after": 0.5e-3, "alpha": 0.1},  # has no edges yet
        cell | {"metric": "distribution_kurtosis", "alpha": 0.5, "before": 300, "after": 200},
        cell | {"metric": "accuracy", "before": 0.5, "after": 0.5},
    ]
    half_run.write_json("run.json", record)
    for model, right in (("sft", (True, True, False)), ("grpo", (True, False, True))):
        solutions = [
            Solution(str(number), [1], [2], correct) for number, correct in enumerate(right)
        ]
        path = half_run.solutions_file(f"tiny-math--{model}", "tiny-math")
        half_run.write_solutions(path, solutions)
    report = build_report(half_run.path)
    found = {cell.metric: cell for cell in report.cells}
    rose = found["activation_intensity"]
    assert rose.published == Change(1e-3, 1.5e-3, pytest.approx(0.5))
    assert rose.as_published is True
    assert found["distribution_kurtosis"].as_published is False  # ours does not see the scale
    assert found["output_entropy"].published is None
    assert found["output_entropy"].as_published is None
    (accuracy,) = report.accuracy
    assert accuracy.published == Change(0.5, 0.5, 0)
    assert accuracy.as_published is True  # neither moved


def test_token_entropy_is_a_cell_of_its_own(half_run):
    name = "sft-grpo.tiny-math.alpha-0.5"
    for side, factor in (("before", 1.0), ("after", 0.5)):
        path = half_run.edges_file(name, side)
        edges = half_run.read_edges(path)
        entropies = factor * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
        half_run.write_edges(path, replace(edges, entropies=entropies), list("abcde"), "key")
    (cell,) = (c for c in build_report(half_run.path).cells if c.metric == "token_entropy")
    assert cell.paper == Change(3, 1.5, -0.5)
    assert cell.before == pytest.approx(120**0.2)
    assert cell.change == pytest.approx(-0.5)
    assert cell.real_edges == Change(3, 1.5, -0.5)
    assert cell.as_in_paper is False
    assert cell.interval == pytest.approx((-0.5, -0.5))
    assert cell.p_value == 2 * 0.5**5


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (None, "-"),
        (-1e-5, "+0.0"),
        (-0.0, "+0.0"),
        (-6e-4, "-0.1"),
        (0.123, "+12.3"),
        (-12, "-1200"),
    ],
)
def test_a_change_in_percent(change, text):
    assert percent(change) == text


def test_clusters_of_the_benchmark_bind_questions(half_run):
    torch.manual_seed(2)
    before = torch.randn(12, *Graph.build(2, "qkv").mask.shape)
    after = before * (1 + torch.rand(12, 1, 1))
    write_sides(half_run, "sft-grpo.tiny-math.alpha-0.5", before, after)
    alone = {cell.metric: cell for cell in build_report(half_run.path).cells}
    clusters = {str(place): "ab"[place % 2] for place in range(8)}
    half_run.write_clusters({"tiny-math": clusters})
    report = build_report(half_run.path)
    for cell in report.cells:
        assert (cell.samples, cell.clusters) == (12, 6)  # two, and four questions that are alone
        assert cell.change == pytest.approx(alone[cell.metric].change)
    intensity = report.cells[0]
    assert alone["activation_intensity"].p_value == 2 / 2**12
    assert intensity.p_value == 2 / 2**6
    assert "12 samples in 6 clusters" in render(report, "markdown")
    half_run.write_clusters({"tiny-math": {}})
    assert half_run.read_clusters("tiny-math") == {}
    (half_run.path / "clusters.json").write_text("{")
    with pytest.raises(ProbeError, match="clusters.json: damaged"):
        build_report(half_run.path)


def test_accuracy_comes_first_and_is_tested(half_run):
    for model, right in (("sft", [True] * 66 + [False] * 34), ("grpo", [True] * 43 + [False] * 57)):
        rows = [Solution(str(number), [1], [2], correct) for number, correct in enumerate(right)]
        if model == "grpo":
            rows = [replace(row, correct=row.correct or int(row.id) >= 97) for row in rows]
        path = half_run.solutions_file(f"tiny-math--{model}", "tiny-math")
        half_run.write_solutions(path, rows)
    report = build_report(half_run.path)
    (row,) = report.accuracy
    assert (row.gained, row.lost, row.significant) == (3, 23, True)
    assert summary(report)[0].startswith(
        "sft → grpo (GRPO) on 100 questions of tiny-math: Accuracy: fell from 66.0 to 46.0 % "
        "(-20.0 points, 95 % interval -29.8..-11.0; McNemar p = 9e-5); 3 more solved, 23 no "
    )
