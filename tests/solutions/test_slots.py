"""Answers in slots against plain greedy decoding, however few slots there are."""

import random

import pytest
import torch
from small_models import runs_continuously, save_small_model

import probe
from probe.problems import load_problems
from probe.solutions import _flash as flash
from probe.solutions import _slots as slots
from probe.solutions import generate
from probe.solutions._generation import Ending
from probe.solutions._requests import Request, Rules


@pytest.fixture(scope="module")
def prompts(tiny):
    problems = load_problems("tiny-math", questions=40)
    return [tiny.tokenizer(problem.question)["input_ids"] for problem in problems]


def limits_of(prompts):
    return [random.Random(place).randrange(1, 50) for place in range(len(prompts))]


def static(model, prompts, limits, stop=()):
    batches = generate(model, prompts, limits, stop=stop, engine="static")
    return {answer.place: answer.tokens for batch in batches for answer in batch}


def in_slots(model, prompts, limits, count, stop=()):
    ending = Ending(model, tuple(stop))
    stopped = ending.stopped if stop else None
    rules = Rules(ending.ends, stopped, ending.config)
    requests = {
        str(place): Request(list(prompt), limits[place]) for place, prompt in enumerate(prompts)
    }
    found = {}
    for batch in slots.in_slots(model, requests, rules, count):
        assert batch
        for name, tokens in batch:
            assert int(name) not in found
            found[int(name)] = tokens
    return found


@pytest.mark.parametrize("count", [1, 3, 20, 40])
@pytest.mark.parametrize("stop", [(), (";", "=2")])
def test_as_static_batches_write_them(tiny, prompts, count, stop):
    limits = limits_of(prompts)
    expected = static(tiny, prompts, limits, stop)
    assert in_slots(tiny, prompts, limits, count, stop) == expected
    assert any(len(tokens) == 1 for tokens in expected.values())


def test_the_last_answers_move_together(tiny, prompts, monkeypatch):
    """When nothing waits, slots that are free are given up, and the rest goes on as it was."""
    kept = []
    keep = slots.Slots.keep

    def counted(self, numbers):
        kept.append((self.count, numbers))
        keep(self, numbers)

    monkeypatch.setattr(slots.Slots, "keep", counted)
    limits = [60 if place % 9 == 0 else 2 for place in range(len(prompts))]
    expected = static(tiny, prompts, limits)
    assert in_slots(tiny, prompts, limits, 40) == expected
    ((count, numbers),) = kept
    assert count == 40
    assert 0 < len(numbers) <= 10


def test_what_runs_together_is_the_same_each_time(tiny, prompts):
    """Also in the order in which answers end."""
    limits = limits_of(prompts)
    first, second = (list(in_slots(tiny, prompts, limits, 7)) for _ in range(2))
    assert first == second


def test_nobody_else_runs_in_inference_mode_or_with_its_attention(tiny, prompts):
    before = tiny.network._module.config._attn_implementation
    steps = generate(tiny, prompts, limits_of(prompts), engine="continuous")
    next(steps)
    assert not torch.is_inference_mode_enabled()
    assert tiny.network._module.config._attn_implementation == before
    steps.close()
    assert not torch.is_inference_mode_enabled()


def among_first(query, key, value, seen, scaling, window=None):
    """What `flash.among_first` is to compute, without a GPU: each row for itself."""
    output = torch.zeros_like(query)
    for row, count in enumerate(seen.tolist()):
        first = max(0, count - window) if window else 0
        groups = query.shape[2] // key.shape[2]
        k, v = (part[row, first:count].repeat_interleave(groups, 1) for part in (key, value))
        chances = (scaling * torch.einsum("qhd,khd->hqk", query[row], k)).softmax(-1)
        output[row] = torch.einsum("hqk,khd->qhd", chances, v)
    return output


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text", "qwen3", "gpt2"])
def test_kernels_are_asked_for_what_they_give(tmp_path, monkeypatch, name):
    """All but the kernels: packing, windows, groups of heads, scaling."""
    from test_flash import one_by_one

    assert runs_continuously(name)
    model = probe.load_model(str(save_small_model(tmp_path, name)))
    draw = random.Random(0)
    prompts = [[draw.randrange(3, 97) for _ in range(draw.randrange(3, 30))] for _ in range(8)]
    limits = [draw.randrange(5, 40) for _ in prompts]
    monkeypatch.setattr(flash, "usable", lambda *given: True)
    monkeypatch.setattr(flash, "varlen", one_by_one)
    monkeypatch.setattr(flash, "among_first", among_first)
    assert in_slots(model, prompts, limits, 5) == static(model, prompts, limits)


def test_where_few_would_fit_pages_are_taken(tiny, monkeypatch):
    many = {str(n): Request([5, 6], 30) for n in range(600)}
    assert slots.slots_for(tiny, many) == slots.SLOTS
    few = {"0": Request([5, 6], 30)}
    assert slots.slots_for(tiny, few) == 1
    monkeypatch.setattr(slots, "SLOTS", 8)
    assert slots.slots_for(tiny, many) == 8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stop", [(), (";", "=2")])
def test_a_recorded_step_writes_the_same(prompts, dtype, stop):
    model = probe.load_model("probe:tiny-math/sft", "cuda", dtype)
    limits = limits_of(prompts)
    expected = static(model, prompts, limits, stop)
    assert in_slots(model, prompts, limits, 20, stop) == expected
