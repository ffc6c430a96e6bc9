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
from probe.report import FORMATS, build_report, extra_tables, render
from probe.report import _extra_rows as extra_rows
from probe.report import _extras as extras
from probe.run import check_here, gpu_times, make_plan
from probe.tracing import _targets as targets

PAGE = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")


def add(monkeypatch, module, table, home=None):
    """Do what the section of this module says: its functions, and its row in a table.

    The table is in the module itself, or in another one, whose names are `home`.
    """
    home = vars(module) if home is None else home
    path = module.__name__.replace(".", "/")
    section = re.split(r"^## ", PAGE, flags=re.MULTILINE)
    (section,) = (part for part in section if f"`{path}.py`" in part.splitlines()[0])
    *functions, row = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    namespace = dict(vars(module))
    for code in functions:
        exec(code, namespace)
    added = eval(f"{{{row}}}", dict(home) | namespace)
    for key, value in added.items():
        assert key not in home[table], "the page should show something new"
        monkeypatch.setitem(home[table], key, value)
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
    assert gpu_times(make_plan(recipe)).scoring.low > 0
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


def test_a_target(monkeypatch, tiny):
    """Its slope is the one that autograd finds, and recipes, methods and `exact` take it."""
    (name,) = add(monkeypatch, targets, "TARGETS")

    def value(logits, labels):
        return logits.softmax(-1).gather(1, labels[:, None])[:, 0]

    sequences = [probe.TokenSequence([5, 6, 7, 8], [9, 10, 11]), probe.TokenSequence([4], [7])]
    for method in ("eap", "eap-ig"):
        one, other = (
            probe.attribute(tiny, sequences, method, target=what).scores for what in (name, value)
        )
        assert one.abs().max() > 1e-4
        assert torch.allclose(one, other, rtol=0, atol=1e-5 * float(one.abs().max()))
    edges = [probe.Edge(0, 0, 1), probe.Edge(1, 0, 5)]
    one, other = (
        probe.exact_effects(tiny, sequences, edges, target=what) for what in (name, value)
    )
    assert torch.allclose(one, other, rtol=1e-5, atol=1e-9)
    check_here(read_recipe("tiny-math", {"attribution.target": name}))
    with pytest.raises(probe.ProbeError, match="probability has no reference"):
        targets.Target(name, reference=[torch.zeros(3, 5)])


def test_a_table(monkeypatch, half_run):
    (name,) = add(monkeypatch, extra_rows, "EXTRAS", vars(extras))
    recipe = read_recipe("tiny-math", {"report.extra": f'["{name}"]', "selection.alpha": "[0.5]"})
    (table,) = (
        table for table in extra_tables(half_run, recipe)[0] if table.title == "Largest score"
    )
    path = half_run.edges_file("sft-grpo.tiny-math.alpha-0.5", "before")
    largest = float(half_run.read_edges(path).scores.abs().max())
    rows = [row[-2:] for row in table.rows]
    assert rows == [("before", pytest.approx(largest)), ("after", pytest.approx(2 * largest))]
    report = replace(build_report(half_run.path), extras=(table,))
    for style in set(FORMATS) - {"csv"}:
        assert "Largest score" in render(report, style)
