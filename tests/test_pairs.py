"""The adapters of SmolLM2 and their problems: `pairs/smollm2` holds what its page says."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from probe.recipe import read_recipe

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "pairs" / "smollm2"
NAMES = ("sft", "grpo", "more-sft", "rejection", "dpo", "online-dpo")

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="the pairs are in the repository only")


def weights(name):
    return load_file(FOLDER / name / "adapter_model.safetensors")


def test_the_adapters_are_small_and_of_one_base():
    size = sum(f.stat().st_size for n in NAMES for f in (FOLDER / n).iterdir())
    assert size < 60e6
    for name in NAMES:
        config = json.loads((FOLDER / name / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "../base"
        assert config["r"] == 8


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_is_whole_and_went_somewhere(name):
    mine, start = weights(name), weights("sft")
    assert mine.keys() == start.keys()
    assert len(mine) == 30 * 7 * 2  # layers, matrices, A and B
    assert all(w.dtype == torch.bfloat16 and w.isfinite().all() for w in mine.values())
    moved = [key for key in mine if not mine[key].equal(start[key])]
    assert bool(moved) == (name != "sft")
    assert name == "sft" or len(moved) > 400  # every layer was trained


def test_the_problems_name_their_templates():
    rows = [json.loads(line) for line in (FOLDER / "problems.jsonl").read_text().splitlines()]
    assert len({row["question"] for row in rows}) == len(rows) == 1000
    assert len({row["cluster"] for row in rows}) == 73
    assert all(float(row["answer"]) is not None for row in rows)


def test_the_recipe_pairs_every_way_with_the_start():
    recipe = read_recipe(FOLDER / "smollm2-math.toml")
    assert {Path(pair.before).name for pair in recipe.pairs} == {"sft"}
    assert {Path(pair.after).name for pair in recipe.pairs} == {*NAMES} - {"sft"}


def test_the_recorded_accuracies_are_those_of_the_recorded_answers():
    record = json.loads((FOLDER / "training.json").read_text())
    for name in (*NAMES, "base"):
        accuracy = record[name]["accuracy"]
        each = [int(mark) for mark in accuracy["test_greedy_each"]]
        assert accuracy["test_greedy"] == sum(each) / 1000
        page = (ROOT / "docs" / "smollm2.md").read_text()
        assert name == "base" or f"| {100 * accuracy['test_greedy']:.1f} [" in page


def test_the_sampler_says_what_the_library_says():
    pytest.importorskip("trl")
    pytest.importorskip("peft")
    from transformers import LlamaConfig, LlamaForCausalLM

    path = ROOT / "examples" / "train_smollm2.py"
    spec = importlib.util.spec_from_file_location("train_smollm2", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    shape = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2}
    ends = {"eos_token_id": 2, "pad_token_id": 2, "bos_token_id": 1}
    config = LlamaConfig(**shape, **heads, **ends, vocab_size=60, initializer_range=0.3)
    model = LlamaForCausalLM(config).eval()
    settings = module.Settings(sampler_rows=3, longest_prompt=16, longest_answer=20)
    prompts = [[5, 6, 7], [5, 6, 7], [9, 8, 3, 4, 11, 12, 13], [20], [30, 31]]
    said = module.Sampler(model, settings)(prompts, 0.0)
    for prompt, mine in zip(prompts, said, strict=True):
        whole = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=20)
        assert mine == whole[0, len(prompt) :].tolist()
