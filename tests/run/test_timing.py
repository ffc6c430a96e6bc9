import io
import json
import re
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from rich.console import Console

import probe
import probe.run._timing
import probe.store._record
from probe.recipe import read_recipe
from probe.run import Span, answer_span, make_plan, time_batches, time_line, worth_timing
from probe.solutions import Answer


def test_the_estimate_is_what_a_run_takes(tmp_path, monkeypatch):
    """Of the CPU's time, which does not depend on what else runs there."""
    recipe = read_recipe("tiny-math", {"solutions.questions": 200, "selection.alpha": "[0.1, 0.5]"})
    found = time_batches(make_plan(recipe))
    monkeypatch.setattr(probe.store._record, "time", SimpleNamespace(monotonic=time.process_time))
    probe.run_recipe(recipe, tmp_path, console=Console(file=io.StringIO()))
    took = json.loads((tmp_path / "run.json").read_text())["seconds"]
    assert found.solving.low / 3 < took["solutions"] < 3 * found.solving.high
    assert found.scoring.low / 3 < took["attribution"] < 3 * found.scoring.high
    assert found.report / 4 < took["report"] < 4 * found.report


def at_speed(monkeypatch, **speed):
    """Let a processor take so many seconds for each step of writing, row of one, and token scored.

    Loading takes `load` seconds; answers are as long as `lengths` says of prompt after prompt.
    """
    clock = [0.0]
    ticking = SimpleNamespace(monotonic=lambda: clock[0], process_time=lambda: clock[0])
    lengths = speed["lengths"]

    def load(*_, **__):
        clock[0] += speed["load"]
        return model

    def write(model, prompts, limits, **_):
        long = [min(limit, lengths[place % len(lengths)]) for place, limit in enumerate(limits)]
        clock[0] += max(long) * speed["step"] + sum(long) * speed["row"]
        yield [Answer(place, [5] * length) for place, length in enumerate(long)]

    def score(model, sequences, *_, **__):
        clock[0] += speed["token"] * sum(each.length for each in sequences)
        return SimpleNamespace(losses=sequences)

    model = probe.load_model("probe:tiny-math/sft")
    for name, fake in {
        "time": ticking,
        "load_model": load,
        "generate": write,
        "attribute": score,
        "in_threads": lambda parts, _: parts,
        "limits": lambda _, prompts, longest: [longest] * len(prompts),
        "_right": lambda *_: Span(0.5, 0.5),
    }.items():
        monkeypatch.setattr(probe.run._timing, name, fake)


SETTINGS = {
    "solutions.questions": 400,
    "selection.alpha": "[0.5]",
    "attribution.control": "none",
    "pairs.0.max_new_tokens": 1000,
    "pairs.1.max_new_tokens": 1000,
}
SPEED = {"load": 0.5, "step": 1e-3, "row": 1e-4, "token": 1e-4}


def timed(**more):
    keys = {key.replace("__", "."): value for key, value in more.items()}
    return time_batches(make_plan(read_recipe("tiny-math", SETTINGS | keys)))


def test_batches_are_what_an_answer_and_the_longest_cost(monkeypatch):
    """Not an answer's share of the first few: a batch of two costs as many steps as one of 100."""
    at_speed(monkeypatch, lengths=[20, 30, 40], **SPEED)
    found = timed()
    # Three models, 400 questions in four batches; each answer stays to the end of a piece.
    each = 0.5 + 4 * 40 * 1e-3 + 400 * 40 * 1e-4
    assert found.solving == pytest.approx((0.5 + 3 * each, 0.5 + 3 * each), rel=0.05)
    slow = timed(solutions__batch_size=1)
    assert slow.solving.low > 2 * found.solving.high


def test_what_multiplies_the_time(monkeypatch):
    at_speed(monkeypatch, lengths=[20, 30, 40], **SPEED)
    plain, control = timed(), timed(attribution__control="cross-text")
    loads = 3 * 0.5
    for one, both in zip(plain.scoring, control.scoring, strict=True):
        assert both - loads == pytest.approx(2 * (one - loads))
    assert timed(selection__samples=1).scoring.high < plain.scoring.low
    exact = timed(attribution__method="exact")
    assert exact.scoring is None
    assert exact.solving == pytest.approx(plain.solving)


def test_answers_that_do_not_end_soon(monkeypatch):
    """One of a hundred does not make all of them long; nor is it left out."""
    at_speed(monkeypatch, lengths=[20] * 99 + [10_000], **SPEED)
    found = timed()
    cost = {end: 0.5 + 4 * end * 1e-3 for end in (512, 1000)}  # of the steps of four batches
    rows = 400 * 1e-4 * (25 + 16), 400 * 1e-4 * (20 + 10 + 16)
    assert found.solving.low == pytest.approx(0.5 + 3 * (cost[512] + rows[0]), rel=0.1)
    assert found.solving.high == pytest.approx(0.5 + 3 * (cost[1000] + rows[1]), rel=0.1)
    assert re.search(
        r"solving \d+ to \d+ s, ", time_line(make_plan(read_recipe("tiny-math", SETTINGS)))
    )


def test_where_most_answers_are_cut(monkeypatch):
    """A slow model's are not written to their end, and are as the plan takes them to be."""
    at_speed(monkeypatch, **{**SPEED, "step": 1.0}, lengths=[300])
    found = timed()
    span = answer_span(read_recipe("tiny-math", SETTINGS).pairs[0])
    assert span == (16 + 50, 16 + 500)
    low = 4 * 3 * span.low + 400 * 1e-4 * (span.low + 16)
    high = 4 * 1000 + 400 * 1e-4 * (span.high + 16)
    assert found.solving.low == pytest.approx(0.5 + 3 * (0.5 + low), rel=0.05)
    assert found.solving.high == pytest.approx(0.5 + 3 * (0.5 + high), rel=0.05)
    assert found.scoring.high > 3 * found.scoring.low


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
