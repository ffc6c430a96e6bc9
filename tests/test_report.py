import json

import pytest
import torch

from probe.attribution import EdgeScores
from probe.errors import ProbeError
from probe.graph import Graph
from probe.metrics import METRICS
from probe.rendering import print_report, render
from probe.report import build_report


def test_a_half_finished_run(half_run):
    report = build_report(half_run.path)
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


def test_metrics_that_are_not_defined_are_null(half_run):
    graph = Graph.build(2, "qkv")
    for side in ("before", "after"):
        edges = EdgeScores(torch.zeros(1, *graph.mask.shape), torch.ones(1), graph)
        path = half_run.edges_file("sft-grpo.tiny-math.alpha-0.5", side)
        half_run.write_edges(path, edges, ["a"], "key")
    report = build_report(half_run.path)
    cells = {cell.metric: cell for cell in report.cells}
    assert cells["activation_intensity"].change is None  # from 0
    assert cells["sample_diversity"].before is None
    assert cells["sample_diversity"].as_in_paper is None
    assert json.loads(render(report, "json"))
    print_report(report)


def test_not_a_run_folder(tmp_path):
    with pytest.raises(ProbeError, match="is not a run folder"):
        build_report(tmp_path)
