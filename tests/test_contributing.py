"""What CONTRIBUTING.md tells a stranger to write is written here, and works."""

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import save_random_model

import probe
from probe import architectures, metrics, problems
from probe.rendering import render
from probe.report import build_report

PAGE = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")


def add(monkeypatch, module, table):
    """Do what the section of this module says: its functions, and its row in a table."""
    name = module.__name__.split(".")[-1]
    section = re.split(r"^## ", PAGE, flags=re.MULTILINE)
    (section,) = (part for part in section if f"`probe/{name}.py`" in part.splitlines()[0])
    *functions, row = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    namespace = dict(vars(module))
    for code in functions:
        exec(code, namespace)
    added = eval(f"{{{row}}}", namespace)
    for key, value in added.items():
        assert key not in vars(module)[table], "the page should show something new"
        monkeypatch.setitem(vars(module)[table], key, value)
    return added


def test_a_metric(monkeypatch, half_run):
    (name,) = add(monkeypatch, metrics, "METRICS")
    report = build_report(half_run.path)
    cell = next(cell for cell in report.cells if cell.metric == name)
    path = half_run.edges_file("sft-grpo.tiny-math.alpha-0.5", "before")
    scores = half_run.read_edges(path).scores.abs()
    expected = (scores.flatten(1).max(1).values / scores.sum((1, 2))).mean()
    assert cell.before == pytest.approx(float(expected), rel=1e-5)
    assert cell.change == pytest.approx(0, abs=1e-6)  # twice as strong, and so is the strongest
    assert cell.interval == pytest.approx((0, 0), abs=1e-6)
    assert cell.p_value == 1
    assert cell.noise_floor > 0
    assert cell.paper_direction is cell.as_in_paper is None
    for style in ("markdown", "csv", "json"):
        assert "Strongest" in render(report, style) or name in render(report, style)


def test_a_benchmark(monkeypatch, tmp_path):
    (name,) = add(monkeypatch, problems, "BENCHMARKS")
    path = tmp_path / "capitals.jsonl"
    path.write_text(json.dumps({"question": "France?", "answer": "Paris"}) + "\n")
    (problem,) = problems.load_problems(name, path)
    assert problem.question == "France?"
    assert problem.answer == "Paris"


def test_an_architecture(monkeypatch, tmp_path):
    (name,) = add(monkeypatch, architectures, "ARCHITECTURES")
    model = probe.load_model(str(save_random_model(tmp_path / "model", name)))
    sequences = [probe.Sequence([5, 6, 7, 8], [9, 10, 11])]
    edges = probe.attribute(model, sequences)
    assert edges.residual_error < 1e-5
    # One edge by hand: a layer's FFN without what the embedding gives it.
    place = probe.Edge(0, 0, edges.graph.targets.index("m1"))
    exact = probe.exact_effects(model, sequences, [place])
    assert exact.abs() > 0
    assert torch.isfinite(edges.scores).all()


@pytest.mark.parametrize("table", ["METHODS", "EXTRAS"])
def test_the_tables_that_it_names(table):
    row = next(line for line in PAGE.splitlines() if f"`{table}`" in line)
    modules = re.findall(r"`(probe/\w+\.py)`", row)
    root = Path(probe.__file__).parent.parent
    assert re.search(rf"^{table}\b", (root / modules[-1]).read_text(), re.MULTILINE)
