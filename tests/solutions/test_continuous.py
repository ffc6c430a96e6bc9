"""What a version of transformers may lack is found before a run, and the next best way is taken."""

import pytest
import torch

import probe.solutions._generation
from probe.problems import load_problems
from probe.solutions import _continuous as continuous
from probe.solutions import _flash as flash
from probe.solutions import generate

pytestmark = pytest.mark.usefixtures("no_slots")


@pytest.fixture(scope="module")
def prompts(tiny):
    problems = load_problems("tiny-math", questions=6)
    return [tiny.tokenizer(problem.question)["input_ids"] for problem in problems]


def answers(model, prompts, said=None, **options):
    say = [].append if said is None else said.append
    batches = generate(model, prompts, [24] * len(prompts), say=say, **options)
    return {answer.place: answer.tokens for batch in batches for answer in batch}


def refuses(*given):
    raise TypeError("an argument that this version does not have")


def is_wrong(query, key, value, *given):
    return torch.zeros_like(query)


def is_not_a_number(query, key, value, *given):
    return torch.full_like(query, torch.nan)


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (refuses, "an argument that this version does not have"),
        (is_wrong, "standard deviations from greedy"),
        (is_not_a_number, "standard deviations from greedy"),
    ],
)
def test_an_attention_that_fails_is_left_before_the_run(tiny, prompts, monkeypatch, kernel, reason):
    monkeypatch.setattr(flash, "usable", lambda *given: True)
    monkeypatch.setattr(flash, "varlen", kernel)
    said = []
    found = answers(tiny, prompts, said, engine="continuous")
    assert found == answers(tiny, prompts, engine="static")
    (line,) = said
    assert "\n" not in line
    assert reason in line
    assert line.startswith("continuous batching of transformers ")
    assert "torch's flash attention" in line
    assert line.endswith("using it with masks, answers ended in step")


def test_answers_end_when_read_where_they_cannot_in_step(tiny, prompts, monkeypatch):
    """A version whose results do not pass through a router as expected."""
    from transformers.generation.continuous_batching.continuous_api import OutputRouter

    monkeypatch.setattr(continuous, "_stopping_router", refuses)
    said = []
    found = answers(tiny, prompts, said, engine="continuous", stop=(";", "=2"))
    assert found == answers(tiny, prompts, engine="static", stop=(";", "=2"))
    assert len(said) == 1
    assert said[0].endswith("using it with masks, answers ended when read")
    # One that is never asked lets everything pass: what is read ends all the same.
    monkeypatch.setattr(continuous, "_stopping_router", lambda *given: OutputRouter())
    assert answers(tiny, prompts, engine="continuous", stop=(";", "=2")) == found


def test_where_no_way_is_there_auto_is_static(tiny, prompts, monkeypatch):
    monkeypatch.setattr(continuous, "_prepare", refuses)
    monkeypatch.setattr(probe.solutions._generation, "CONTINUOUS_ON", ("cpu",))
    said = []
    attention = tiny.network._module.config._attn_implementation
    expected = answers(tiny, prompts, engine="static")
    assert answers(tiny, prompts, said, engine="auto") == expected
    (line,) = said
    assert "did not pass a trial: masks, answers ended in step: an argument that" in line
    assert line.endswith("going on with static batches")
    assert tiny.network._module.config._attn_implementation == attention
    with pytest.raises(RuntimeError, match="did not pass a trial"):
        answers(tiny, prompts, engine="continuous")


def test_a_trial_that_writes_nothing_ends(tiny, prompts, monkeypatch):
    monkeypatch.setattr(continuous, "PATIENCE", 1.0)
    silent = type("Silent", (), {"deliver_batch": lambda *given: None})

    def router(manager, stopped):
        quiet = silent()
        quiet.output_queue, quiet.fail_and_deliver = manager.output_router.output_queue, refuses
        return quiet

    monkeypatch.setattr(continuous, "_stopping_router", router)
    said = []
    found = answers(tiny, prompts, said, engine="continuous", stop=(";",))
    assert found == answers(tiny, prompts, engine="static", stop=(";",))
    assert "nothing was written in 1 s" in said[0]
