import re
import socket
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from rich.console import Console
from small_models import save_small_model

from probe.checkpoints import hub_reachable
from probe.errors import ProbeError
from probe.recipe import Shape, place_benchmarks, read_recipe, recipe_files
from probe.run import (
    Span,
    check_reach,
    gpu_times,
    lengths_line,
    make_plan,
    plan_view,
    recipes_view,
    span_text,
    took_line,
)
from probe.run._estimates import PASS_SECONDS


def shown(view):
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(view)
    return console.export_text()


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "mixtral", "gemma2"])
def test_a_plan_of_any_architecture(tmp_path, name):
    folder = str(save_small_model(tmp_path / "m", name))
    sides = {f"pairs.{number}.{side}": folder for number in (0, 1) for side in ("before", "after")}
    plan = make_plan(read_recipe("tiny-math", sides))
    (model,) = plan.models
    assert model.here
    assert model.shape.parameters > 1000
    assert model.activation_bytes("float32") > 1000
    assert plan.missing_models == plan.missing_data == []


@pytest.mark.parametrize("name", recipe_files())
def test_every_recipe_has_a_plan_without_network(monkeypatch, name):
    def refuse(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    plan = make_plan(read_recipe(name))
    text = shown(plan_view(plan))
    assert "?" not in text  # all sizes and numbers of questions are known
    assert "unknown" not in text
    # Where its models are here and run on the CPU, a dry run measures this machine instead.
    ships = name.startswith("tiny-math")
    timed = not ships or torch.cuda.is_available()
    assert ("H100" in text) == timed
    assert bool(re.search(r"solving (about )?[\d.]+ ", text)) == timed
    assert ("scoring" in text) == (timed and name != "paper-accuracy")
    if ships:
        assert "Downloads: nothing." in text
    else:
        assert all(not model.here for model in plan.models)
        assert set(plan.missing_models) == set(read_recipe(name).models())
        assert all(model in text.replace("\n", "") for model in plan.missing_models)
        with pytest.raises(ProbeError, match="the hub cannot be reached") as caught:
            check_reach(plan.recipe)
        assert "\n" not in str(caught.value)


def test_what_the_estimates_say_is_their_arithmetic():
    settings = {"solutions.questions": 64, "attribution.control": "none"}
    plan = make_plan(read_recipe("mistral-math", settings))
    layers, parameters = 32, 7241732096
    load = 2 * (2 + 2 * parameters / 1.3e9)
    lengths = 16 + 4096 / 20, 16 + 4096 / 2
    for engine, speed in (("auto", 9885), ("continuous", 9885), ("static", 418)):
        other = replace(plan.recipe, solutions=replace(plan.recipe.solutions, engine=engine))
        expected = []
        for length in lengths:
            steps = 3 * 64 * length / 256 + min(4096, 3 * length)
            least = layers * 0.7e-3 * steps if engine != "static" else 0
            expected.append(load + 2 * max(3 * 64 * length / speed, least))
        assert gpu_times(replace(plan, recipe=other)).solving == pytest.approx(tuple(expected))
    expected = []
    for length, share in zip(lengths, (0.3, 1.0), strict=True):
        tokens = [200 + alpha * length for alpha in (0.03, 0.1, 0.3, 0.5)]
        work = [4 * parameters * count / 5e14 for count in tokens]
        assert min(work) > layers * PASS_SECONDS / 20  # never the least
        expected.append(load + 2 * 3 * 64 * share * sum(work))
    assert gpu_times(plan).scoring == pytest.approx(tuple(expected))
    single = make_plan(read_recipe("mistral-math", {**settings, "attribution.batch_size": 1}))
    assert gpu_times(single).scoring.high == pytest.approx(
        load + 2 * 3 * 64 * sum(max(each, 0.08) for each in work)
    )
    exact = make_plan(read_recipe("mistral-math", {"attribution.method": "exact"}))
    assert gpu_times(exact).scoring is None
    assert "scoring" not in shown(plan_view(exact))


def test_controls_cost_sides_and_temperatures():
    settings = {"attribution.control": "none"}
    plain = gpu_times(make_plan(read_recipe("mistral-math", settings)))
    usual = gpu_times(make_plan(read_recipe("mistral-math")))  # sharpness and loss-matched
    assert usual.scoring.low == pytest.approx((1 + 1.5 * 4 / 3) * plain.scoring.low, rel=0.3)
    assert usual.report > plain.report
    assert usual.solving == plain.solving


def test_a_small_model_takes_its_steps_however_small_it_is():
    """SmolLM2 on an H100, 1,000 questions: 18 s a model, where its tokens alone take 2.7 s."""
    shape = {"parameters": 134515008, "n_layers": 30, "d_model": 576, "d_ffn": 1536}
    names = [f"nobody/{side}" for side in ("sft", "grpo")]
    recipe = read_recipe("tiny-math", {"solutions.questions": 1000, "compute.device": "cpu"})
    pair = replace(
        recipe.pairs[0],
        before=names[0],
        after=names[1],
        max_new_tokens=272,
        shape=Shape(**shape),
    )
    times = gpu_times(make_plan(replace(recipe, pairs=(pair,))))
    assert times.solving.low < 2 * 18 < times.solving.high
    # No less is known than how long answers are.
    assert times.solving.high < (16 + 272 / 2) / (16 + 272 / 20) * times.solving.low


@pytest.mark.parametrize(
    ("span", "text"),
    [
        ((3, 3), "about 3 s"),
        ((0.1, 1.2), "about 1 s"),
        ((10, 40), "10 to 40 s"),
        ((40, 200), "40 s to 3 min"),
        ((600, 7200), "10 min to 2.0 h"),
    ],
)
def test_spans_as_text(span, text):
    assert span_text(Span(*span)) == text


def test_sizes_that_nobody_knows_are_not_guessed():
    plan = make_plan(read_recipe("tiny-math", {"pairs.0.after": "nobody/model"}))
    text = shown(plan_view(plan))
    assert re.search(r"nobody/model +no +\? +\? +\?", text)
    assert "Memory and time: unknown until the models are here." in text
    assert gpu_times(plan) is None
    assert "1 models" in shown(recipes_view([plan]))


def test_only_what_is_missing_is_asked_for(tmp_path, monkeypatch):
    file = tmp_path / "p.jsonl"
    file.write_text('{"question": "1+1=?", "answer": "2"}\n')
    recipe = read_recipe("mistral-math", {"pairs.0.before": "probe:tiny-math/sft"})
    recipe = place_benchmarks(recipe, [f"gsm8k={file}", f"math={file}"])
    with pytest.raises(ProbeError) as caught:
        check_reach(recipe)
    text = str(caught.value)
    assert "the models peiyi9979/math-shepherd-mistral-7b-rl (" in text
    assert "the data sets qq8933/College_Math_Test (" in text
    assert text.endswith("by --set pairs.0.after=FOLDER --benchmark-path college_math=FILE")
    # A data set that was loaded once is in the cache, in the cache's own spelling.
    (tmp_path / "qq8933___college_math_test").mkdir()
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    with pytest.raises(ProbeError) as caught:
        check_reach(recipe)
    assert "data set" not in str(caught.value)


class Teapot(BaseHTTPRequestHandler):
    """A server that answers, and no more."""

    def do_GET(self):
        self.send_error(418)

    def log_message(self, *_):
        pass


def test_whether_the_hub_is_reachable(monkeypatch):
    from huggingface_hub import constants

    assert not hub_reachable()  # tests run offline
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        assert not hub_reachable(1)
    server = HTTPServer(("127.0.0.1", 0), Teapot)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    try:
        assert hub_reachable(5)
    finally:
        server.shutdown()
        server.server_close()


def test_what_a_run_says_before_and_after():
    recipe = read_recipe("tiny-math")
    assert lengths_line([10, 30, 20], recipe) == (
        "attribution: 3 sequences, 60 tokens, at most 30 each; about 1 batches"
    )
    text = took_line({"solutions": 12.3, "attribution": 600.0})
    assert text.startswith("took: solutions 12 s, attribution 10 min; at most ")
    assert re.search(r"at most [\d.]+ [MG]B of memory here", text)
