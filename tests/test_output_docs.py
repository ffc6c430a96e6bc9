"""docs/output.md against what is written: every field is there, in order, and no other."""

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
from safetensors import safe_open

from probe.metrics import METRICS, TOKEN_METRICS
from probe.recipe import read_recipe
from probe.report import FORMATS, build_report
from probe.report import _report as report
from probe.solutions import Selection, Solution
from probe.stats import Agreement, Estimate, Influence, MeasuredEdge
from probe.stats import _cells as cells
from probe.store import FOLDERS, SCHEMA, RunFolder, open_record

TEXT = (Path(__file__).parent.parent / "docs" / "output.md").read_text(encoding="utf-8")


def documented(heading, column="field"):
    """The first column of the table below a heading."""
    section = re.split(r"\n#+ ", TEXT.split(f" {heading}\n", 1)[1])[0]
    table = section.split(f"| {column} |", 1)[1].split("\n\n")[0]
    return re.findall(r"^\| `([^`]+)`", table, re.M)


@pytest.mark.parametrize(
    ("heading", "kind"),
    [
        ("Cell", cells.Cell),
        ("Change", cells.Change),
        ("Influence", Influence),
        ("Accuracy", cells.Accuracy),
        ("Extra table", report.ExtraTable),
        ("Agreement", Agreement),
        ("Measured edge", MeasuredEdge),
        ("Solution", Solution),
        ("Selection", Selection),
    ],
)
def test_the_fields_of_records(heading, kind):
    assert documented(heading) == [field.name for field in fields(kind)]


def test_the_fields_of_estimates():
    assert documented("Estimate") == list(Estimate._fields)


def test_the_fields_of_the_report(half_run):
    table = build_report(half_run.path).table
    assert documented("report.json") == list(table)
    assert table["schema"] == report.REPORT_SCHEMA
    assert f"It is {SCHEMA}, and grows" in TEXT
    assert f"That of `report.json` is {report.REPORT_SCHEMA}" in TEXT
    (row,) = re.findall(r"^\| `metric` \| (.*) \|$", TEXT, re.M)
    examples = re.findall(r"`(\w+)`", row)
    assert set(examples) <= METRICS.keys() | TOKEN_METRICS.keys()


def test_the_files_of_edges(half_run):
    path = half_run.edges_file("sft-grpo.tiny-math.alpha-0.5", "before")
    with safe_open(path, framework="pt") as file:
        assert sorted(documented("Edges", "tensor")) == sorted(file.keys())
        assert sorted(documented("Edges", "key")) == sorted(file.metadata())
        graph = json.loads(file.metadata()["graph"])
    for name in graph:
        assert f"`{name}`" in TEXT


def test_the_fields_of_the_record(tmp_path):
    record = open_record(RunFolder(tmp_path / "run"), read_recipe("tiny-math"), fresh=False)
    # Which come with the solutions, the edges and the report.
    later = ["solved", "residual_error", "report"]
    assert documented("run.json") == [*record, *later]


def test_the_formats_and_folders():
    assert documented("Output", "format") == ["table", *FORMATS]
    for folder in FOLDERS:
        assert f"`{folder}/" in TEXT
