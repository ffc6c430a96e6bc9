import re
import socket
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from rich.console import Console
from small_models import save_small_model

import probe.run._plan
from probe.checkpoints import hub_reachable
from probe.errors import ProbeError
from probe.recipe import place_benchmarks, read_recipe, recipe_files
from probe.run import check_reach, lengths_line, make_plan, plan_view, recipes_view, took_line


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
    timed = name != "tiny-math" or torch.cuda.is_available()
    assert ("H100" in text) == timed
    assert bool(re.search(r"solving about [\d.]+ (s|min|h)", text)) == timed
    assert ("scoring about" in text) == (timed and name != "paper-accuracy")
    if name == "tiny-math":
        assert "Downloads: nothing." in text
    else:
        assert all(not model.here for model in plan.models)
        assert set(plan.missing_models) == set(read_recipe(name).models())
        assert all(model in text.replace("\n", "") for model in plan.missing_models)
        with pytest.raises(ProbeError, match="the hub cannot be reached") as caught:
            check_reach(plan.recipe)
        assert "\n" not in str(caught.value)


def test_what_the_estimates_say_is_their_arithmetic():
    plan = make_plan(read_recipe("mistral-math", {"solutions.questions": 64}))
    layers, parameters = 32, 7241732096
    written = 2 * 3 * 64 * 409.6
    for engine, speed in (("auto", 3286), ("continuous", 3286), ("static", 418)):
        other = replace(plan.recipe, solutions=replace(plan.recipe.solutions, engine=engine))
        assert replace(plan, recipe=other).solving_seconds == pytest.approx(written / speed)
    tokens = [200 + alpha * 409.6 for alpha in (0.03, 0.1, 0.3, 0.5)]
    work = [4 * parameters * count / probe.run._plan.OPERATIONS_PER_SECOND for count in tokens]
    assert min(work) > layers * probe.run._plan.PASS_SECONDS / 20  # never the least
    assert plan.scoring_seconds == pytest.approx(2 * 3 * 64 * sum(work))
    single = make_plan(read_recipe("mistral-math", {"attribution.batch_size": 1}))
    assert single.scoring_seconds == pytest.approx(2 * 3 * 4 * 100 * 0.08)
    exact = make_plan(read_recipe("mistral-math", {"attribution.method": "exact"}))
    assert exact.scoring_seconds is None
    assert "scoring" not in shown(plan_view(exact))


def test_sizes_that_nobody_knows_are_not_guessed():
    plan = make_plan(read_recipe("tiny-math", {"pairs.0.after": "nobody/model"}))
    text = shown(plan_view(plan))
    assert re.search(r"nobody/model +no +\? +\? +\?", text)
    assert "Memory and time: unknown until the models are here." in text
    assert plan.solving_seconds is plan.scoring_seconds is None
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
