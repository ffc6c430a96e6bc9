import io
import itertools
import json
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from rich.console import Console

import probe
import probe.run._timing
import probe.store._record
from probe.recipe import read_recipe
from probe.run import answer_tokens, make_plan, time_batches, time_line, worth_timing


def test_the_estimate_is_what_a_run_takes(tmp_path, monkeypatch):
    """Of the CPU's time, which does not depend on what else runs there."""
    recipe = read_recipe("tiny-math", {"solutions.questions": 200, "selection.alpha": "[0.1, 0.5]"})
    found = time_batches(make_plan(recipe))
    monkeypatch.setattr(probe.store._record, "time", SimpleNamespace(monotonic=time.process_time))
    probe.run_recipe(recipe, tmp_path, console=Console(file=io.StringIO()))
    took = json.loads((tmp_path / "run.json").read_text())["seconds"]
    assert found.solving / 3 < took["solutions"] < 3 * found.solving
    assert found.scoring / 3 < took["attribution"] < 3 * found.scoring


def tick(monkeypatch):
    """Let all that is measured take a second of the clock, more of the CPU, and be all there is."""
    clock, cpu = map(float, itertools.count()), map(float, itertools.count(0, 9))
    ticking = SimpleNamespace(monotonic=lambda: next(clock), process_time=lambda: next(cpu))
    monkeypatch.setattr(probe.run._timing, "time", ticking)
    monkeypatch.setattr(probe.run._timing, "SECONDS", 0.5)


def test_what_multiplies_the_time(monkeypatch):
    tick(monkeypatch)
    settings = {
        "solutions.questions": 40,
        "selection.alpha": "[0.5]",
        "attribution.control": "none",
    }

    def timed(**more):
        keys = {key.replace("__", "."): value for key, value in more.items()}
        plan = make_plan(read_recipe("tiny-math", settings | keys))
        return time_batches(plan)

    plain = timed()
    assert plain.device.startswith(("cpu", "cuda"))
    # The first two questions are all that is measured, and three models are asked.
    assert plain.solving == pytest.approx(40 * 3 / 2)
    control = timed(attribution__control="cross-text")
    assert control.scoring == pytest.approx(2 * plain.scoring)
    assert timed(selection__samples=1).scoring < plain.scoring
    exact = timed(attribution__method="exact")
    assert exact.scoring is None
    assert exact.solving == plain.solving


def test_answers_that_were_cut(monkeypatch):
    """They are taken to be as long as the plan says that they are, not as long as was measured."""
    monkeypatch.setattr(probe.run._timing, "TOKENS", 2)
    recipe = read_recipe("tiny-math", {"solutions.questions": 4, "pairs.0.max_new_tokens": 900})
    tick(monkeypatch)
    found = time_batches(make_plan(recipe))
    # The first pair's answers may be longer, so it asks the model before apart from the second.
    assert found.solving == pytest.approx(4 * 4 / 2 * answer_tokens(recipe.pairs[0]) / 2)
    assert found.scoring > 0


def test_where_nothing_is_measured(monkeypatch):
    plan = make_plan(read_recipe("tiny-math"))
    assert worth_timing(plan)
    assert not worth_timing(make_plan(read_recipe("tiny-math", {"solutions.questions": 100})))
    monkeypatch.setattr(probe.run._timing, "load_model", lambda *_, **__: pytest.fail("loaded"))
    compute = replace(plan.recipe.compute, remote="ndif")
    assert time_line(replace(plan, recipe=replace(plan.recipe, compute=compute))) is None
    assert time_line(make_plan(read_recipe("tiny-math", {"pairs.0.after": "nobody/model"}))) is None
    away = time_line(make_plan(read_recipe("tiny-math", {"benchmarks.0.name": "gsm8k"})))
    assert "not measured, until the questions are here" in away
    monkeypatch.setattr(probe.run._timing, "LARGEST_BYTES", 10)
    assert "not measured, as a model is large" in time_line(plan)
