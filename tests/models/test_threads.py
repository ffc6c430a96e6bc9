"""How many CPU threads a model runs with, wherever it runs."""

import pytest
import torch
from conftest import run_recorded

import probe
from probe.attribution import _methods as methods
from probe.models import _loading as models
from probe.solutions import _solutions as solutions

SMALL = {"solutions.questions": 8, "selection.samples": 2, "selection.alpha": "[0.5]"}
SFT = "probe:tiny-math/sft"


@pytest.fixture
def used(monkeypatch):
    """Four threads, as on a machine that nobody has set up, and how many were really used."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    found = {"solving": set(), "scoring": set()}
    score, generate = methods.edge_scores, solutions.generate

    def watched_score(*arguments, **options):
        found["scoring"].add(torch.get_num_threads())
        return score(*arguments, **options)

    def watched_generate(*arguments, **options):
        for answers in generate(*arguments, **options):
            found["solving"].add(torch.get_num_threads())
            yield answers

    monkeypatch.setattr(methods, "edge_scores", watched_score)
    monkeypatch.setattr(solutions, "generate", watched_generate)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield found
    assert torch.get_num_threads() == 4
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("parameters", "threads"),
    [(1, 1), (1_200_000, 1), (56_000_000, 1), (135_000_000, 2), (250_000_000, 3), (7 * 10**9, 4)],
)
def test_larger_models_get_more_threads(used, monkeypatch, parameters, threads):
    assert models.threads_for(parameters) == threads
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert models.threads_for(parameters) == 4


def test_the_interface(used):
    tokens = [5, 16, 4]
    for explicit, threads in ((None, 1), (3, 3)):
        model = probe.load_model(SFT, threads=explicit)
        probe.attribute(model, [probe.Sequence(tokens, tokens)])
        list(solutions.solve(model, [], "{question}", max_new_tokens=4))
        assert used["scoring"] == {threads}
        used["scoring"].clear()


@pytest.mark.parametrize(("overrides", "threads"), [({}, 1), ({"compute.threads": 3}, 3)])
def test_recipes_and_comparisons(used, tmp_path, overrides, threads):
    run_recorded(SMALL | overrides, tmp_path / "run")
    assert used == {"solving": {threads}, "scoring": {threads}}
    probe.compare(
        SFT,
        "probe:tiny-math/dpo",
        ["tiny-math"],
        alpha=[0.5],
        prompt="{question}",
        overrides=SMALL | {"compute.dtype": "float32"} | overrides,
        output=tmp_path / "pair",
    )
    assert used == {"solving": {threads}, "scoring": {threads}}
