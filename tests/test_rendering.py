import csv
import io
import json

import pytest
from rich.console import Console

from probe.errors import ProbeError
from probe.rendering import print_report, render, summary, tables
from probe.report import build_report


def test_an_empty_run_prints(half_run, capsys):
    for path in (half_run.path / "edges").iterdir():
        path.unlink()
    report = build_report(half_run.path)
    for style in ("table", "markdown", "json", "csv"):
        print_report(report, style)
    assert "not computed yet" in capsys.readouterr().out


def test_formats_hold_the_same_numbers(half_run):
    report = build_report(half_run.path)
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
def test_tables_fit(half_run, width):
    console = Console(file=io.StringIO(), width=width, record=True)
    console.print(tables(build_report(half_run.path)))
    text = console.export_text()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    assert "+100.0 %" in text
    assert summary(build_report(half_run.path)).startswith("On tiny-math, GRPO moved ")


def test_real_edges_can_be_what_the_table_shows(half_run):
    record = half_run.read_record()
    record["recipe"]["report"]["entries"] = "real"
    half_run.write_json("run.json", record)
    report = build_report(half_run.path)
    shown = report.cells[0].real_edges.before
    assert f"{shown:.2e} →" in render(report, "markdown")
    assert shown > report.cells[0].before
