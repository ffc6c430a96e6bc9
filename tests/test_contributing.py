"""What CONTRIBUTING.md tells a stranger to write is written here, and works."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import save_random_model
from rich.console import Console

import probe
from probe import metrics
from probe.attribution import _methods as methods
from probe.models import _architectures as architectures
from probe.problems import _benchmarks as problems
from probe.recipe import read_recipe
from probe.report import FORMATS, build_report, render
from probe.run import make_plan

PAGE = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")


def add(monkeypatch, module, table):
    """Do what the section of this module says: its functions, and its row in a table."""
    path = module.__name__.replace(".", "/")
    section = re.split(r"^## ", PAGE, flags=re.MULTILINE)
    (section,) = (part for part in section if f"`{path}.py`" in part.splitlines()[0])
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
    assert cell.before == cell.paper.before == pytest.approx(float(expected), rel=1e-5)
    assert cell.change == pytest.approx(0, abs=1e-6)  # twice as strong, and so is the strongest
    assert cell.interval == pytest.approx((0, 0), abs=1e-6)
    assert cell.p_value == 1
    assert cell.paper_direction is cell.as_in_paper is None
    for style in ("markdown", "csv", "json"):
        assert "Strongest" in render(report, style) or name in render(report, style)


def test_a_method(monkeypatch, tiny, tmp_path):
    """With a metric beside it, through everything that asks for either."""
    (method,) = add(monkeypatch, methods, "METHODS")
    (metric,) = add(monkeypatch, metrics, "METRICS")
    sequences = [probe.TokenSequence([5, 6, 7, 8], [9, 10, 11])]
    one, other, both = (
        probe.attribute(tiny, sequences, name).scores for name in ("eap", "relp", method)
    )
    assert torch.equal(both, (one + other) / 2)
    with pytest.raises(probe.ProbeError, match=f"{method} needs what fused kernels leave out"):
        probe.attribute(replace(tiny, kernels="liger"), sequences, method)

    recipe = read_recipe(
        "tiny-math",
        {
            "attribution.method": method,
            "compute.kernels": "auto",
            "faithfulness.edges": "6",
            "faithfulness.methods": f'["{method}", "eap"]',
            "faithfulness.sequences": "1",
            "report.resamples": "20",
            "selection.alpha": "[0.1]",
            "selection.samples": "3",
            "solutions.questions": "30",
        },
    )
    assert make_plan(recipe).scoring_seconds > 0
    report = probe.run_recipe(recipe, output=tmp_path / "run", console=Console(quiet=True))
    assert {metric} <= {cell.metric for cell in report.cells}
    assert {row.method for row in report.faithfulness} == {method, "eap"}
    for style in set(FORMATS) - {"latex"}:  # which is the table of the paper
        text = render(report, style)
        assert metric in text or metrics.METRICS[metric].label in text
    for error in ("acdc", ""):
        with pytest.raises(probe.ProbeError, match=f"known.*{method}|one of: .*{method}"):
            probe.attribute(tiny, sequences, error)


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


@pytest.mark.parametrize("table", ["TARGETS", "EXTRAS"])
def test_the_tables_that_it_names(table):
    row = next(line for line in PAGE.splitlines() if f"`{table}`" in line)
    modules = re.findall(r"`(probe/\w+/\w+\.py)`", row)
    root = Path(probe.__file__).parent.parent
    assert re.search(rf"^{table}\b", (root / modules[-1]).read_text(), re.MULTILINE)
