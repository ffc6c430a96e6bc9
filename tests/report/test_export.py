"""What other tools read of a run, read again by those tools."""

import re

import pandas
import pytest

from probe.errors import ProbeError
from probe.report import build_report, export_run, open_run, read_strengths


def test_parquet_holds_every_score_of_both_models(half_run, tmp_path):
    export_run(half_run.path, tmp_path / "edges.parquet")
    found = pandas.read_parquet(tmp_path / "edges.parquet")
    run = open_run(half_run.path)
    alpha = max(cell.alpha for cell in run.report.cells)
    mine = found[(found.pair == "sft-grpo") & (found.alpha == alpha)].reset_index(drop=True)
    for side in ("before", "after"):
        expected = run.edges(side, alpha, pair="sft-grpo").to_pandas()
        assert (mine[["source", "target"]] == expected[["source", "target"]]).all(axis=None)
        assert mine["question"].tolist() == expected["id"].tolist()
        assert mine[side].tolist() == expected["score"].tolist()


def test_dot_holds_the_edges_that_changed_most(half_run, tmp_path):
    export_run(half_run.path, tmp_path / "edges.dot")
    text = (tmp_path / "edges.dot").read_text()
    strengths = list(read_strengths(build_report(half_run.path)))
    assert text.count("digraph ") == len(strengths)
    lines = re.findall(r'"(.+)" -> "(.+)" \[before="(.+?)", after="(.+?)".*style="(.+?)"', text)
    expected = [edge for strength in strengths for edge in strength.largest(40)]
    assert [line[:2] for line in lines] == [edge[:2] for edge in expected]
    for line, edge in zip(lines, expected, strict=True):
        assert [float(line[2]), float(line[3])] == pytest.approx(edge[2:], rel=1e-5)
        assert (line[4] == "solid") == (edge.after > edge.before)


def test_a_format_that_is_none_is_refused(half_run, tmp_path):
    with pytest.raises(ProbeError, match=r"'.parket' is not known.*did you mean '.parquet'"):
        export_run(half_run.path, tmp_path / "edges.parket")
    with pytest.raises(ProbeError, match="cannot write to"):
        export_run(half_run.path, tmp_path / "none" / "x" / "edges.dot")
